"""`engine.micro_batch_size: auto`: the largest size that fits the smallest rank, equal on all ranks."""

from __future__ import annotations

import pytest

from pipeline.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_config

STAGE = 2


def _resolved(configs: list[RunConfig]) -> int | str | None:
    from pipeline.config.errors import RunFailed
    from pipeline.training.collectives import Collectives
    from pipeline.training.stages import Stage
    from pipeline.training.workload import with_micro_batch

    collectives = Collectives()
    try:
        stage = with_micro_batch(Stage(configs[collectives.rank], STAGE), collectives, VOCABULARY)
        return stage.run.engine.micro_batch_size
    except RunFailed as error:
        return str(error)


def _needed(rows: int) -> float:
    """Return the estimated GB that each of two ranks needs for micro-batches of `rows` examples."""
    from pipeline.planning.estimate import memory_at
    from pipeline.training.deepspeed_setup import sharding_of
    from pipeline.training.stages import Stage
    from pipeline.training.workload import work_of

    stage = Stage(tiny_config(zero_stage=2), STAGE)
    work = work_of(stage, VOCABULARY, "cpu")
    return memory_at(work, sharding_of(stage, 2, on_cuda=False), 6, rows).total / 1e9


def test_smallest_rank_decides_for_all():
    room = (_needed(3) + _needed(4)) / 2
    small, large = (tiny_config(zero_stage=2, micro_batch_size="auto", memory_gb=gb) for gb in (room, 100.0))
    assert run_ranks(_resolved, 2, [large, small]) == [3, 3]


def test_cpu_without_memory_limit_is_not_divided():
    config = tiny_config(micro_batch_size="auto")
    assert run_ranks(_resolved, 2, [config, config]) == [None, None]


def test_rank_too_small_for_one_example_is_an_error():
    config = tiny_config(micro_batch_size="auto", memory_gb=1e-6)
    for message in run_ranks(_resolved, 2, [config, config]):
        assert isinstance(message, str)
        assert "not one row fits" in message


@pytest.mark.parametrize("size", [None, 4])
def test_configured_size_is_kept(size):
    config = tiny_config(micro_batch_size=size)
    assert run_ranks(_resolved, 1, [config]) == [size]
