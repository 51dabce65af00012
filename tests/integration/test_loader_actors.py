"""Batches prepared by Ray actors equal those that the rank itself prepares, byte for byte."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path

import psutil
import pytest

from jobs.loader_actors import RayBackend
from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory, local_backend
from pipeline.data.loading.loader import Loader
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups
from tests.support.data_stream import stream_config

pytestmark = pytest.mark.usefixtures("local_ray")

STEPS = 6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(60) for way in "abc"], 200)


@pytest.fixture
def config(make_pairs) -> RunConfig:
    folder = make_pairs("pairs", [17, 9, 24])
    index_shards(Storage(), folder)
    config = stream_config(folder)
    cluster = config.cluster.model_copy(update={"loader_actors": 2, "loader_cpus": 1.0})
    return config.model_copy(update={"cluster": cluster})


def read(config: RunConfig, tokenizer: Tokenizer, backend: BackendFactory, rank: int, world: int) -> list[Batch]:
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, rank, world, backend
    ) as loader:
        return list(islice(loader.batches(2), STEPS))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_batches_of_actors_equal_those_of_the_rank(config, tokenizer, rank: int, world: int):
    remote = read(config, tokenizer, RayBackend, rank, world)
    for batch, expected in zip(remote, read(config, tokenizer, local_backend, rank, world), strict=True):
        for name in ("uid", "image_id", "image", "masked_text", "mask_labels", "patch_positions"):
            assert getattr(batch, name).equal(getattr(expected, name)), name


def test_killed_actor_restarts_and_changes_no_batch(config, tokenizer):
    expected = read(config, tokenizer, local_backend, 0, 1)
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, 0, 1, RayBackend
    ) as loader:
        for number, (batch, whole) in enumerate(zip(loader.batches(2), expected, strict=False)):
            assert batch.image.equal(whole.image)
            if number == 1:
                os.kill(actor_processes()[0], signal.SIGKILL)


def actor_processes() -> list[int]:
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)  # not those of another test process
        if "ray::ExampleActor" in " ".join(process.cmdline())
    ]


def test_error_of_an_actor_is_raised_unchanged(config, tokenizer):
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, 0, 1, RayBackend
    ) as loader:
        for shard in Path(config.sources["pairs"].shards).glob("*.tar"):
            shard.unlink()
        with pytest.raises(DataError, match=r"the shard is missing"):
            next(loader.batches(0))
