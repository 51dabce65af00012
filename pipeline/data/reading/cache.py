"""Node cache: remote shards as files of one node, within a byte budget, shared by all its processes.

A cached file is named by the hash of its URL and ETag, so that a replaced shard is another file; files with other names
are neither counted nor deleted. The only other state is the kernel's file locks, which do not survive a crash: a reader
pins a file by a shared lock, a downloader holds an exclusive lock on its `.part`, and a `.part` without a lock was left
by a process that died. The folder belongs to one user: files that others could have written are neither read nor
written to, because a shard's checksums do not protect against forgery.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from filelock import FileLock

from pipeline.config.errors import StorageError

PIECE = 8 * 2**20  # minimum bytes of one request, unless the shard is smaller
FOLDER = "mome-cache-1"
_CACHE_FILE = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_POLL_SECONDS = 0.02  # while another process downloads or has locked the cache

Fetch = Callable[[Sequence[tuple[int, int]]], Iterable[bytes]]  # yield each [start, stop) of a list, in order


class CacheFull(StorageError):
    """No room for a shard: the cached shards are in use, or other data fills the disk."""


@dataclass(eq=False)
class OpenShard:
    """Open file of a shard, closed with the last reference. A file of the cache is not evicted before that."""

    descriptor: int
    path: Path
    is_cached: bool

    def close(self) -> None:
        """Record the use, which the eviction goes by, and close the file. No thread may be reading it."""
        if self.descriptor >= 0:
            if self.is_cached:
                now = time.time_ns()  # explicit, because the kernel's own timestamps are milliseconds apart
                with suppress(OSError):
                    os.utime(self.descriptor, ns=(now, now))
            os.close(self.descriptor)
            self.descriptor = -1

    __del__ = close


@dataclass
class NodeCache:
    """Cache in one folder of this node. Creating the object does nothing; equal objects share the folder."""

    folder: Path  # named FOLDER, in the disk's folder that the user has chosen
    max_bytes: int
    _is_swept: bool = field(default=False, init=False, compare=False)

    def open(self, url: str, size: int, etag: str, fetch: Fetch) -> OpenShard:
        """Return the object as a pinned file, downloaded by one process if absent; raise CacheFull without room."""
        path = self.folder / (hashlib.sha256(f"{url}\n{etag}".encode()).hexdigest() + ".tar")
        try:
            self._make_folder()
            if not self._is_swept:
                with self._locked():
                    self._sweep()
                self._is_swept = True
            while (shard := self._pin(path, size)) is None:
                if (part := _lock(path.with_suffix(".part"), os.O_RDWR | os.O_CREAT)) is not None:
                    return self._download(part, path, url, size, fetch)
                time.sleep(_POLL_SECONDS)
            return shard
        except StorageError:
            raise
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # disables the cache and does not fail the run
            raise (CacheFull if is_full else StorageError)(
                f"data.cache.folder {self.folder.parent} cannot be used: {error.strerror or error}. Free space there "
                "or lower data.cache.max_bytes, choose another local disk, or unset data.cache.folder"
            ) from error

    def discard(self, shard: OpenShard) -> None:
        """Delete a damaged file. Readers that have it open keep it."""
        with self._locked(), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(shard.descriptor), os.lstat(shard.path)):
                shard.path.unlink()

    def _pin(self, path: Path, size: int) -> OpenShard | None:
        try:
            shard = OpenShard(_open(path, os.O_RDONLY), path, is_cached=True)
        except FileNotFoundError:
            return None
        fcntl.flock(shard.descriptor, fcntl.LOCK_SH)
        status = os.fstat(shard.descriptor)
        if status.st_nlink and status.st_size == size:
            return shard
        if status.st_nlink:  # truncated by a crash of the machine or by another program
            self.discard(shard)
        shard.close()
        return None

    def _download(self, part: int, path: Path, url: str, size: int, fetch: Fetch) -> OpenShard:
        temporary = path.with_suffix(".part")
        try:
            if shard := self._pin(path, size):  # completed between our check and our lock
                temporary.unlink()
                os.close(part)
                return shard
            with self._locked(), ExitStack() as locks:
                # Make room and give the part its full size, so that concurrent downloads stay within the budget.
                entries = sorted(self._sweep(), key=lambda entry: entry[1].st_mtime_ns)  # the least recently used first
                missing = sum(status.st_size for _, status in entries) + size - self.max_bytes
                victims: list[Path] = []
                for cached, status in entries:
                    # A lock shows that no reader pins the file.
                    if missing > 0 and cached.suffix == ".tar" and (lock := _lock(cached, os.O_RDWR)) is not None:
                        locks.callback(os.close, lock)
                        victims.append(cached)
                        missing -= status.st_size
                if missing > 0:
                    raise CacheFull(
                        f"{url}: no room for its {size} bytes in {self.folder.parent}: the cached shards are in use, "
                        f"and data.cache.max_bytes is {self.max_bytes}. Raise it"
                    )
                for victim in victims:
                    victim.unlink()
                os.ftruncate(part, size)
            pieces = list(pairwise([*range(0, max(1, size - PIECE + 1), PIECE), size]))
            for (start, stop), data in zip(pieces, fetch(pieces), strict=True):
                assert len(data) == stop - start, f"{len(data)} bytes arrived for bytes {start} to {stop}"
                view = memoryview(data)
                while view:
                    view = view[os.pwrite(part, view, stop - len(view)) :]
            with self._locked():  # no eviction in between: changing a lock's mode releases it for an instant
                temporary.rename(path)
                fcntl.flock(part, fcntl.LOCK_SH)
            return OpenShard(part, path, is_cached=True)
        except BaseException:
            temporary.unlink(missing_ok=True)  # before the lock is released, because then it may be another process's
            os.close(part)
            raise

    def _sweep(self) -> list[tuple[Path, os.stat_result]]:
        """Delete the partial downloads of processes that died; return all other files. The cache must be locked."""
        entries = []
        for path in filter(lambda path: _CACHE_FILE.fullmatch(path.name), self.folder.iterdir()):
            with suppress(FileNotFoundError):
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                if path.suffix == ".part" and (part := _lock(path, os.O_RDWR)) is not None:
                    path.unlink(missing_ok=True)
                    os.close(part)
                else:
                    entries.append((path, status))
        return entries

    def _make_folder(self) -> None:
        """Create the cache's folder. Raise StorageError if other users of this machine can write to it."""
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700, parents=True)
        status = os.lstat(self.folder)
        is_ours, is_shared, fault = status.st_uid == os.geteuid(), status.st_mode & _OTHERS_WRITE, None
        if not stat.S_ISDIR(status.st_mode):
            fault = "is not a folder"
        elif not (is_ours or status.st_uid == 0):
            fault = f"belongs to user {status.st_uid}"
        elif is_shared and not is_ours:
            fault = "is writable for other users"
        if fault:
            raise StorageError(
                f"data.cache.folder: {self.folder} {fault}. Each user needs their own cache: choose another "
                "data.cache.folder, or remove that one"
            )
        if is_shared:
            self.folder.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the cache for one thread of one process of the node."""
        self._make_folder()
        path = self.folder / "lock"
        if path.is_symlink():  # planted; filelock refuses to follow it
            path.unlink(missing_ok=True)
        with FileLock(path, mode=0o600, poll_interval=_POLL_SECONDS):
            yield


def _open(path: Path, flags: int) -> int:
    """Return a descriptor of a cache file. Remove anything else of that name and raise FileNotFoundError."""
    try:
        # O_NONBLOCK because opening a pipe would block.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise
    else:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid()) and status.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
    path.unlink(missing_ok=True)
    raise FileNotFoundError(errno.ENOENT, "was not a file of this user", os.fspath(path))


def _lock(path: Path, flags: int) -> int | None:
    """Return the file at `path` with an exclusive lock; None if it does not exist or another process holds a lock."""
    with ExitStack() as on_failure:
        try:
            descriptor = _open(path, flags)
            on_failure.callback(os.close, descriptor)
            # Never wait for this lock: the file may be renamed and then pinned for hours.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):  # another file has that name now
                return None
        except (FileNotFoundError, BlockingIOError):
            return None
        on_failure.pop_all()
        return descriptor
