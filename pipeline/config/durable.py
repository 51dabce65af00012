"""Local files that are written whole: readers see the old content or the new, also after a power cut.

Here, below all other packages, because storage and tracking both write such files.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What a file system or its permissions answer where a folder cannot be synced.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
_names = random.SystemRandom()  # never the global generator, and different in forked processes


def write_durably(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content, or create the file and its folders. When this returns, the disk holds it."""
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def atomic_write(path: str | os.PathLike[str], place: Callable[[str, str], None] | None = None) -> Iterator[BinaryIO]:
    """Yield a file that takes `path`'s place when the block ends well, and leaves no trace when it does not.

    `place(temporary, path)` gives it its name (default: os.replace). File and folder are synced, so that no later
    change of the folder, such as a deletion, can survive a power cut that this one does not.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    _make_folder(folder)
    temporary = os.path.join(folder, f".{name[:100]}.{_names.getrandbits(64):016x}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (place or os.replace)(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(folder)


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is one that `atomic_write` has not yet given its own."""
    return name.startswith(".") and name.endswith(".partial")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Have the disk hold what was created, renamed and deleted in a folder, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _make_folder(folder: str) -> None:
    missing = []
    above = folder
    while not os.path.isdir(above):
        if os.path.lexists(above) and not os.path.isdir(above):  # it may have been made between the two looks
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", above)
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(folder, exist_ok=True)
    for made in reversed(missing):
        sync_folder(os.path.dirname(made))
