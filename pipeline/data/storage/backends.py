"""Storage backends for the local file system, and for any other store through fsspec."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config.durable import TEMPORARY, atomic_write
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


class Backend:
    """Operations on a store with the store's own paths, which raise the failures of `storage.retry`."""

    retries = False  # True if each request is retried, so that `Storage` need not repeat the operation
    # (path, start, stop, etag) -> the bytes [start, stop) (stop None: the whole object) of the version `etag` (None:
    # any), or an error instead of fewer bytes.
    read: Callable[[str, int, int | None, str | None], bytes]
    exists: Callable[[str], bool]  # an object or a folder
    info: Callable[[str], ObjectInfo]  # FileNotFoundError or IsADirectoryError for anything but an object
    # The objects directly in a folder and its folders (None), by name; none if it does not exist.
    entries: Callable[[str], Iterator[tuple[str, ObjectInfo | None]]]
    # (path, size, part, create) -> True; with `create`, write nothing and return False if the object exists.
    write: Callable[[str, int, PartReader, bool], bool]
    delete: Callable[[str], None]  # an object, or a folder with all that it contains, if it exists

    def upload(self, local: str, path: str) -> None:
        """Copy a file of this machine to an object."""
        with open(local, "rb") as file:

            def part(start: int, stop: int) -> bytes:
                pieces = []
                while start < stop:  # one call returns at most 2 GiB
                    if not (piece := os.pread(file.fileno(), min(stop - start, _COPY_BYTES), start)):
                        raise EOFError(f"the file that is uploaded became shorter: {start} bytes are left")
                    pieces.append(piece)
                    start += len(piece)
                return b"".join(pieces)

            self.write(path, os.fstat(file.fileno()).st_size, part, False)

    def abort_uploads(self, path: str, match: Callable[[str], bool]) -> int:
        """Abort the unfinished uploads of objects in a folder whose name there satisfies `match`; return the number."""
        return 0  # local partial files are in the folder itself, and fsspec lists no uploads


class LocalBackend(Backend):
    """Local file system. Files are replaced atomically, so that readers never see a partial file."""

    def read(self, path: str, start: int, stop: int | None, etag: str | None) -> bytes:
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

    def exists(self, path: str) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
            return True
        return False

    def info(self, path: str) -> ObjectInfo:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        return _stat_info(status)

    def entries(self, path: str) -> Iterator[tuple[str, ObjectInfo | None]]:
        with suppress(FileNotFoundError), os.scandir(path) as items:
            for item in items:
                if not TEMPORARY.fullmatch(item.name):
                    with suppress(FileNotFoundError):  # deleted since the listing, or a broken link
                        yield item.name, None if item.is_dir() else _stat_info(item.stat())

    def write(self, path: str, size: int, part: PartReader, create: bool) -> bool:
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

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def open_file(path: str) -> BinaryIO:
    """Open a file for reading. A pipe is refused unless the shell made it (`<(…)`), because opening it would block."""
    if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")):
        raise PermanentError("it is a pipe, not a file", "Pass the path of a file.")
    return open(path, "rb")


def _stat_info(status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


class FsspecBackend(Backend):
    """Any store that fsspec supports (gs://, az://, hf://, memory://, …). Paths are whole URLs.

    Raises StorageError if no file system of the protocol is installed.
    """

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
            self._call(self._fs.info, path)  # the object's size may be unknown
            return True
        return self._call(self._fs.isdir, path)

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
            raise PermanentError("stores of this kind do not offer that", "Use a local path or s3://.") from error
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            is_permanent = isinstance(error, (ValueError, LookupError, AttributeError)) or (
                isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
            )
            raise (PermanentError if is_permanent else TransientError)(message) from error
