"""Files of this machine. What replaces a file is written beside it and renamed, so that nobody sees half of it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.config.durable import is_temporary, replacing
from pipeline.data.storage.backend import ObjectInfo, Part
from pipeline.data.storage.faults import Changed, Refused, TooShort

_COPY = 16 * 2**20
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def open_file(path: str) -> BinaryIO:
    """Open a file to read it; a pipe only where the shell made it (`<(…)`), since any other would be waited for."""
    if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")):
        raise _is_pipe()
    return open(path, "rb")


def _is_pipe() -> Refused:
    return Refused("it is a pipe, not a file", "Give the path of a file.")


class Local:
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
                raise Changed()
            pieces, at = [], start
            while at < stop:
                piece = os.pread(descriptor, stop - at, at)
                if not piece:
                    raise TooShort(info.size, start, stop)
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
        with replacing(path) as file:
            file.write(data)

    def write_parts(self, path: str, size: int, part: Part) -> None:
        with replacing(path) as file:
            for start in range(0, size, _COPY):
                file.write(part(start, min(start + _COPY, size)))

    def create_parts(self, path: str, size: int, part: Part) -> None:
        with replacing(path, _link) as file:
            for start in range(0, size, _COPY):
                file.write(part(start, min(start + _COPY, size)))

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        return 0  # what was begun lies in its folder, and goes with it

    def upload(self, local: str, path: str) -> None:
        with open(local, "rb") as source, replacing(path) as target:
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
