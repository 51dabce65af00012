"""The node cache downloads each object once, stays within its budget, and reads only its own files."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.reading.cache import FOLDER, CacheFull, NodeCache, OpenShard
from tests.support.cache_reader import SIZE, content, fill, held_bytes, open_checked, start_reader
from tests.support.stores import small_disk


def opened(cache: NodeCache, name: str, data=bytes(100), tag="tag", requested: Any = mock.Mock()) -> closing[OpenShard]:
    """Open an object with this content; the list `requested` receives the downloaded ranges."""
    request = partial(map, lambda piece: (data[slice(*piece)], requested.append(piece))[0])
    return closing(cache.open(f"s3://bucket/{name}", len(data), tag, request))


def put(cache: NodeCache, name: str, size: int = 100) -> str:
    """Cache an object of `size` bytes and return its file's name."""
    with opened(cache, name, bytes(size)) as shard:
        return shard.path.name


def names(cache: NodeCache) -> set[str]:
    return set(os.listdir(cache.folder)) - {"lock"}


def test_object_is_downloaded_once_in_large_pieces(tmp_path: Path):
    data, requested = os.urandom(20 * 2**20), []
    caches = [NodeCache(tmp_path / "new", 2**30) for _ in range(2)]
    assert not (tmp_path / "new").exists()  # before the first use
    for cache in caches:
        with opened(cache, "cc3m/0.tar", data, requested=requested) as shard:
            assert shard.path.read_bytes() == data
    digest = hashlib.sha256(b"s3://bucket/cc3m/0.tar\ntag").hexdigest()
    assert (shard.path, requested) == (tmp_path / "new" / f"{digest}.tar", [(0, 2**23), (2**23, 20 * 2**20)])
    cache = NodeCache(tmp_path / "other", 2**30)
    for name, tag in [("cc3m/0.tar", "old"), ("cc12m/0.tar", "old"), ("cc3m/0.tar", "new")] * 2:
        with opened(cache, name, f"{name} {tag}".encode(), tag) as shard:
            assert shard.path.read_bytes() == f"{name} {tag}".encode()
    assert len(names(cache)) == 3, "other URLs and ETags are other files"


def test_least_recently_used_file_is_evicted_first_and_a_pinned_one_never(tmp_path: Path):
    cache = NodeCache(tmp_path, 350)
    first, _, third = (put(cache, name) for name in "abc")
    put(cache, "a")
    fourth = put(cache, "d")
    with opened(cache, "c"):
        assert names(cache) == {first, third, fourth}
        put(cache, "a")  # used later than c was opened, and before c is closed
    fifth, sixth = put(cache, "e"), put(cache, "f")
    assert (names(cache), held_bytes(cache)) == ({third, fifth, sixth}, 300)
    cache = NodeCache(tmp_path / "pins", 250)
    with opened(cache, "a", b"a" * 100) as pinned:
        other = [put(cache, name) for name in "bcd"][-1]
        assert pinned.path.read_bytes() == b"a" * 100
        with pytest.raises(CacheFull, match=r"s3://bucket/big: no room for its 200 bytes.*data.cache.max_bytes is 250"):
            put(cache, "big", 200)
        assert names(cache) == {other, pinned.path.name}, "nothing is evicted in vain"
    assert {put(cache, "big", 200)} == names(cache)


def test_foreign_files_are_neither_counted_nor_deleted(tmp_path: Path):
    cache = NodeCache(tmp_path / "cache", 250)
    put(cache, "a")
    foreign = [tmp_path / "0.tar", *(cache.folder / name for name in ("0.tar", "notes.part", f"{'0' * 64}.txt"))]
    for path in foreign:
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    (link := cache.folder / f"{'1' * 64}.tar").symlink_to(foreign[0])
    ours = {put(cache, name) for name in "bcdef"}
    assert len(names(cache) & ours) == 2
    assert all(path.stat().st_size == 10_000 for path in [*foreign, link])
    assert link.is_symlink()


def test_lost_or_damaged_files_are_downloaded_again(tmp_path: Path):
    cache, requested = NodeCache(tmp_path, 2**20), []
    for number, size in enumerate((0, 99, 101)):
        os.truncate(cache.folder / put(cache, f"{number}"), size)
        with opened(cache, f"{number}", b"n" * 100) as shard:
            assert shard.path.read_bytes() == b"n" * 100
    with opened(cache, "a", b"bad") as bad, opened(cache, "a", b"bad", requested=requested) as also_bad:
        cache.discard(bad)
        with opened(cache, "a", b"new") as good:
            cache.discard(also_bad)  # removes only that version
            assert good.path.read_bytes() == b"new"
    assert not requested
    shutil.rmtree(cache.folder)
    assert {put(cache, "a")} == names(cache)


def test_concurrent_opens_download_once_and_a_failed_download_leaves_nothing(tmp_path: Path):
    data, requested, started = os.urandom(1000), [], threading.Barrier(8)

    def open_and_read(number: int) -> bytes:
        started.wait()
        with opened(NodeCache(tmp_path, 2**20), "a", data, requested=requested) as shard:
            return shard.path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(open_and_read, range(8))) == {data}
    assert requested == [(0, 1000)]
    cache = NodeCache(tmp_path / "cache", 250)
    with pytest.raises(StorageError, match="the store went away"):
        cache.open("s3://bucket/a", 100, "tag", mock.Mock(side_effect=StorageError("the store went away")))
    assert names(cache) == set()
    put(cache, "a")


def test_full_disk_raises_and_leaves_nothing(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("no small file system can be mounted here")
        cache = NodeCache(disk / FOLDER, 2**30)
        message = rf"^data.cache.folder {disk} cannot be used: No space left on device\. Free space there or lower "
        message += "data.cache.max_bytes, choose another local disk, or unset data.cache.folder$"
        with pytest.raises(CacheFull, match=message):
            opened(cache, "a", os.urandom(2**24))
        assert names(cache) == set()


def test_processes_share_the_cache_within_its_budget(tmp_path: Path):
    """Four processes with two pins each fit exactly; all bytes and pins are checked."""
    store, cache = fill(tmp_path / "store", 20), NodeCache(tmp_path / "cache", 8 * SIZE)
    open_checked(cache, store, "0").close()
    readers, sizes = [start_reader(cache, store, seed, 60) for seed in range(4)], list[int]()
    while any(reader.poll() is None for reader in readers):
        sizes.append(held_bytes(cache))
        time.sleep(0.002)  # outside the lock, for which the readers wait
    assert [reader.wait() for reader in readers] == [0] * 4
    assert len(sizes) > 50
    assert max(sizes) == cache.max_bytes
    assert {path.suffix for path in cache.folder.iterdir()} == {".tar", ""}
    contents = {content(f"{number}") for number in range(20)}
    assert {path.read_bytes() for path in cache.folder.glob("*.tar")} <= contents


PLANT: dict[str, Callable[[Path, Path], object]] = {
    "symlink": lambda path, victim: path.symlink_to(victim),
    "dangling symlink": lambda path, victim: path.symlink_to(victim.parent / "absent"),
    "hard link": lambda path, victim: os.link(victim, path),
    "pipe": lambda path, victim: os.mkfifo(path),
    "another user's": lambda path, victim: (path.write_bytes(b"forged"), os.chown(path, 12345, 12345)),
}


@pytest.mark.parametrize("kind", PLANT)
@pytest.mark.parametrize("suffix", [".part", ".tar", "lock"])
def test_planted_files_are_neither_read_nor_written(tmp_path: Path, kind: str, suffix: str):
    """S7: a symbolic link in the cache's folder had the file it names overwritten."""
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    victim, data, cache = tmp_path / "victim", os.urandom(6), NodeCache(tmp_path / "cache", 2**20)
    victim.write_bytes(b"mine!!")
    put(cache, "first")
    digest = hashlib.sha256(b"s3://bucket/shard\ntag").hexdigest()
    path = cache.folder / ("lock" if suffix == "lock" else digest + suffix)
    path.unlink(missing_ok=True)
    PLANT[kind](path, victim)
    with opened(NodeCache(cache.folder, 2**20), "shard", data) as shard:
        assert os.pread(shard.descriptor, 100, 0) == data
    assert (victim.read_bytes(), sorted(os.listdir(tmp_path))) == (b"mine!!", ["cache", "victim"])


def test_folder_is_private_to_its_user_and_an_unusable_one_is_rejected_by_name(tmp_path: Path):
    cache = NodeCache(tmp_path / "cache", 2**20)
    for name, mode in (("a", 0o700), ("b", 0o755)):  # others must not write
        put(cache, name)
        assert cache.folder.stat().st_mode & 0o777 == mode
        cache.folder.chmod(0o777)
    assert all(path.stat().st_mode & 0o077 == 0 for path in cache.folder.iterdir())
    faults: dict[str, Callable[[Path], object]] = {
        "is not a folder.*choose another": lambda folder: folder.symlink_to(tmp_path),
        "is not a .*choose another": lambda folder: folder.write_bytes(b""),
        "cannot be used: Not a directory": lambda folder: folder.parent.rmdir() or folder.parent.touch(),
        "belongs to user 12345.*choose another": lambda folder: folder.mkdir() or os.chown(folder, 12345, -1),
    }
    for number, (message, plant) in enumerate(faults.items()):
        if number < 3 or os.geteuid() == 0:  # only root gives folders away
            (disk := tmp_path / f"{number}").mkdir()
            plant(disk / FOLDER)
            with pytest.raises(StorageError, match=rf"data\.cache\.folder.*{message}"):
                put(NodeCache(disk / FOLDER, 2**20), "a")
    if os.geteuid() != 0:
        pytest.skip("only root gives folders away: a folder of another user was not tested")
