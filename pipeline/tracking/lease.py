"""Detection of files that a living process is using, by file lock or, on file systems without locks, by heartbeat.

A process that dies loses its locks at once. Where flock is missing (Lustre without `-o flock`, some NFS), the owner
touches a file next to the used one every few seconds instead, and counts as dead 60 s after the last touch.
"""

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path

from pipeline.config.background import PeriodicThread

logger = logging.getLogger("mome.tracking")

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0  # since the last heartbeat
_held: set[Path] = set()  # files that this process uses


class InUse(Exception):
    """Another process is using the file."""


class Lease:
    """Marks a file, creating it if necessary, as used by this process until `close` or the process's death.

    Raises InUse when another process uses it. A file system without locks is logged as a warning.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.with_name(f"{path.name}.heartbeat")
        self._heartbeat: PeriodicThread | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or is_held(path):
                os.close(self._fd)
                raise InUse(str(path)) from None
            message = "%s: the file system has no file locks (%s); using heartbeat files instead"
            logger.warning(message, path.parent, error.strerror or error)
            self._beat()
            self._heartbeat = PeriodicThread(self._beat, BEAT_SECONDS, "mome-heartbeat").start()
        _held.add(path)

    def close(self) -> None:
        _held.discard(self._path)
        os.close(self._fd)
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # a full disk may still accept the next heartbeat's timestamp
            self._file.touch()
            os.utime(self._file, (time.time(), time.time()))  # this machine's clock, not the file server's


def is_held(path: Path, elsewhere: bool = False) -> bool:
    """Return True while any process, or any other process if `elsewhere`, uses the file."""
    if path in _held:
        return not elsewhere
    with contextlib.suppress(OSError):
        if abs(time.time() - path.with_name(f"{path.name}.heartbeat").stat().st_mtime) < DEAD_SECONDS:
            return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: NFS grants exclusive locks to writers only
        except BlockingIOError:
            return True
        except OSError:  # no locks on this file system, and no heartbeat
            return False
    return False
