"""Contract C1: the data order is the same for every world size, loader, cache and store.

By default a set of cases in which every two settings meet. For the whole table over 500 batches:

    MOME_ORDER=whole MOME_ORDER_STEPS=500 python -m pytest tests/integration/test_data_order.py
"""

import os
from itertools import product
from pathlib import Path

import pytest

from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import copy_shards, hash_of, stream_config

STEPS = int(os.environ.get("MOME_ORDER_STEPS", "12"))
PLACES = ("local", "s3", "s3, cold cache", "s3, warm cache")
CASES = [  # in these sixteen, every two values of different settings meet
    (world, (i + j) % 3, (1, 4)[(i // 2 + j) % 2], place)
    for (i, world), (j, place) in product(enumerate((1, 2, 3, 8)), enumerate(PLACES))
]
if os.environ.get("MOME_ORDER") == "whole":
    CASES = list(product((1, 2, 3, 4, 5, 6, 8), (0, 1, 4), (1, 4), PLACES))
# Starting processes for every rank is what takes long.
MARKED = [pytest.param(*case, marks=[pytest.mark.slow] if case[0] * case[1] > 4 else []) for case in CASES]
expected: list[str] = []  # the fingerprint of the simplest case, filled in by the first test


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
@pytest.mark.parametrize(("world", "workers", "threads", "where"), MARKED)
def test_data_order_is_the_same_everywhere(
    s3, make_pairs, tmp_path: Path, tmp_path_factory, world: int, workers: int, threads: int, where: str
):
    folder = make_pairs("pairs", [9, 4, 10, 7, 12])
    index_shards(Storage(), folder)
    warm = tmp_path_factory.getbasetemp() / "warm cache"
    cache = {"s3, cold cache": tmp_path / "cache", "s3, warm cache": warm}.get(where)
    caching = {"cache": {"folder": str(cache) if cache else None}}
    config = stream_config(folder) if where == "local" else stream_config(copy_shards(folder, s3), s3.config, **caching)

    def read(world: int, workers: int, threads: int, steps: int = STEPS) -> str:
        return hash_of(config, range(steps), world, num_workers=workers, threads_per_worker=threads)

    if where == "s3, warm cache":
        read(1, 0, 4, steps=6)  # more than an epoch: every shard
    if not expected:
        expected.append(read(1, 0, 1))
    assert [read(world, workers, threads)] == expected
