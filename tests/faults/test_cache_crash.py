"""Processes that share a node cache are killed at random moments; the next process finds it consistent."""

import random
import signal
import time
from pathlib import Path

import pytest

from pipeline.data.reading import cache as module
from pipeline.data.reading.cache import NodeCache
from tests.support.cache_reader import SIZE, fill, held_bytes, open_checked, read_files, start_reader

FILES = 12


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "PIECE", 2_000)
    fill(tmp_path / "store", FILES)
    return tmp_path / "store"


def wait_for_part(cache: NodeCache) -> None:
    """Wait until a download is in progress."""
    deadline = time.monotonic() + 60
    while not list(cache.folder.glob("*.part")):
        assert time.monotonic() < deadline, "no download began"


def test_next_process_cleans_up_a_killed_download(tmp_path: Path, store: Path):
    cache = NodeCache(tmp_path / "cache", 4 * SIZE)
    for seed in range(3):
        process = start_reader(cache, store, seed)
        wait_for_part(cache)
        process.send_signal(signal.SIGSTOP)  # probably in the middle of a download
        partial = list(cache.folder.glob("*.part"))
        process.kill()
        process.wait()
        next_one = NodeCache(tmp_path / "cache", 4 * SIZE)
        open_checked(next_one, store, "0").close()
        assert not list(cache.folder.glob("*.part")), f"{partial} stayed"
        for number in range(FILES):
            open_checked(next_one, store, f"{number}").close()
        assert held_bytes(next_one) <= next_one.max_bytes


@pytest.mark.parametrize("processes", [1, 3])
def test_cache_is_consistent_after_random_kills(tmp_path: Path, store: Path, processes: int):
    """Other processes keep reading, and the whole budget can be used after the last kill."""
    cache, chance = NodeCache(tmp_path / "cache", 8 * SIZE), random.Random(processes)
    running = [start_reader(cache, store, seed) for seed in range(processes)]
    for kill in range(8):
        wait_for_part(cache)
        time.sleep(chance.uniform(0, 0.1))
        victim = running.pop(0)
        assert victim.poll() is None, "a process that was not killed has ended"
        victim.kill()
        victim.wait()
        assert held_bytes(cache) <= cache.max_bytes
        running.append(start_reader(cache, store, 100 + kill))
        if processes == 1:
            read_files(NodeCache(tmp_path / "cache", 8 * SIZE), store, kill, 5)
    time.sleep(0.5)
    for process in running:
        assert process.poll() is None
        process.kill()
        process.wait()
    last = NodeCache(tmp_path / "cache", 8 * SIZE)
    shards = [open_checked(last, store, f"{number}") for number in range(8)]
    assert held_bytes(last) == 8 * SIZE
    assert {path.name for path in last.folder.iterdir()} == {"lock", *(shard.path.name for shard in shards)}
    for shard in shards:
        shard.close()
