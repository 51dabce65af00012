"""Ranks agree: collectives of uneven parts, memory as planned, and one result of the preflight.

`MOME_PLAN_BASE=1` also measures VLMo-base (202 M parameters with its heads): minutes, and about 12 GB.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.bench.step import bench_step
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.order import share
from pipeline.planning.estimate import memory_at
from pipeline.tracking.mlflow_server import connect
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import sharding_of
from pipeline.training.preflight import preflight
from pipeline.training.stages import Stage
from pipeline.training.workload import with_micro_batch, work_of
from tests.support.ranks import run_ranks
from tests.support.short_run import short_config
from tests.support.tiny_model import VOCABULARY, tiny_config

BATCHES = (8, 2)  # on three ranks: 2, 3 and 3 examples; 0, 1 and 1


def _exchanged() -> tuple[list[Any], Any, list[tuple[int, list[int], list[int]]]]:
    """Return gathered and broadcast values; of each batch: number of own examples, all gathered ones, fetched ones."""
    collectives = Collectives()
    rank, results = collectives.rank, []
    for batch in BATCHES:
        rows = torch.arange(*share(batch, rank, collectives.world_size))
        followers = collectives.fetcher((rows + 1) % batch, batch)(rows)
        results.append((len(rows), collectives.gather_rows(rows, batch).tolist(), followers.tolist()))
    gathered = collectives.gather_objects({"rank": rank, "text": "é" * rank, "none": None})
    return gathered, collectives.broadcast(["of rank 0", (1, 2.5)] if rank == 0 else "of another"), results


def test_trap_15_values_and_uneven_rows_reach_every_rank() -> None:
    gathered, broadcast, rows = zip(*run_ranks(_exchanged, 3), strict=True)
    assert gathered == ([{"rank": rank, "text": "é" * rank, "none": None} for rank in range(3)],) * 3
    assert broadcast == (["of rank 0", (1, 2.5)],) * 3
    for batch, answers in zip(BATCHES, zip(*rows, strict=True), strict=True):
        assert sum(size for size, _, _ in answers) == batch
        assert len({size for size, _, _ in answers}) == 2
        assert all(gathered == list(range(batch)) for _, gathered, _ in answers)
        assert [row for _, _, fetched in answers for row in fetched] == [(row + 1) % batch for row in range(batch)]


# ---- memory


def _micro_batch(configs: list[RunConfig]) -> int | str | None:
    collectives = Collectives()
    try:
        stage = with_micro_batch(Stage(configs[collectives.rank], 2), collectives, VOCABULARY)
    except RunFailed as error:
        return str(error)
    return stage.run.engine.micro_batch_size


def test_automatic_micro_batch_fits_the_smallest_rank_and_a_configured_one_is_kept() -> None:
    stage = Stage(tiny_config(zero_stage=2), 2)
    work, sharding = work_of(stage, VOCABULARY, "cpu"), sharding_of(stage, 2, on_cuda=False)
    room = sum(memory_at(work, sharding, 6, rows).total / 1e9 for rows in (3, 4)) / 2  # in GB, of 3 examples but not 4
    small, large = (tiny_config(zero_stage=2, micro_batch_size="auto", memory_gb=gb) for gb in (room, 100.0))
    assert run_ranks(_micro_batch, 2, [large, small]) == [3, 3]
    unlimited, tight = (tiny_config(micro_batch_size="auto", **limit) for limit in ({}, {"memory_gb": 1e-6}))
    assert run_ranks(_micro_batch, 2, [unlimited] * 2) == [None, None]
    assert all("not one row fits" in message for message in run_ranks(_micro_batch, 2, [tight] * 2))
    for size in (None, 4):
        assert run_ranks(_micro_batch, 1, [tiny_config(micro_batch_size=size)]) == [size]


def _measure(configs: list[RunConfig], index: int) -> list[tuple[dict[str, int], dict[str, int]]]:
    results = [bench_step(Stage(config, index), Collectives(), steps=0) for config in configs]
    return [(result["predicted"], result["measured"]) for result in results]


MEASURED = [("float32", None), ("bfloat16", None), ("float32", 3)]


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_memory_of_a_tiny_model_is_as_planned(zero_stage: int) -> None:
    tiny = [tiny_config(zero_stage=zero_stage, precision=precision, micro_batch_size=n) for precision, n in MEASURED]
    configs = [c.model_copy(update={"tokenizer": c.tokenizer.model_copy(update={"size": VOCABULARY})}) for c in tiny]
    for case, (predicted, measured) in zip(MEASURED, run_ranks(_measure, 2, configs, 2)[0], strict=True):
        for name in ("states", "activations", "total"):
            # With so few examples, memory outside the micro-batch is a larger fraction than planned.
            tolerance = 0.15 if name == "activations" and case[1] else 0.1
            assert predicted[name] == pytest.approx(measured[name], rel=tolerance), f"{case}: {name}"
        assert predicted["gradients"] == pytest.approx(measured["gradients"], rel=0.1, abs=4096), case


@pytest.mark.skipif(not os.environ.get("MOME_PLAN_BASE"), reason="minutes and gigabytes: MOME_PLAN_BASE=1 runs it")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_memory_of_the_base_model_is_as_planned(zero_stage: int) -> None:
    objectives = {"itc": {}, "itm": {}, "mlm": {}}
    stage = {"name": "vl", "sources": {"pairs": 1.0}, "objectives": objectives, "steps": 1, "global_batch_size": 2}
    values = {"name": "base", "sources": {"pairs": {"shards": "pairs"}}, "data": {"streams": 2}, "stages": [stage]}
    config = validate(values | {"engine": {"precision": "float32", "zero_stage": zero_stage}}, "base")
    predicted, measured = run_ranks(_measure, 2, [config], 0)[0][0]
    assert predicted == pytest.approx(measured, rel=0.1)


# ---- preflight


def _preflight(config: RunConfig) -> dict[str, str] | str:
    try:
        return {name: result["message"] for name, result in preflight(config, lambda _: None).items()}
    except MomeError as error:
        return str(error)


def test_preflight_steps_through_every_stage_and_leaves_nothing(tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()  # makes the database
    config = short_config(f"{tmp_path}/runs", data=str(tmp_path), tracking__uri=f"sqlite:///{tmp_path}/mlflow.db")
    checks, same = run_ranks(_preflight, 2, config)
    assert checks == same
    assert list(checks) == ["storage", "tracking", "data and vocabulary", "stage vision", "stage pairs"]
    parts = {"storage": "deleted", "tracking": "deleted", "stage vision": "8 rows = 2 ranks x 1 micro-batches"}
    assert [checks[name] for name, part in parts.items() if part not in checks[name]] == []
    assert not list((tmp_path / "runs").glob("*"))
    assert not client.search_runs([item.experiment_id for item in client.search_experiments()])


def test_preflight_failure_of_one_rank_is_reported_on_all(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the runs' folder should be")
    failures = run_ranks(_preflight, 2, short_config(f"{tmp_path}/runs", data=str(tmp_path)))
    assert all("preflight, storage: rank 0" in failure and "rank 1" in failure for failure in failures)
