"""Contract C1: the data order is the same for every world size, loader, cache and store, and with Ray actors.

By default a set of cases in which every two settings meet; MOME_ORDER=whole MOME_ORDER_STEPS=500 is the whole table.
"""

import os
from itertools import product
from pathlib import Path

import psutil
import pytest

from jobs.loader_actors import RayBackend
from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import copy_shards, hash_of, open_loader, stream_config, take

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


@pytest.fixture
def on_actors(make_pairs, local_ray: None) -> RunConfig:
    folder = make_pairs("pairs", [17, 9, 24])
    index_shards(Storage(), folder)
    config = stream_config(folder)
    cluster = config.cluster.model_copy(update={"loader_actors": 2, "loader_cpus": 1.0})
    return config.model_copy(update={"cluster": cluster})


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_batches_of_actors_equal_those_of_the_rank(on_actors: RunConfig, rank: int, world: int) -> None:
    batches = (take(on_actors, 6, 2, rank=rank, world_size=world, backend=backend) for backend in (RayBackend, None))
    for batch, local in zip(*batches, strict=True):
        for name in ("uid", "image_id", "image", "masked_text", "mask_labels", "patch_positions"):
            assert getattr(batch, name).equal(getattr(local, name)), name


def test_killed_actor_restarts_and_changes_no_batch_and_its_error_is_raised_unchanged(on_actors: RunConfig) -> None:
    whole = take(on_actors, 6, 2)
    with open_loader(on_actors, backend=RayBackend) as loader:
        for number, (local, batch) in enumerate(zip(whole, loader.batches(2), strict=False)):
            assert batch.image.equal(local.image)
            if number == 1:
                processes = psutil.Process().children(recursive=True)  # not those of another test process
                actors = [process for process in processes if "ray::ExampleActor" in " ".join(process.cmdline())]
                actors[0].kill()
    with open_loader(on_actors, backend=RayBackend) as loader:
        for shard in Path(on_actors.sources["pairs"].shards).glob("*.tar"):
            shard.unlink()
        with pytest.raises(DataError, match=r"the shard is missing"):
            next(loader.batches(0))
