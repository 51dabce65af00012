"""Which files a living process works on: by a lock, or by a heartbeat where the file system has no locks.

A process that dies loses its locks at once. Where flock is missing (Lustre without `-o flock`, some NFS), a file
beside the one in use is touched every few seconds instead, and its owner counts as dead once that has stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from pathlib import Path

logger = logging.getLogger("mome.tracking")

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0  # without a heartbeat
_held: set[Path] = set()  # files that this process has in use


class InUse(Exception):
    """Another process has the file in use."""


class Lease:
    """Marks a file, made where there is none, as in use by this process until `release` or until the process dies.

    Raises InUse when another process has it in use. A file system without locks is reported and raises nothing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise InUse(str(path)) from None
        except OSError as error:
            self._beat_instead(error)
        _held.add(path)

    def release(self) -> None:
        _held.discard(self._path)
        os.close(self._fd)
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
            _heartbeat(self._path).unlink(missing_ok=True)

    def _beat_instead(self, error: OSError) -> None:
        if _beats(self._path):
            os.close(self._fd)
            raise InUse(str(self._path))
        logger.warning(
            "%s: the file system has no file locks (%s); a heartbeat file tells others that it is in use",
            self._path.parent, error.strerror or error,
        )  # fmt: skip
        self._beat()
        self._beats = threading.Thread(target=self._keep_beating, name="mome-heartbeat", daemon=True)
        self._beats.start()

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the file's time may still change at the next beat
            _heartbeat(self._path).touch()
            os.utime(_heartbeat(self._path), (time.time(), time.time()))  # our clock, not a file server's


def is_held_elsewhere(path: Path) -> bool:
    """Return True while another process has the file in use."""
    return path not in _held and is_held(path)


def is_held(path: Path) -> bool:
    """Return True while some process has the file in use."""
    if path in _held or _beats(path):
        return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: NFS grants exclusive ones to writers only
        except BlockingIOError:
            return True
        except OSError:
            return False  # no locks here: the heartbeat has decided
    return False


def _heartbeat(path: Path) -> Path:
    return path.with_name(path.name + ".heartbeat")


def _beats(path: Path) -> bool:
    try:
        return abs(time.time() - _heartbeat(path).stat().st_mtime) < DEAD_SECONDS
    except OSError:
        return False
