"""Batches prepared by Ray actors equal those that the rank itself prepares, byte for byte."""

from pathlib import Path

import psutil
import pytest

from jobs.loader_actors import RayBackend
from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import open_loader, stream_config, take

pytestmark = pytest.mark.usefixtures("local_ray")

STEPS = 6


@pytest.fixture
def config(make_pairs) -> RunConfig:
    folder = make_pairs("pairs", [17, 9, 24])
    index_shards(Storage(), folder)
    config = stream_config(folder)
    cluster = config.cluster.model_copy(update={"loader_actors": 2, "loader_cpus": 1.0})
    return config.model_copy(update={"cluster": cluster})


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_batches_of_actors_equal_those_of_the_rank(config, rank: int, world: int):
    remote, local = (
        take(config, STEPS, 2, rank=rank, world_size=world, backend=backend) for backend in (RayBackend, None)
    )
    for batch, expected in zip(remote, local, strict=True):
        for name in ("uid", "image_id", "image", "masked_text", "mask_labels", "patch_positions"):
            assert getattr(batch, name).equal(getattr(expected, name)), name


def test_killed_actor_restarts_and_changes_no_batch(config):
    expected = take(config, STEPS, 2)
    with open_loader(config, backend=RayBackend) as loader:
        for number, (whole, batch) in enumerate(zip(expected, loader.batches(2), strict=False)):
            assert batch.image.equal(whole.image)
            if number == 1:
                processes = psutil.Process().children(recursive=True)  # not those of another test process
                actors = [process for process in processes if "ray::ExampleActor" in " ".join(process.cmdline())]
                actors[0].kill()


def test_error_of_an_actor_is_raised_unchanged(config):
    with open_loader(config, backend=RayBackend) as loader:
        for shard in Path(config.sources["pairs"].shards).glob("*.tar"):
            shard.unlink()
        with pytest.raises(DataError, match=r"the shard is missing"):
            next(loader.batches(0))
