"""Processes that share a node cache are killed at random moments; the next process finds it consistent."""

import random
import time
from pathlib import Path

import pytest

from pipeline.data.reading import cache as module
from pipeline.data.reading.cache import NodeCache
from tests.support.cache_reader import SIZE, fill, held_bytes, open_checked, read_files, start_reader


@pytest.mark.parametrize("processes", [1, 3])
def test_cache_is_consistent_after_random_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int):
    """Other processes keep reading, and the whole budget can be used after the last kill."""
    monkeypatch.setattr(module, "PIECE", 2_000)
    store, chance = fill(tmp_path / "store", 12), random.Random(processes)
    cache = NodeCache(tmp_path / "cache", 8 * SIZE)
    running = [start_reader(cache, store, seed) for seed in range(processes)]
    for kill in range(8):
        deadline = time.monotonic() + 60
        while not list(cache.folder.glob("*.part")):
            assert time.monotonic() < deadline, "no download began"
        time.sleep(chance.uniform(0, 0.1) if kill % 2 else 0.0)
        victim = running.pop(0)
        assert victim.poll() is None, "a process that was not killed has ended"
        victim.kill()
        victim.wait()
        assert held_bytes(cache) <= cache.max_bytes
        if processes == 1:
            read_files(following := NodeCache(tmp_path / "cache", 8 * SIZE), store, kill, 5)
            assert not list(following.folder.glob("*.part")), "a killed process's download stayed"
        running.append(start_reader(cache, store, 100 + kill))
    time.sleep(0.5)
    for process in running:
        assert process.poll() is None
        process.kill()
        process.wait()
    last = NodeCache(tmp_path / "cache", 8 * SIZE)
    shards = [open_checked(last, store, f"{number}") for number in range(8)]
    assert held_bytes(last) == 8 * SIZE
    assert {path.name for path in last.folder.iterdir()} == {"lock", *(shard.path.name for shard in shards)}
