"""What `Storage` asks of a store, and what it is told about an object."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from pipeline.config.durable import atomic_write, is_temporary
from pipeline.config.errors import StorageError
from pipeline.data.storage.errors import ObjectTooShort, PermanentError, PreconditionFailed, TransientError
from pipeline.data.storage.retry import RangeResponse, RetryPolicy, ranged_get


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a tag that changes with the content (ETag; for local files time and size)."""

    size: int
    etag: str | None


PartReader = Callable[[int, int], bytes]


class Backend(Protocol):
    """Operations on one kind of store; paths are its own. Failures are raised as `faults` names them."""

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes: ...  # all of it, or an error
    def info(self, path: str) -> ObjectInfo: ...
    def is_folder(self, path: str) -> bool: ...
    def entries(self, path: str) -> dict[str, ObjectInfo | None]: ...  # folders: None
    def write(self, path: str, data: bytes) -> None: ...
    def write_parts(self, path: str, size: int, part: PartReader) -> None: ...
    def create_parts(self, path: str, size: int, part: PartReader) -> None: ...  # or FileExistsError
    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int: ...  # of names relative to the folder
    def upload(self, local: str, path: str) -> None: ...
    def delete(self, path: str) -> None: ...


_COPY = 16 * 2**20
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def open_file(path: str) -> BinaryIO:
    """Open a file to read it; a pipe only where the shell made it (`<(…)`), since any other would be waited for."""
    if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")):
        raise _is_pipe()
    return open(path, "rb")


def _is_pipe() -> PermanentError:
    return PermanentError("it is a pipe, not a file", "Give the path of a file.")


class LocalBackend:
    """Paths as the operating system takes them."""

    def read(self, path: str) -> bytes:
        with open_file(path) as file:
            return file.read()

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        try:
            found = os.fstat(descriptor)
            if stat.S_ISFIFO(found.st_mode):
                raise _is_pipe()
            info = _info(found)
            if etag is not None and info.etag != etag:
                raise PreconditionFailed()
            pieces, at = [], start
            while at < stop:
                piece = os.pread(descriptor, stop - at, at)
                if not piece:
                    raise ObjectTooShort(info.size, start, stop)
                pieces.append(piece)
                at += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def info(self, path: str) -> ObjectInfo:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        return _info(os.stat(path))

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        try:
            found = os.scandir(path)
        except FileNotFoundError:
            return {}
        entries: dict[str, ObjectInfo | None] = {}
        with found:
            for entry in found:
                if not is_temporary(entry.name):
                    with suppress(FileNotFoundError):  # deleted meanwhile, or a link to nothing
                        entries[entry.name] = None if entry.is_dir() else _info(entry.stat())
        return entries

    def write(self, path: str, data: bytes) -> None:
        with atomic_write(path) as file:
            file.write(data)

    def write_parts(self, path: str, size: int, part: PartReader) -> None:
        with atomic_write(path) as file:
            for start in range(0, size, _COPY):
                file.write(part(start, min(start + _COPY, size)))

    def create_parts(self, path: str, size: int, part: PartReader) -> None:
        with atomic_write(path, _link) as file:
            for start in range(0, size, _COPY):
                file.write(part(start, min(start + _COPY, size)))

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        return 0  # what was begun lies in its folder, and goes with it

    def upload(self, local: str, path: str) -> None:
        with open(local, "rb") as source, atomic_write(path) as target:
            shutil.copyfileobj(source, target, _COPY)

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def _link(temporary: str, path: str) -> None:
    """Give the file its name, and raise FileExistsError where another has it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):  # two steps, where the file system has no hard links
            raise FileExistsError(errno.EEXIST, "exists already", path) from error
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _info(found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


T = TypeVar("T")


class FsspecBackend:
    """Paths are whole URLs. Raises StorageError when no file system of that protocol is installed."""

    def __init__(self, protocol: str, retry: RetryPolicy):
        try:
            import fsspec

            self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
        except Exception as error:  # whatever a package says whose settings or libraries are not there
            raise StorageError(
                f"{protocol}:// cannot be reached from here: {' '.join(str(error).split())}. "
                f"Install the fsspec package for '{protocol}' and what it needs, or use a local path or s3://."
            ) from error
        self._retry = retry

    def read(self, path: str) -> bytes:
        return self._call(lambda: self._fs.cat_file(path))

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        def ask(at: int, stop: int | None, tag: str | None) -> RangeResponse:
            assert stop is not None
            data = self._call(lambda: self._fs.cat_file(path, start=at, end=stop))
            if len(data) < stop - at and (size := self.info(path).size) < stop:
                raise ObjectTooShort(size, start, stop)
            return RangeResponse(stop, tag, _once(data))

        data = ranged_get(ask, path, start, stop, etag, self._retry)
        if etag is not None and self.info(path).etag != etag:  # fsspec knows no If-Match
            raise PreconditionFailed()
        return data

    def info(self, path: str) -> ObjectInfo:
        found = self._call(lambda: self._fs.info(path))
        if found["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file")
        if not isinstance(found.get("size"), int):
            raise PermanentError("the store does not tell the object's size", "Copy it to a local folder or s3://.")
        return self._info(found)

    def is_folder(self, path: str) -> bool:
        return self._call(lambda: self._fs.isdir(path))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        try:
            found = self._call(lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        named = {item["name"].rstrip("/").rpartition("/")[2]: item for item in found}
        return {name: None if item["type"] == "directory" else self._info(item) for name, item in named.items()}

    def write(self, path: str, data: bytes) -> None:
        self._call(lambda: self._fs.pipe_file(path, data))

    def write_parts(self, path: str, size: int, part: PartReader) -> None:
        self.write(path, part(0, size))  # whole: fsspec knows no upload in parts that is given up when one fails

    def create_parts(self, path: str, size: int, part: PartReader) -> None:
        if self._call(lambda: self._fs.exists(path)):  # two steps: fsspec knows no condition
            raise FileExistsError(errno.EEXIST, "exists already", path)
        self.write_parts(path, size, part)

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        return 0  # fsspec lists none

    def upload(self, local: str, path: str) -> None:
        self._call(lambda: self._fs.put_file(local, path))

    def delete(self, path: str) -> None:
        if self._call(lambda: self._fs.exists(path)):
            self._call(lambda: self._fs.rm(path, recursive=True))

    def _info(self, found: dict[str, Any]) -> ObjectInfo:
        if not isinstance(found.get("size"), int):  # web servers' listings have none
            return self.info(found["name"])
        return ObjectInfo(found["size"], found.get("etag") or found.get("ETag"))

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (OSError, TypeError, AssertionError):
            raise  # said plainly already, or a programmer's error
        except NotImplementedError as error:
            raise PermanentError("stores of this kind do not offer that", "Use a local path or s3://.") from error
        except Exception as error:
            named = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, (ValueError, LookupError, AttributeError)):
                raise PermanentError(named) from error
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            lasts = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
            raise (PermanentError if lasts else TransientError)(named) from error


def _once(data: bytes) -> Generator[bytes, None, None]:
    yield data
