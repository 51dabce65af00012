"""A process that reads random shards through a node cache and checks every byte.

python tests/support/cache_reader.py CACHE MAX_BYTES STORE SEED ROUNDS
"""

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data.reading import cache as module
from pipeline.data.reading.cache import NodeCache
from pipeline.data.storage import Storage

SIZE, PIECE = 40_000, 2_000


def content(name: str) -> bytes:
    """Return the bytes of a stored file."""
    return np.random.default_rng(int(name)).bytes(SIZE)


def fill(store: Path, files: int) -> Path:
    """Write the store's files."""
    store.mkdir()
    for number in range(files):
        (store / f"{number}").write_bytes(content(f"{number}"))
    return store


def start_reader(cache: NodeCache, store: Path, seed: int, rounds: int = 100_000) -> subprocess.Popen:
    """Start this program as a process that shares the cache's folder."""
    arguments = [cache.folder, cache.max_bytes, store, seed, rounds]
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)])


def held_bytes(cache: NodeCache) -> int:
    """Return the bytes of all cached files, with the full size of those being downloaded."""
    with cache._locked():
        return sum(path.stat().st_size for path in cache.folder.iterdir() if module._CACHE_FILE.fullmatch(path.name))


def open_checked(cache: NodeCache, store: Path, name: str) -> module.OpenShard:
    """Return a pinned file of the cache after checking its content; each piece takes a moment to read."""
    url = str(store / name)
    fetch = partial(map, lambda piece: time.sleep(0.0005) or Storage().read(url, *piece))
    shard = cache.open(url, SIZE, "tag", fetch)
    assert os.pread(shard.descriptor, SIZE, 0) == content(name), f"{name} is damaged"
    return shard


def read_files(cache: NodeCache, store: Path, seed: int, rounds: int) -> None:
    """Open a random file each round and keep the one before pinned."""
    names, pinned, pinned_content = sorted(os.listdir(store)), None, b""
    for name in random.Random(seed).choices(names, k=rounds):
        shard = open_checked(cache, store, name)
        if pinned is not None:
            assert pinned.path.exists(), "a file was evicted while it was pinned"
            assert os.pread(pinned.descriptor, SIZE, 0) == pinned_content
        pinned, pinned_content = shard, content(name)


if __name__ == "__main__":
    module.PIECE = PIECE
    folder, max_bytes, *rest = sys.argv[1:]
    read_files(NodeCache(Path(folder), int(max_bytes)), Path(rest[0]), int(rest[1]), int(rest[2]))
