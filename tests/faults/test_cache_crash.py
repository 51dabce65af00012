"""Processes that share a node cache are killed at random moments; the next process finds it consistent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.reading import cache as module
from pipeline.data.reading.cache import NodeCache
from tests.support.cache_reader import SIZE, content, fill, held_bytes, open_checked, read_files

FILES = 12
USER = Path(__file__).resolve().parents[1] / "support" / "cache_reader.py"


def start(cache: NodeCache, store: Path, seed: int) -> subprocess.Popen:
    command = [sys.executable, str(USER), str(cache.folder.parent), str(cache.max_bytes), str(store), str(seed)]
    return subprocess.Popen([*command, "100000"])


def wait_for_part(cache: NodeCache) -> Path:
    """Wait until a download is in progress."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if parts := list(cache.folder.glob("*.part")):
            return parts[0]
    raise AssertionError("no download began")


def test_next_process_cleans_up_a_killed_download(tmp_path: Path):
    store, cache = tmp_path / "store", NodeCache(tmp_path / "cache", 4 * SIZE)
    fill(store, FILES)
    for seed in range(3):
        process = start(cache, store, seed)
        wait_for_part(cache)
        os.kill(process.pid, signal.SIGSTOP)  # probably in the middle of a download
        partial = list(cache.folder.glob("*.part"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        next_one = NodeCache(tmp_path / "cache", 4 * SIZE)
        open_checked(next_one, store, "0").close()
        assert not list(cache.folder.glob("*.part")), f"{partial} stayed"
        for number in range(FILES):
            open_checked(next_one, store, f"{number}").close()
        assert held_bytes(next_one) <= next_one.max_bytes


@pytest.mark.parametrize("processes", [1, 3])
def test_cache_is_consistent_after_random_kills(tmp_path: Path, processes: int):
    """Other processes keep reading, and the whole budget can be used after the last kill."""
    store, cache = tmp_path / "store", NodeCache(tmp_path / "cache", 8 * SIZE)
    fill(store, FILES)
    chance = random.Random(processes)
    running = [start(cache, store, seed) for seed in range(processes)]
    for kill in range(8):
        wait_for_part(cache)
        time.sleep(chance.uniform(0, 0.1))
        victim = running.pop(0)
        assert victim.poll() is None, "a process that was not killed has ended"
        victim.kill()
        victim.wait()
        assert held_bytes(cache) <= cache.max_bytes
        running.append(start(cache, store, 100 + kill))
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


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 2_000)
    assert len(content("0")) == SIZE
