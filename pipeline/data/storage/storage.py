"""`Storage`: one interface to every URL of a run, with errors that name the URL and the remedy."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, BinaryIO, TypeVar

from pipeline.config.schema import StorageConfig
from pipeline.config.urls import is_local, parse
from pipeline.data.storage.backends import Backend, FsspecBackend, LocalBackend, ObjectInfo, PartReader, open_file
from pipeline.data.storage.retry import RetryPolicy, explain

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # (calls done, total, name of the last)
_BUFFER_BYTES = 16 * 2**20
_REMOTE_CALLS = 16  # in flight


class Storage:
    """Access to every URL of a run. Picklable; each process opens its connections on first use, also after a fork.

    Every method may raise StorageError (NotFound, ObjectChanged and NoSpace are subclasses), and ConfigError for a
    malformed URL. Transient failures are retried for `storage.retry_timeout_seconds`.
    """

    def __init__(self, config: StorageConfig = StorageConfig()):
        self.config = config
        self._lock = threading.Lock()
        self._backends: dict[str, Backend] = {}
        self._policy = RetryPolicy(config.retry_timeout_seconds)
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    def within(self, seconds: float) -> Storage:
        """Return access of the same configuration whose retries end after at most `seconds`."""
        shorter = min(seconds, self.config.retry_timeout_seconds)
        return Storage(self.config.model_copy(update={"retry_timeout_seconds": shorter}))

    def read(self, url: str) -> bytes:
        """Return the whole object."""
        return self._do(url, "reading", lambda backend, path: backend.read(path, 0, None, None))

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """Return exactly the bytes [start, stop). Raise ObjectChanged if `etag` is not the object's."""
        if stop <= start:
            return b""
        return self._do(url, "reading", lambda backend, path: backend.read(path, start, stop, etag))

    def open(self, url: str) -> BinaryIO:
        """Open the object as a stream that is read forward in large pieces and fails if the object changes."""
        if is_local(url):
            return self._do(url, "opening", lambda _, local: open_file(local))
        return io.BufferedReader(_RemoteStream(self, url), _BUFFER_BYTES)

    def info(self, url: str) -> ObjectInfo:
        """Return size and tag of an object. Raise NotFound if it does not exist."""
        return self._do(url, "checking", lambda backend, path: backend.info(path))

    def exists(self, url: str) -> bool:
        """Return True for an object and for a non-empty folder."""
        return self._do(url, "checking for", lambda backend, path: backend.exists(path))

    def list(self, url: str) -> list[str]:
        """Return the sorted names of the objects and folders directly in a folder; [] if it does not exist."""
        return sorted(self._do(url, "listing", lambda backend, path: dict(backend.entries(path))))

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        """Return name and info of every object directly in a folder, from one listing."""
        entries = self._do(url, "listing", lambda backend, path: dict(backend.entries(path)))
        return {name: info for name, info in sorted(entries.items()) if info is not None}

    def write(self, url: str, data: bytes, create: bool = False) -> bool:
        """Write an object atomically: readers see the old content or the new. Return True if it was written.

        With `create` it is not if the object exists, and at most one of several concurrent calls succeeds. This is
        atomic in local folders and in S3; stores without conditional writes are checked first. A retry after a lost
        response may find the object that the first attempt wrote, and return False: compare the content where that
        matters.
        """
        size = len(data)
        return self._do(url, "writing", lambda backend, path: backend.write(path, size, lambda a, b: data[a:b], create))

    def write_parts(self, url: str, size: int, part: PartReader, create: bool = False) -> bool:
        """Do as `write` with `size` bytes, read as ranges from `part(start, stop)`.

        S3 uploads several parts at once, retries each on its own, and holds only those in memory. An exception of
        `part` ends the upload, and nothing is written.
        """
        return self._do(url, "writing", lambda backend, path: backend.write(path, size, part, create))

    def upload(self, local_path: str | os.PathLike[str], url: str) -> None:
        """Copy a local file to `url` atomically."""
        local = os.fspath(local_path)
        self._do(url, "uploading to", lambda backend, path: backend.upload(local, path))

    def abort_uploads(self, url: str, match: Callable[[str], bool] = lambda name: True) -> int:
        """Abort incomplete multipart uploads in a folder, and return their number. Only S3 keeps such uploads.

        Only objects whose name relative to the folder satisfies `match` are affected. An upload in progress fails.
        """
        return self._do(url, "aborting uploads", lambda backend, path: backend.abort_uploads(path, match))

    def delete(self, url: str) -> None:
        """Delete an object, or a folder with its contents, if it exists."""
        self._do(url, "deleting", lambda backend, path: backend.delete(path))

    def _do(self, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        backend, path = self._backend(url)
        try:
            return call(backend, path) if backend.retries else self._policy(url, lambda: call(backend, path))
        except Exception as error:
            failure = explain(url, action, error, self.config.endpoint_url)
            if failure is None:
                raise  # a bug, or an error that already has a message for the user
            raise failure from error

    def _backend(self, url: str) -> tuple[Backend, str]:
        """Return the backend of a URL, made on first use in this process, and the path there."""
        protocol, path = parse(url)
        if self._process != os.getpid():  # forked: a thread that does not exist here may hold the lock
            Storage.__init__(self, self.config)
        with self._lock:
            if protocol not in self._backends:
                if protocol == "s3":
                    from pipeline.data.storage.s3 import S3Backend  # botocore, which a local run does not need

                    self._backends[protocol] = S3Backend(self.config, self._policy)
                else:
                    self._backends[protocol] = LocalBackend() if protocol == "file" else FsspecBackend(protocol)
            return self._backends[protocol], path


class _RemoteStream(io.RawIOBase):
    """Forward stream over ranged reads of one version of an object."""

    def __init__(self, storage: Storage, url: str):
        self._storage, self._url, self._info = storage, url, storage.info(url)
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._info.size)
        data = self._storage.read_range(self._url, self._position, stop, self._info.etag)
        self._position = stop  # after the read: a read that follows an error must skip no bytes
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:  # the base class would read 8 KiB at a time
        data = self._storage.read_range(self._url, self._position, self._info.size, self._info.etag)
        self._position = self._info.size
        return data


def join(url: str, *parts: str) -> str:
    """Return the URL of an entry inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """Return the folder of a URL and the name in it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


def in_parallel(call: Callable[[str], T], names: Iterable[str], url: str) -> Iterator[tuple[str, T]]:
    """Yield (name, result) of each call in order of completion, from a thread pool sized for the storage of `url`.

    The first error is raised, and no further call is started.
    """
    # Local calls do not wait: more threads than cores would only contend.
    threads = os.cpu_count() or 1 if is_local(url) else _REMOTE_CALLS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="parallel")
    try:
        calls = {pool.submit(call, name): name for name in names}
        for done in as_completed(calls):
            yield calls.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
