"""The node cache downloads each object once, stays within its budget, and is safe among processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError, StorageError
from pipeline.data.reading.cache import FOLDER, CacheFull, Fetch, NodeCache, open_window_bytes
from tests.support.cache_reader import SIZE, content, fill, open_checked

USER = Path(__file__).resolve().parents[3] / "support" / "cache_reader.py"


def serving(data: bytes, requested: list[tuple[int, int]] | None = None) -> Fetch:
    """Return a fetch of an object's pieces that records the requested ones."""

    def fetch(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        for start, stop in pieces:
            if requested is not None:
                requested.append((start, stop))
            yield data[start:stop]

    return fetch


def no_fetch(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    raise AssertionError("it is cached already")


def put(cache: NodeCache, name: str, size: int = 100) -> Path:
    """Cache an object of `size` bytes and return its file."""
    with cache.open(f"s3://bucket/{name}", size, "tag", serving(bytes(size))) as shard:
        return shard.path


def names(cache: NodeCache) -> set[str]:
    return set(os.listdir(cache.folder)) - {"lock"}


def test_object_is_downloaded_once_in_large_pieces(tmp_path: Path):
    data, requested = os.urandom(20 * 2**20), []
    cache = NodeCache(tmp_path, 2**30)
    with cache.open("s3://bucket/cc3m/00000.tar", len(data), "tag", serving(data, requested)) as shard:
        assert shard.read(5, 9_000_000) == data[5:9_000_000]
        assert shard.path.read_bytes() == data
        assert shard.path.name == hashlib.sha256(b"s3://bucket/cc3m/00000.tar\ntag").hexdigest() + ".tar"
    assert requested == [(0, 8 * 2**20), (8 * 2**20, 20 * 2**20)]
    with NodeCache(tmp_path, 2**30).open("s3://bucket/cc3m/00000.tar", len(data), "tag", no_fetch) as shard:
        assert shard.read(0, len(data)) == data


def test_equal_names_in_two_datasets_do_not_collide(tmp_path: Path):
    cache = NodeCache(tmp_path, 2**30)
    for url, data in [("s3://b/cc3m/00000.tar", b"three"), ("s3://b/cc12m/00000.tar", b"twelve")] * 2:
        with cache.open(url, len(data), "tag", serving(data)) as shard:
            assert shard.read(0, 10) == data
    assert len(names(cache)) == 2


def test_changed_etag_is_another_file(tmp_path: Path):
    cache = NodeCache(tmp_path, 2**30)
    for etag, data in [("old", b"12345"), ("new", b"54321")]:
        with cache.open("s3://b/0.tar", 5, etag, serving(data)) as shard:
            assert shard.read(0, 5) == data
    assert len(names(cache)) == 2


def test_least_recently_used_file_is_evicted_first(tmp_path: Path):
    cache = NodeCache(tmp_path, 350)
    first, second, third = (put(cache, name) for name in "abc")
    put(cache, "a")
    fourth = put(cache, "d")
    assert names(cache) == {first.name, third.name, fourth.name}
    assert cache.held_bytes() == 300
    assert not second.exists()


def test_eviction_order_uses_the_last_read(tmp_path: Path):
    cache = NodeCache(tmp_path, 250)
    with cache.open("s3://bucket/a", 100, "tag", serving(bytes(100))) as shard:
        second = put(cache, "b")
    third = put(cache, "c")
    assert names(cache) == {shard.path.name, third.name}
    assert not second.exists()


def test_pinned_file_is_never_evicted(tmp_path: Path):
    cache = NodeCache(tmp_path, 250)
    with cache.open("s3://bucket/a", 100, "tag", serving(b"a" * 100)) as pinned:
        for name in "bcd":
            put(cache, name)
        assert pinned.path.read_bytes() == b"a" * 100
    put(cache, "e")
    put(cache, "f")
    assert not pinned.path.exists()


def test_no_room_raises_and_evicts_nothing(tmp_path: Path):
    cache = NodeCache(tmp_path, 250)
    other = put(cache, "other")
    with cache.open("s3://bucket/a", 100, "tag", serving(bytes(100))) as pinned:
        with pytest.raises(CacheFull, match=r"s3://bucket/big: no room for its 200 bytes.*data.cache.max_bytes is 250"):
            put(cache, "big", 200)
        assert names(cache) == {other.name, pinned.path.name}
    put(cache, "big", 200)
    assert cache.held_bytes() == 200


def test_foreign_files_are_neither_counted_nor_deleted(tmp_path: Path):
    cache = NodeCache(tmp_path, 250)
    put(cache, "a")
    foreign = [tmp_path / "00000.tar", tmp_path / "dataset" / "00000.tar", cache.folder / "00000.tar"]
    foreign += [cache.folder / "notes.part", cache.folder / f"{'0' * 64}.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    (cache.folder / f"{'1' * 64}.tar").symlink_to(foreign[0])
    for name in "bcdef":
        put(cache, name)
    assert cache.held_bytes() == 200
    assert all(path.stat().st_size == 10_000 for path in foreign)
    assert (cache.folder / f"{'1' * 64}.tar").is_symlink()


def test_failed_download_leaves_nothing(tmp_path: Path):
    cache = NodeCache(tmp_path, 250)

    def failing(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        raise StorageError("the store went away")
        yield b""

    with pytest.raises(StorageError, match="the store went away"):
        cache.open("s3://bucket/a", 100, "tag", failing)
    assert names(cache) == set()
    put(cache, "a")


@pytest.mark.parametrize("size", [0, 99, 101])
def test_file_of_wrong_size_is_downloaded_again(tmp_path: Path, size: int):
    cache = NodeCache(tmp_path, 2**20)
    os.truncate(put(cache, "a"), size)
    with cache.open("s3://bucket/a", 100, "tag", serving(b"n" * 100)) as shard:
        assert shard.path.read_bytes() == b"n" * 100


def test_discard_removes_only_that_version(tmp_path: Path):
    cache = NodeCache(tmp_path, 2**20)
    bad = cache.open("s3://bucket/a", 3, "tag", serving(b"bad"))
    seen_too = cache.open("s3://bucket/a", 3, "tag", no_fetch)
    cache.discard(bad)
    with cache.open("s3://bucket/a", 3, "tag", serving(b"new")) as good:
        cache.discard(seen_too)
        assert good.path.read_bytes() == b"new"


def test_concurrent_opens_download_once(tmp_path: Path):
    data, requested, started = os.urandom(1000), [], threading.Barrier(8)

    def open_and_read(number: int) -> bytes:
        cache = NodeCache(tmp_path, 2**20)
        started.wait()
        with cache.open("s3://bucket/a", 1000, "tag", serving(data, requested)) as shard:
            return shard.read(0, 1000)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(open_and_read, range(8))) == {data}
    assert requested == [(0, 1000)]


def test_budget_below_the_open_windows_is_rejected(tmp_path: Path):
    needed = open_window_bytes([50, 10, 30, 40], streams=1, window=3)
    assert needed == 120
    NodeCache(tmp_path, 120).check_budget(needed, "the open windows")
    with pytest.raises(ConfigError, match=r"max_bytes 119 is below the 120 bytes of the open windows.*at least 120"):
        NodeCache(tmp_path, 119).check_budget(needed, "the open windows")
    assert open_window_bytes([50, 10], streams=9, window=3) == 60


def test_unusable_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"data\.cache\.folder .*/file cannot be used: Not a directory"):
        put(NodeCache(tmp_path / "file", 1000), "a")


def test_deleted_folder_is_created_again(tmp_path: Path):
    cache = NodeCache(tmp_path, 1000)
    put(cache, "a")
    shutil.rmtree(cache.folder)
    path = put(cache, "a")
    assert names(cache) == {path.name}


def test_full_disk_raises_and_leaves_nothing(tmp_path: Path):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mount, f"mount -t tmpfs -o size=1m none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    code = f"""
import os
from pipeline.data.reading.cache import NodeCache
try:
    NodeCache({str(tmp_path)!r}, 2**30).open("s3://b/a", 2**22, "tag", lambda p: (os.urandom(b - a) for a, b in p))
except Exception as error:
    print(type(error).__name__, error, sorted(os.listdir({str(tmp_path)!r} + "/mome-cache-1")))
"""
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1"'
    result = subprocess.run([*mount, script, sys.executable, code], capture_output=True, text=True, timeout=60)
    assert result.stdout == (
        f"CacheFull data.cache.folder {tmp_path} cannot be used: No space left on device. Free space there or lower "
        "data.cache.max_bytes, choose another local disk, or unset data.cache.folder ['lock']\n"
    )


def accounted(cache: NodeCache) -> int:
    """Return the bytes in the cache's folder while it is locked."""
    with open(cache.folder / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_processes_share_the_cache_within_its_budget(tmp_path: Path):
    """Four processes with two pins each fit exactly; all bytes and pins are checked."""
    store, cache = tmp_path / "store", NodeCache(tmp_path / "cache", 8 * SIZE)
    fill(store, 20)
    open_checked(cache, store, "0").close()
    command = [sys.executable, str(USER), str(tmp_path / "cache"), str(cache.max_bytes), str(store)]
    users = [subprocess.Popen([*command, str(seed), "60"]) for seed in range(4)]
    most, samples = 0, 0
    while any(user.poll() is None for user in users):
        most, samples = max(most, accounted(cache)), samples + 1
    assert [user.wait() for user in users] == [0] * 4
    assert samples > 50
    assert most == cache.max_bytes
    assert {path.suffix for path in cache.folder.iterdir()} == {".tar", ""}
    for path in cache.folder.glob("*.tar"):
        assert path.read_bytes() in [content(f"{number}") for number in range(20)]


def test_constructor_creates_nothing(tmp_path: Path):
    cache = NodeCache(tmp_path / "none", 10)
    assert not (tmp_path / "none").exists()
    assert cache.folder == tmp_path / "none" / FOLDER


def _plant(path: Path, kind: str, victim: Path) -> None:
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling symlink":
        path.symlink_to(victim.parent / "absent")
    else:
        path.write_bytes(b"forged")
        os.chown(path, 12345, 12345)


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "hard link", "pipe", "another user's"])
@pytest.mark.parametrize("suffix", [".part", ".tar", "lock"])
def test_planted_files_are_neither_read_nor_written(tmp_path: Path, kind: str, suffix: str):
    """S7: a symbolic link in the cache's folder had the file it names overwritten."""
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    victim, data = tmp_path / "victim", os.urandom(6)
    victim.write_bytes(b"mine!!")
    cache = NodeCache(tmp_path / "cache", 2**20)
    put(cache, "first")
    url = "s3://bucket/shard"
    name = hashlib.sha256(f"{url}\ntag".encode()).hexdigest() + suffix if suffix != "lock" else "lock"
    (cache.folder / name).unlink(missing_ok=True)
    _plant(cache.folder / name, kind, victim)
    with NodeCache(tmp_path / "cache", 2**20).open(url, len(data), "tag", serving(data)) as shard:
        assert shard.read(0, len(data)) == data
    assert victim.read_bytes() == b"mine!!"
    assert sorted(os.listdir(tmp_path)) == ["cache", "victim"]


def test_folder_is_private_to_its_user(tmp_path: Path):
    cache = NodeCache(tmp_path, 2**20)
    put(cache, "a")
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o777)
    put(cache, "b")
    assert cache.folder.stat().st_mode & 0o022 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in cache.folder.iterdir())


@pytest.mark.parametrize("kind", ["symlink", "another user's", "file"])
def test_folder_of_another_user_is_rejected(tmp_path: Path, kind: str):
    folder = tmp_path / "cache" / FOLDER
    folder.parent.mkdir()
    if kind == "symlink":
        folder.symlink_to(tmp_path)
    elif kind == "file":
        folder.write_bytes(b"")
    elif os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    else:
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    with pytest.raises(StorageError, match=r"data\.cache\.folder: .*choose another"):
        put(NodeCache(tmp_path / "cache", 2**20), "a")
    assert sorted(os.listdir(tmp_path)) == ["cache"]
