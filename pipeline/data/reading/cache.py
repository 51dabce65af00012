"""Remote shards kept as files of one node, within a byte budget, shared by all its processes.

A cached file is named by the hash of its full URL and ETag, so that datasets whose shards have the same names never
meet, and a replaced shard is another file. Only files of that form, in a folder of the cache's own, are ever counted
or deleted. The kernel's file locks are the only state besides the files, so that nothing survives a crash: who reads a
file holds a shared lock on it, which is its pin; who downloads one holds an exclusive lock on its `.part`; and a
`.part` that nobody has locked was left by a process that died.

The folder is one user's: what others could have written is neither read nor written to, for a shard's checksums are no
protection against who can forge them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.urls import local_path

PIECE = 8 * 2**20  # bytes of one request at least, where the shard has them
FOLDER = "mome-cache-1"
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OWN_FOLDER = "Each user needs a cache of their own: choose another data.cache.folder, or remove that one"
_POLL = 0.02  # seconds between two looks at what another process downloads

Fetch = Callable[[Sequence[tuple[int, int]]], Iterable[bytes]]


class CacheFull(StorageError):
    """There is no room for a shard: what the cache holds is in use, or something else fills the disk."""


class CachedShard:
    """A file of the cache, which is not deleted before this is closed or forgotten."""

    def __init__(self, descriptor: int, path: Path):
        self._descriptor, self.path = descriptor, path
        self._touch()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); fewer when something else has cut the file. Threads may share it."""
        return os.pread(self._descriptor, stop - start, start)

    def close(self) -> None:
        """Unpins the file; no thread may be reading it."""
        if self._descriptor >= 0:
            self._touch()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> CachedShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _touch(self) -> None:
        now = time.time_ns()  # given, for the kernel's own stamps are milliseconds apart
        with suppress(OSError):
            os.utime(self._descriptor, ns=(now, now))


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: int  # ns


class NodeCache:
    """The cache in one folder of this node. Making one does nothing; processes share it by making it alike."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int):
        self.folder = local_path(os.fspath(folder)) / FOLDER
        self.max_bytes = max_bytes
        self._is_swept = False

    def check_budget(self, needed: int, what: str) -> None:
        """Raises ConfigError when the budget is below the `needed` bytes of `what`, such as 'the open windows'."""
        if needed > self.max_bytes:
            raise ConfigError(
                f"data.cache.max_bytes {self.max_bytes} is below the {needed} bytes of {what}: shards would be deleted "
                f"while they are read. Raise it to at least {needed}, lower data.shuffle_window or data.streams, or "
                "unset data.cache.folder"
            )

    def open(self, url: str, size: int, etag: str, fetch: Fetch) -> CachedShard:
        """The object as a pinned file, downloaded when it is not there; others who ask meanwhile wait for it.

        `fetch` yields the bytes of each [start, stop) of a list, in order. Raises what it raises, CacheFull when there
        is no room, and StorageError when the folder cannot be used.
        """
        path = self.folder / (hashlib.sha256(f"{url}\n{etag}".encode()).hexdigest() + ".tar")
        try:
            self._make_folder()
            if not self._is_swept:
                with self._locked():
                    self._sweep()
                self._is_swept = True
            while True:
                if shard := self._pin(path, size):
                    return shard
                part = _own(path.with_suffix(".part"))
                if part is None:
                    time.sleep(_POLL)
                else:
                    return self._fill(part, path, url, size, fetch)
        except StorageError:
            raise
        except OSError as error:
            # A cache is a convenience: a full disk costs its help, and no run.
            kind = CacheFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(
                f"data.cache.folder {self.folder.parent} cannot be used: {error.strerror or error}. Free space there "
                "or lower data.cache.max_bytes, choose another local disk, or unset data.cache.folder"
            ) from error

    def discard(self, shard: CachedShard) -> None:
        """Deletes a file whose content proved to be damaged. Readers that have it open keep what they have."""
        with self._locked(), suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(shard.path), os.fstat(shard._descriptor)):
                shard.path.unlink()

    def held_bytes(self) -> int:
        """Bytes of all cached files, and of those on their way at their full size."""
        with self._locked():
            return sum(entry.size for entry in self._entries())

    def _pin(self, path: Path, size: int) -> CachedShard | None:
        try:
            descriptor = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        shard = CachedShard(descriptor, path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if found.st_nlink and found.st_size == size:
            return shard
        if found.st_nlink:  # cut by a crash of the machine, or by something else
            self.discard(shard)
        shard.close()
        return None

    def _fill(self, part: int, path: Path, url: str, size: int, fetch: Fetch) -> CachedShard:
        temporary = path.with_suffix(".part")
        try:
            if shard := self._pin(path, size):  # it came between our look and our lock
                temporary.unlink()
                os.close(part)
                return shard
            self._reserve(part, url, size)
            _download(part, size, fetch)
            with self._locked():  # nothing is evicted meanwhile: changing a lock's kind lets go of it for an instant
                temporary.rename(path)
                fcntl.flock(part, fcntl.LOCK_SH)
            return CachedShard(part, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # before the lock goes: afterwards it may be another's
            os.close(part)
            raise

    def _reserve(self, part: int, url: str, size: int) -> None:
        """Gives the part its full size at once, so that downloads side by side stay within the budget together."""
        with self._locked():
            self._sweep()
            entries = self._entries()
            missing = sum(entry.size for entry in entries) + size - self.max_bytes
            with _unpinned(entries, missing) as victims:
                if sum(victim.size for victim in victims) < missing:
                    raise CacheFull(
                        f"{url}: no room for its {size} bytes in {self.folder.parent}: all that could make room there "
                        f"is in use, and data.cache.max_bytes is {self.max_bytes}. Raise it"
                    )
                for victim in victims:
                    victim.path.unlink()
            os.ftruncate(part, size)

    def _entries(self) -> list[_Entry]:
        entries = []
        with os.scandir(self.folder) as found:
            for item in found:
                if _OURS.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        info = item.stat(follow_symlinks=False)
                        entries.append(_Entry(Path(item.path), info.st_size, info.st_mtime_ns))
        return entries

    def _sweep(self) -> None:
        """Deletes what processes that died have left. The cache must be locked."""
        for entry in self._entries():
            if entry.path.suffix == ".part" and (part := _lock(entry.path, os.O_RDWR)) is not None:
                entry.path.unlink(missing_ok=True)
                os.close(part)

    def _make_folder(self) -> None:
        """Make the cache's folder. Raises StorageError for one that other users of this machine can write to."""
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700, parents=True)
        found = os.lstat(self.folder)
        ours = found.st_uid == os.geteuid()
        if not stat.S_ISDIR(found.st_mode) or not (ours or found.st_uid == 0):
            what = "is no folder" if not stat.S_ISDIR(found.st_mode) else f"belongs to user {found.st_uid}"
            raise StorageError(f"data.cache.folder: {self.folder} {what}. {_OWN_FOLDER}")
        if found.st_mode & _OTHERS_WRITE:
            if not ours:
                raise StorageError(f"data.cache.folder: {self.folder} can be written to by others. {_OWN_FOLDER}")
            self.folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process of the node at a time."""
        path = self.folder / "lock"
        while True:
            self._make_folder()
            try:
                descriptor = _open(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(descriptor, path):
                    yield
                    return
            finally:
                os.close(descriptor)


def open_window_bytes(shard_bytes: Iterable[int], streams: int, window: int) -> int:
    """The most bytes of a source's shards that `streams` streams can have open at once, each a window of shards."""
    return sum(sorted(shard_bytes, reverse=True)[: streams * window])


def _download(part: int, size: int, fetch: Fetch) -> None:
    bounds = [*range(0, max(1, size - PIECE + 1), PIECE), size]
    pieces = list(pairwise(bounds))
    for (start, stop), data in zip(pieces, fetch(pieces), strict=True):
        if len(data) != stop - start:
            raise AssertionError(f"bytes {start} to {stop} were asked for and {len(data)} bytes came")
        view = memoryview(data)
        while view:
            written = os.pwrite(part, view, stop - len(view))
            view = view[written:]


def _open(path: Path, flags: int) -> int:
    """Return a descriptor of a file of ours. What else has its name is removed, and FileNotFoundError raised."""
    try:
        # Without waiting: a pipe of that name may have no other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise
    else:
        found = os.fstat(descriptor)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid()) and found.st_nlink <= 1
        if is_ours:
            return descriptor
        os.close(descriptor)
    path.unlink(missing_ok=True)
    raise FileNotFoundError(errno.ENOENT, "was no file of this user's", os.fspath(path))


def _own(path: Path) -> int | None:
    """The file, made if need be and locked for us alone; None while another downloads it."""
    return _lock(path, os.O_RDWR | os.O_CREAT)


def _lock(path: Path, flags: int) -> int | None:
    """The file at `path` locked exclusively; None when it is not there, or another holds a lock on it."""
    try:
        descriptor = _open(path, flags)
    except FileNotFoundError:
        return None
    try:
        # Never wait for this lock: the file may be renamed and pinned for hours before it came.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def _unpinned(entries: Iterable[_Entry], needed: int) -> Iterator[list[_Entry]]:
    """The longest unused files that nobody reads, `needed` bytes of them if there are so many; locked meanwhile."""
    locks: list[int] = []
    victims: list[_Entry] = []
    try:
        for entry in sorted(entries, key=lambda entry: entry.used):
            if needed <= 0:
                break
            if entry.path.suffix == ".tar" and (lock := _lock(entry.path, os.O_RDWR)) is not None:
                locks.append(lock)
                victims.append(entry)
                needed -= entry.size
        yield victims
    finally:
        for lock in locks:
            os.close(lock)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
