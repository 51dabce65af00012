"""Atomic, durable writes of local files: readers see the old or the new content, also after a power failure."""

import errno
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Errors of file systems, or of permissions, that do not support syncing a folder.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
TEMPORARY = re.compile(r"\..*\.partial", re.DOTALL)  # name of a file of `atomic_write` before it is in place
_names = random.SystemRandom()  # not the global generator, and different in forked processes


def write_durably(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace or create a file, and its folders. The content is on disk when this returns."""
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def atomic_write(path: str | os.PathLike[str], create: bool = False) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` if the block succeeds, and is removed otherwise.

    With `create`, raise FileExistsError at the end if `path` exists. File and folder are synced, so that no later
    change of the folder, such as a deletion, can survive a power failure that this one does not.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    missing, parent = [], folder
    while not os.path.isdir(parent):
        if os.path.lexists(parent) and not os.path.isdir(parent):  # it may have been created since the check above
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", parent)
        missing.append(parent)
        parent = os.path.dirname(parent)
    os.makedirs(folder, exist_ok=True)
    for created in reversed(missing):
        sync_folder(os.path.dirname(created))
    temporary = os.path.join(folder, f".{name[:100]}.{_names.getrandbits(64):016x}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if create:
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
        else:
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(folder)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush creations, renames and deletions in a folder to disk, if its file system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
