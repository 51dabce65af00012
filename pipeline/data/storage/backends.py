"""Storage backends for the local file system, and for any other store through fsspec.

A backend offers the operations of `LocalBackend` with the store's own paths, and raises the failures of
`storage.retry`. If `retries` is set, it retries each of its requests, so that `Storage` need not repeat the operation.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config.durable import atomic_write, is_temporary
from pipeline.config.errors import StorageError
from pipeline.data.storage.retry import ObjectTooShort, PermanentError, PreconditionFailed, TransientError

_COPY_BYTES = 16 * 2**20
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a tag that changes with the content: the ETag, or a local file's time and size."""

    size: int
    etag: str | None


# Returns the bytes [start, stop) of the data to write. Any thread may call it, and more than once for a range.
PartReader = Callable[[int, int], bytes]


def open_file(path: str) -> BinaryIO:
    """Open a file for reading. A pipe is refused unless the shell made it (`<(…)`), because opening it would block."""
    if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")):
        raise PermanentError("it is a pipe, not a file", "Pass the path of a file.")
    return open(path, "rb")


def read_at(descriptor: int, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of an open file. Raises EOFError if it has become shorter."""
    pieces = []
    while start < stop:  # one call returns at most 2 GiB
        if not (piece := os.pread(descriptor, min(stop - start, _COPY_BYTES), start)):
            raise EOFError(f"the file that is uploaded became shorter: {start} bytes are left")
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


class LocalBackend:
    """Local file system. Files are replaced atomically, so that readers never see a partial file."""

    retries = False

    def read(self, path: str, start: int, stop: int | None, etag: str | None) -> bytes:
        """Return the bytes [start, stop) of the version `etag` (None: any), or an error instead of fewer.

        With `stop` None, return the whole object.
        """
        with open_file(path) as file:
            info = _stat_info(os.fstat(file.fileno()))
            if etag is not None and info.etag != etag:
                raise PreconditionFailed()
            if stop is None:
                return file.read()
            if not file.seekable():
                raise PermanentError("it is a pipe, which has no ranges", "Pass the path of a file.")
            file.seek(start)
            data = file.read(stop - start)
            if len(data) < stop - start:
                raise ObjectTooShort(info.size, start, stop)
            return data

    def info(self, path: str) -> ObjectInfo:
        """Return size and tag of an object; raise FileNotFoundError or IsADirectoryError for anything else."""
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        return _stat_info(os.stat(path))

    def exists(self, path: str) -> bool:
        """Return True for an object and for a folder."""
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
            return True
        return False

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        """Return the objects directly in a folder, and its folders (None), by name; {} if it does not exist."""
        entries: dict[str, ObjectInfo | None] = {}
        with suppress(FileNotFoundError), os.scandir(path) as items:
            for item in items:
                if not is_temporary(item.name):
                    with suppress(FileNotFoundError):  # deleted since the listing, or a broken link
                        entries[item.name] = None if item.is_dir() else _stat_info(item.stat())
        return entries

    def write(self, path: str, size: int, part: PartReader, create: bool = False) -> bool:
        """Write an object from `part`. With `create`, write nothing and return False if it exists."""

        def link(temporary: str, path: str) -> None:
            """Rename `temporary` to `path`. Raise FileExistsError if `path` exists."""
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.lexists(path):  # not atomic on a file system without hard links
                    raise FileExistsError(errno.EEXIST, "exists already", path) from error
                os.replace(temporary, path)
            else:
                os.unlink(temporary)

        try:
            with atomic_write(path, link if create else None) as file:
                for start in range(0, size, _COPY_BYTES):
                    file.write(part(start, min(start + _COPY_BYTES, size)))
        except FileExistsError:
            if not create:
                raise
            return False
        return True

    def upload(self, local: str, path: str) -> None:
        """Copy a file of this machine to an object."""
        with open(local, "rb") as file:
            self.write(path, os.fstat(file.fileno()).st_size, partial(read_at, file.fileno()))

    def abort_uploads(self, path: str, match: Callable[[str], bool]) -> int:
        """Abort the unfinished uploads of objects in a folder whose name there satisfies `match`; return the number."""
        return 0  # partial files are in the folder itself

    def delete(self, path: str) -> None:
        """Delete an object, or a folder with all that it contains, if it exists."""
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def _stat_info(status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


class FsspecBackend:
    """Any store that fsspec supports (gs://, az://, hf://, memory://, …). Paths are whole URLs.

    Raises StorageError if no file system of the protocol is installed.
    """

    retries = False

    def __init__(self, protocol: str):
        import fsspec  # a local run does not need it

        try:
            self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
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
                raise ObjectTooShort(size, start, stop)
            raise TransientError(f"{len(data)} bytes arrived for bytes {start} to {stop}")
        if etag is not None and self.info(path).etag != etag:  # fsspec has no conditional reads
            raise PreconditionFailed()
        return data

    def info(self, path: str) -> ObjectInfo:
        info = self._call(self._fs.info, path)
        if info["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file")
        if not isinstance(info.get("size"), int):
            raise PermanentError("the store does not report the object's size", "Copy it to a local folder or s3://.")
        return ObjectInfo(info["size"], info.get("etag") or info.get("ETag"))

    def exists(self, path: str) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            self._call(self._fs.info, path)
            return True
        return self._call(self._fs.isdir, path)

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        items: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            items = self._call(self._fs.ls, path, detail=True)
        entries: dict[str, ObjectInfo | None] = {}
        for item in items:
            name = item["name"].rstrip("/").rpartition("/")[2]
            if item["type"] == "directory":
                entries[name] = None
            elif isinstance(item.get("size"), int):
                entries[name] = ObjectInfo(item["size"], item.get("etag") or item.get("ETag"))
            else:  # listings of web servers have no sizes
                entries[name] = self.info(item["name"])
        return entries

    def write(self, path: str, size: int, part: PartReader, create: bool = False) -> bool:
        if create and self._call(self._fs.exists, path):  # not atomic: fsspec has no conditional writes
            return False
        # In one piece: fsspec cannot abort an upload of which a part failed.
        self._call(self._fs.pipe_file, path, part(0, size))
        return True

    def upload(self, local: str, path: str) -> None:
        self._call(self._fs.put_file, local, path)  # in constant memory, which `write` cannot do

    def abort_uploads(self, path: str, match: Callable[[str], bool]) -> int:
        return 0  # fsspec does not list them

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
            raise PermanentError("stores of this kind do not offer that", "Use a local path or s3://.") from error
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            is_permanent = isinstance(error, (ValueError, LookupError, AttributeError)) or (
                isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
            )
            raise (PermanentError if is_permanent else TransientError)(message) from error
