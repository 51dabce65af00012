"""The planned memory equals what two ranks of a running engine hold, by category, within a tenth.

`MOME_PLAN_BASE=1` also measures VLMo-base (202 M parameters with its heads): minutes, and about 12 GB.
"""

import os

import pytest

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_config

CASES = [("float32", None), ("bfloat16", None), ("float32", 3)]


def _tiny(zero_stage: int, precision: str, micro_batch_size: int | None) -> RunConfig:
    config = tiny_config(zero_stage=zero_stage, precision=precision, micro_batch_size=micro_batch_size)
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"size": VOCABULARY})})


def _base(zero_stage: int) -> RunConfig:
    objectives = {"itc": {}, "itm": {}, "mlm": {}}
    stage = {"name": "vl", "sources": {"pairs": 1.0}, "objectives": objectives, "steps": 1, "global_batch_size": 2}
    values = {"name": "base", "sources": {"pairs": {"shards": "pairs"}}, "data": {"streams": 2}, "stages": [stage]}
    return validate(values | {"engine": {"precision": "float32", "zero_stage": zero_stage}}, "base")


def _measure(configs: list[RunConfig], index: int) -> list[tuple[dict[str, int], dict[str, int]]]:
    from jobs.bench.step import bench_step
    from pipeline.training.collectives import Collectives
    from pipeline.training.stages import Stage

    results = [bench_step(Stage(config, index), Collectives(), steps=0) for config in configs]
    return [(result["predicted"], result["measured"]) for result in results]


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_memory_of_a_tiny_model_is_as_planned(zero_stage):
    configs = [_tiny(zero_stage, *case) for case in CASES]
    for case, (predicted, measured) in zip(CASES, run_ranks(_measure, 2, configs, 2)[0], strict=True):
        for name in ("states", "activations", "total"):
            # With so few examples, memory outside the micro-batch is a larger fraction than planned.
            tolerance = 0.15 if name == "activations" and case[1] else 0.1
            assert predicted[name] == pytest.approx(measured[name], rel=tolerance), f"{case}: {name}"
        assert predicted["gradients"] == pytest.approx(measured["gradients"], rel=0.1, abs=4096), case


@pytest.mark.skipif(not os.environ.get("MOME_PLAN_BASE"), reason="minutes and gigabytes: MOME_PLAN_BASE=1 runs it")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_memory_of_the_base_model_is_as_planned(zero_stage):
    predicted, measured = run_ranks(_measure, 2, [_base(zero_stage)], 0)[0][0]
    assert predicted == pytest.approx(measured, rel=0.1)
