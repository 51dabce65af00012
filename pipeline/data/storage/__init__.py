"""Files by URL in local folders, S3-compatible stores (`s3.py`), Hugging Face's hub (`hub.py`) and stores of fsspec.

Transient errors are retried with exponential backoff, full jitter and a timeout (`retry.py`); an interrupted read
resumes at the byte where it broke off. Missing objects and denied access fail at once. Every failure is a StorageError
that names the URL and the remedy.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.config.durable import TEMPORARY, atomic_write
from pipeline.config.errors import StorageError
from pipeline.config.schema import StorageConfig
from pipeline.config.urls import is_local, parse
from pipeline.data.storage import retry
from pipeline.data.storage.retry import NoSpace as NoSpace
from pipeline.data.storage.retry import NotFound as NotFound
from pipeline.data.storage.retry import ObjectChanged as ObjectChanged

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # (calls done, total, name of the last)
# Returns the bytes [start, stop) of the data to write. Any thread may call it, and more than once for a range.
PartReader = Callable[[int, int], bytes]
_PIECE_BYTES = 16 * 2**20  # read or written at once
_REMOTE_CALLS = 16  # in flight


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a tag that changes with the content: the ETag, or a local file's time and size."""

    size: int
    etag: str | None


class Storage:
    """Access to every URL of a run. Picklable; each process opens its connections on first use, also after a fork.
    Every method may raise StorageError (NotFound, ObjectChanged and NoSpace are subclasses), after retrying transient
    failures for `storage.retry_timeout_seconds`, and ConfigError for a malformed URL.
    """

    def __init__(self, config: StorageConfig = StorageConfig()):
        self.config = config
        self._lock = threading.Lock()
        self._backends: dict[str, Backend] = {}
        self._policy = retry.RetryPolicy(config.retry_timeout_seconds)
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    def within(self, seconds: float) -> Storage:
        """Return access of the same configuration whose retries end after at most `seconds`."""
        shorter = min(seconds, self.config.retry_timeout_seconds)
        return Storage(self.config.model_copy(update={"retry_timeout_seconds": shorter}))

    def read(self, url: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        """Return exactly the bytes [start, stop), or the whole object. Raise ObjectChanged if `etag` is not its own."""
        if stop is not None and stop <= start:
            return b""
        return self._do(url, "reading", lambda backend, path: backend.read(path, start, stop, etag))

    def open(self, url: str) -> BinaryIO:
        """Open the object as a stream that is read in large pieces, can be sought, and fails if the object changes."""
        if is_local(url):
            return self._do(url, "opening", lambda _, local: _open(local))
        return io.BufferedReader(_RemoteStream(self, url, self.info(url)), _PIECE_BYTES)

    def info(self, url: str) -> ObjectInfo:
        """Return size and tag of an object. Raise NotFound if it does not exist."""
        return self._do(url, "checking", lambda backend, path: backend.info(path))

    def exists(self, url: str) -> bool:
        """Return True for an object and for a non-empty folder."""
        return self._do(url, "checking for", lambda backend, path: backend.exists(path))

    def list(self, url: str) -> list[str]:
        """Return the sorted names of the objects and folders directly in a folder; [] if it does not exist."""
        return [*self.entries(url)]

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        """Return name and info of every object directly in a folder, from one listing."""
        return {name: info for name, info in self.entries(url).items() if info is not None}

    def entries(self, url: str) -> dict[str, ObjectInfo | None]:
        """Return the objects directly in a folder with their infos, and its folders with None, sorted by name."""
        entries = self._do(url, "listing", lambda backend, path: dict(backend.entries(path)))
        return {name: entries[name] for name in sorted(entries)}

    def write(self, url: str, data: bytes, create: bool = False) -> bool:
        """Write an object atomically; return True if it was written. With `create` an existing one is kept, and one of
        several concurrent calls succeeds (not by fsspec). A retry after a lost response may find the first attempt's
        object, and return False: compare the content.
        """
        return self.write_parts(url, len(data), lambda start, stop: data[start:stop], create)

    def write_parts(self, url: str, size: int, part: PartReader, create: bool = False) -> bool:
        """Do as `write` with `size` bytes, read as ranges from `part`, which S3 uploads and retries one by one."""
        return self._do(url, "writing", lambda backend, path: backend.write(path, size, part, create))

    def upload(self, local_path: str | os.PathLike[str], url: str) -> None:
        """Copy a local file to `url` atomically."""
        local = os.fspath(local_path)
        self._do(url, "uploading to", lambda backend, path: backend.upload(local, path))

    def abort_uploads(self, url: str, match: Callable[[str], bool] = lambda name: True) -> int:
        """Abort a folder's incomplete uploads (S3) of relative names that satisfy `match`; return their number."""
        action = "aborting uploads"
        return self._do(url, action, lambda store, path: store.abort_uploads(path, match) if store.abort_uploads else 0)

    def delete(self, url: str) -> None:
        """Delete an object, or a folder with its contents, if it exists."""
        self._do(url, "deleting", lambda backend, path: backend.delete(path))

    def _do(self, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        """Call an operation of the URL's backend, which is made on first use in this process."""
        protocol, path = parse(url)
        if self._process != os.getpid():  # forked: a thread that does not exist here may hold the lock
            Storage.__init__(self, self.config)
        with self._lock:
            if protocol not in self._backends:
                if protocol == "s3":
                    from pipeline.data.storage import s3  # imports botocore, which a local run does not need

                    self._backends[protocol] = s3.S3Backend(s3.make_client(self.config), self._policy)
                elif protocol == "hf":
                    from pipeline.data.storage import hub  # imports huggingface_hub, like botocore only if needed

                    self._backends[protocol] = hub.HubBackend(self._policy)
                else:
                    self._backends[protocol] = LocalBackend() if protocol == "file" else FsspecBackend(protocol)
            backend = self._backends[protocol]
        try:
            return call(backend, path) if backend.retries else self._policy(url, lambda: call(backend, path))
        except Exception as error:
            failure = retry.explain(url, action, error, self.config.endpoint_url)
            if failure is None:
                raise  # a bug, or an error that already has a message for the user
            raise failure from error


@dataclass(eq=False)
class _RemoteStream(io.RawIOBase):
    """Stream over ranged reads of one version of an object."""

    storage: Storage
    url: str
    info: ObjectInfo
    position: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.info.size}[whence]
        )
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.info.size)
        data = self.storage.read(self.url, self.position, stop, self.info.etag)
        self.position = stop  # after the read: a read that follows an error must skip no bytes
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:  # the base class would read 8 KiB at a time
        data = self.storage.read(self.url, self.position, self.info.size, self.info.etag)
        self.position = self.info.size
        return data


def join(url: str, *parts: str) -> str:
    """Return the URL of an entry inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """Return the folder of a URL and the name in it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


def in_parallel(call: Callable[[str], T], names: Iterable[str], url: str) -> Iterator[tuple[str, T]]:
    """Yield (name, result) of each call in order of completion; after the first error no further call is started."""
    # Local calls do not wait: more threads than cores would only contend.
    threads = os.cpu_count() or 1 if is_local(url) else _REMOTE_CALLS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="parallel")
    try:
        calls = {pool.submit(call, name): name for name in names}
        for done in as_completed(calls):
            yield calls.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Backend:
    """Operations on a store with the store's own paths, which raise the failures of `storage.retry`."""

    retries = False  # True if each request is retried, so that `Storage` need not repeat the operation
    # (path, start, stop, etag) -> the bytes [start, stop) (stop None: the whole object) of the version `etag` (None:
    # any), or an error instead of fewer bytes.
    read: Callable[[str, int, int | None, str | None], bytes]
    info: Callable[[str], ObjectInfo]  # FileNotFoundError or IsADirectoryError for anything but an object
    # The objects directly in a folder and its folders (None), by name; none if it does not exist.
    entries: Callable[[str], Iterator[tuple[str, ObjectInfo | None]]]
    # (path, size, part, create) -> True; with `create`, write nothing and return False if the object exists.
    write: Callable[[str, int, PartReader, bool], bool]
    delete: Callable[[str], None]  # an object, or a folder with all that it contains, if it exists
    # Abort a folder's unfinished uploads. None: local partial files are in the folder itself, and fsspec lists none.
    abort_uploads: Callable[[str, Callable[[str], bool]], int] | None = None

    def exists(self, path: str) -> bool:
        """Return True for an object and for a non-empty folder."""
        with suppress(FileNotFoundError, NotADirectoryError):
            with suppress(IsADirectoryError, retry.UnknownSize):
                self.info(path)
            return True
        with suppress(NotADirectoryError):  # a local path below a file
            return next(self.entries(path), None) is not None
        return False

    def upload(self, local: str, path: str) -> None:
        """Copy a file of this machine to an object."""
        with open(local, "rb") as file:

            def part(start: int, stop: int) -> bytes:
                pieces = []
                while start < stop:  # one call returns at most 2 GiB
                    if not (piece := os.pread(file.fileno(), min(stop - start, _PIECE_BYTES), start)):
                        raise EOFError(f"the file that is uploaded became shorter: {start} bytes are left")
                    pieces.append(piece)
                    start += len(piece)
                return b"".join(pieces)

            self.write(path, os.fstat(file.fileno()).st_size, part, False)


class LocalBackend(Backend):
    """Local file system. Files are replaced atomically, so that readers never see a partial file."""

    def read(self, path: str, start: int, stop: int | None, etag: str | None) -> bytes:
        with _open(path) as file:
            info = self.info(file.fileno())
            if etag is not None and info.etag != etag:
                raise retry.PreconditionFailed()
            if stop is None:
                return file.read()
            if not file.seekable():
                raise retry.PermanentError("it is a pipe, which has no ranges", "Pass the path of a file.")
            file.seek(start)
            data = file.read(stop - start)
            if len(data) < stop - start:
                raise EOFError(retry.TOO_SHORT.format(info.size, start, stop))
            return data

    def info(self, path: str | int) -> ObjectInfo:
        if stat.S_ISDIR((status := os.stat(path)).st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        return ObjectInfo(status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")

    def entries(self, path: str) -> Iterator[tuple[str, ObjectInfo | None]]:
        with suppress(FileNotFoundError), os.scandir(path) as items:
            for item in items:
                if not TEMPORARY.fullmatch(item.name):
                    with suppress(FileNotFoundError):  # deleted since the listing, or a broken link
                        yield item.name, None if item.is_dir() else self.info(item.path)

    def write(self, path: str, size: int, part: PartReader, create: bool) -> bool:
        try:
            with atomic_write(path, create) as file:
                for start in range(0, size, _PIECE_BYTES):
                    file.write(part(start, min(start + _PIECE_BYTES, size)))
        except FileExistsError:
            if not create:
                raise
            return False
        return True

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def _open(path: str) -> BinaryIO:
    """Open a file for reading. A pipe is refused unless the shell made it (`<(…)`), because opening it would block."""
    if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")):
        raise retry.PermanentError("it is a pipe, not a file", "Pass the path of a file.")
    return open(path, "rb")


class FsspecBackend(Backend):
    """Any store that fsspec supports (gs://, az://, memory://, …). Paths are whole URLs."""

    def __init__(self, protocol: str, **options: Any):
        import fsspec  # a local run does not need it

        try:
            self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
        except Exception as error:  # packages raise anything when their settings or libraries are missing
            raise StorageError(
                f"{protocol}:// cannot be reached from here: {' '.join(str(error).split())}. "
                f"Install the fsspec package for '{protocol}' and its dependencies, or use a local path or s3://."
            ) from error

    def read(self, path: str, start: int, stop: int | None, etag: str | None) -> bytes:
        if stop is None:
            return self._call(self._fs.cat_file, path)
        data: bytes = self._call(self._fs.cat_file, path, start=start, end=stop)
        if len(data) != stop - start:
            if (size := self.info(path).size) < stop:
                raise EOFError(retry.TOO_SHORT.format(size, start, stop))
            if len(data) > stop - start:
                reason = f"the server sent {len(data)} bytes for bytes {start} to {stop}: it does not support ranges"
                raise retry.PermanentError(reason, "Download the object, and give its local path.")
            raise retry.TransientError(f"{len(data)} bytes arrived for bytes {start} to {stop}")
        if etag is not None and self.info(path).etag != etag:  # fsspec has no conditional reads
            raise retry.PreconditionFailed()
        return data

    def info(self, path: str) -> ObjectInfo:
        info = self._call(self._fs.info, path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        if not isinstance(info.get("size"), int):
            raise retry.UnknownSize(
                "the store does not report the object's size", "Copy it to a local folder or s3://."
            )
        return ObjectInfo(info["size"], info.get("etag") or info.get("ETag"))

    def entries(self, path: str) -> Iterator[tuple[str, ObjectInfo | None]]:
        items: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            items = self._call(self._fs.ls, path, detail=True)
        for item in items:
            info = None
            if item["type"] != "directory":
                etag = item.get("etag") or item.get("ETag")
                is_sized = isinstance(item.get("size"), int)  # in listings of web servers it is not
                info = ObjectInfo(item["size"], etag) if is_sized else self.info(item["name"])
            yield item["name"].rstrip("/").rpartition("/")[2], info

    def write(self, path: str, size: int, part: PartReader, create: bool) -> bool:
        if create and self._call(self._fs.exists, path):  # not atomic: fsspec has no conditional writes
            return False
        # In one piece: fsspec cannot abort an upload of which a part failed.
        self._call(self._fs.pipe_file, path, part(0, size))
        return True

    def upload(self, local: str, path: str) -> None:
        self._call(self._fs.put_file, local, path)  # in constant memory, which `write` cannot do

    def delete(self, path: str) -> None:
        if self._call(self._fs.exists, path):
            self._call(self._fs.rm, path, recursive=True)

    def _call(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call an operation of the file system; turn its exceptions into those of `storage.retry`."""
        try:
            return operation(*arguments, **options)
        except (OSError, TypeError, AssertionError):
            raise  # a standard error already, or a bug
        except NotImplementedError as error:
            raise retry.PermanentError("stores of this kind do not offer that", "Use a local path or s3://.") from error
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            is_permanent = isinstance(error, (ValueError, LookupError, AttributeError)) or (
                isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
            )
            raise (retry.PermanentError if is_permanent else retry.TransientError)(message) from error
