"""`Storage`: every URL of a run by one small interface, each failure told by name."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from pipeline.config.durable import atomic_write
from pipeline.config.schema import StorageConfig
from pipeline.config.urls import is_local, parse
from pipeline.data.storage.backends import Backend, LocalBackend, ObjectInfo, PartReader, open_file
from pipeline.data.storage.errors import AlreadyExists, explain
from pipeline.data.storage.retry import PIECE, RetryPolicy

T = TypeVar("T")


class Storage:
    """Access to every URL of a run. Picklable; each process makes its connections on first use, also after a fork.

    Every call may raise StorageError (NotFound and ObjectChanged are two), and ConfigError for a URL that is refused.
    """

    def __init__(self, config: StorageConfig = StorageConfig()):
        self.config = config
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def read(self, url: str) -> bytes:
        """The whole object."""
        return self._do(url, "reading", lambda backend, path: backend.read(path))

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """Exactly the bytes [start, stop). With `etag`, ObjectChanged when the object is no longer that one."""
        if stop <= start:
            return b""
        return self._do(url, "reading", lambda backend, path: backend.read_range(path, start, stop, etag))

    def open(self, url: str) -> BinaryIO:
        """The object as a stream, read forward in large pieces; it fails if the object changes meanwhile."""
        if is_local(url):
            return self._do(url, "opening", lambda _, local: open_file(local))
        return io.BufferedReader(_RemoteStream(self, url, self.info(url)), PIECE)

    def info(self, url: str) -> ObjectInfo:
        """Raises NotFound when the object is absent."""
        return self._do(url, "looking at", lambda backend, path: backend.info(path))

    def exists(self, url: str) -> bool:
        """True for an object and for a folder that holds something."""
        return self._do(url, "looking for", _exists)

    def list(self, url: str) -> list[str]:
        """Names of the objects and folders directly in the folder, sorted; [] when it is absent."""
        return sorted(self._do(url, "listing", lambda backend, path: backend.entries(path)))

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        """Name and info of every object directly in the folder, by one listing."""
        entries = self._do(url, "listing", lambda backend, path: backend.entries(path))
        return {name: info for name, info in sorted(entries.items()) if info is not None}

    def write(self, url: str, data: bytes) -> None:
        """Readers see the old object or the whole new one."""
        self._do(url, "writing", lambda backend, path: backend.write(path, data))

    def write_parts(self, url: str, size: int, part: PartReader) -> None:
        """Writes `size` bytes that `part(start, stop)` gives out by ranges: whole or not at all, as `write` does.

        In S3 several parts travel at once, each tried again on its own; memory holds only those. What `part` raises
        ends the writing, and leaves nothing.
        """
        self._do(url, "writing", lambda backend, path: backend.write_parts(path, size, part))

    def create(self, url: str, data: bytes) -> bool:
        """Write an object that is not there yet; return False, and change nothing, where there is one.

        Of several that create one object, one succeeds: in one step in folders and in S3, by a look before the write in
        other stores and in an S3 that knows no conditional writes. After a fault the call is tried again, and may then
        find the object that it wrote itself: compare the content where that matters.
        """
        return self.create_parts(url, len(data), lambda start, stop: data[start:stop])

    def create_parts(self, url: str, size: int, part: PartReader) -> bool:
        """As `create`, of `size` bytes that `part(start, stop)` gives out by ranges (see `write_parts`)."""
        try:
            self._do(url, "writing", lambda backend, path: backend.create_parts(path, size, part))
        except AlreadyExists:
            return False
        return True

    def abandon_uploads(self, url: str, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Remove the parts that unfinished uploads to objects in the folder left behind; return the number of uploads.

        Only of objects whose names, relative to the folder, are `chosen`. Those still under way fail. Only S3 keeps
        such parts.
        """
        return self._do(url, "removing unfinished uploads", lambda backend, path: backend.abandon_uploads(path, chosen))

    def upload(self, local_path: str | os.PathLike[str], url: str) -> None:
        """Copies a local file to `url`, whole or not at all."""
        self._do(url, "uploading to", lambda backend, path: backend.upload(os.fspath(local_path), path))

    def download(self, url: str, local_path: str | os.PathLike[str]) -> None:
        """Copies an object to a local file, whole or not at all."""
        with self.open(url) as source, atomic_write(os.fspath(local_path)) as target:
            shutil.copyfileobj(source, target, PIECE)

    def delete(self, url: str) -> None:
        """Removes an object, or a folder with all it holds. Absent is fine."""
        self._do(url, "deleting", lambda backend, path: backend.delete(path))

    def _do(self, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        backend, path = self._backend(url)
        try:
            return self._retry(url, lambda: call(backend, path))
        except Exception as error:
            failure = explain(url, action, error, self.config.endpoint_url)
            if failure is None:
                raise  # a programmer's error, or one that says all: neither the user's nor the store's
            raise failure from error

    def _backend(self, url: str) -> tuple[Backend, str]:
        protocol, path = parse(url)
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            if protocol not in self._backends:
                self._backends[protocol] = _make_backend(protocol, self.config, self._retry)
            return self._backends[protocol], path

    def _forget(self) -> None:
        """Connections are of one process; a lock that another thread held at a fork is never released here."""
        self._lock = threading.Lock()
        self._backends: dict[str, Backend] = {}
        self._retry = RetryPolicy(self.config.deadline_seconds)
        self._process = os.getpid()


class _RemoteStream(io.RawIOBase):
    """An object read forward by ranges, all of one version."""

    def __init__(self, storage: Storage, url: str, info: ObjectInfo):
        self._storage, self._url, self._info = storage, url, info
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(min(self._at + len(buffer), self._info.size))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._info.size)  # io's own would ask for 8 KiB at a time

    def _next(self, stop: int) -> bytes:
        data = self._storage.read_range(self._url, self._at, stop, self._info.etag)
        self._at = stop
        return data


def _make_backend(protocol: str, config: StorageConfig, retry: RetryPolicy) -> Backend:
    # A local run imports no client of any store.
    if protocol == "file":
        return LocalBackend()
    if protocol == "s3":
        from pipeline.data.storage.s3 import S3Backend

        return S3Backend(config, retry)
    from pipeline.data.storage.backends import FsspecBackend

    return FsspecBackend(protocol, retry)


def _exists(backend: Backend, path: str) -> bool:
    try:
        backend.info(path)
        return True
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return backend.is_folder(path)


def join(url: str, *parts: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """The folder of a URL and the name inside it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name
