"""Ranks agree: collectives of uneven parts, equal modules (contract C3), one micro-batch size, one preflight result."""

from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

BATCHES = (8, 2)  # on three ranks: 2, 3 and 3 examples; 0, 1 and 1


def _exchanged() -> tuple[list[Any], Any, list[tuple[int, list[int], list[int]]]]:
    """Return gathered and broadcast values; of each batch: number of own examples, all gathered ones, fetched ones."""
    from pipeline.data.order import share
    from pipeline.training.collectives import Collectives

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


def checked_step(collectives: Any, rank: int, *steps: int) -> None:
    """Run steps under the check of every tenth step; an even rank reads images and an odd one texts."""
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.models.model import HeadConfig
    from pipeline.training.health import ExecutionOrderCheck

    config = tiny_config()
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    check = ExecutionOrderCheck(collectives, every=10)
    check.on_model_built(model)
    batch = tiny_batch(config, 0, rank, 2, 12)
    image = ForwardInput(heads=("itc",), image=batch.image)
    text = ForwardInput(heads=("itc",), text=batch.text, text_keep=batch.text_keep)
    check.before_step(0)
    for step in steps:
        check.before_step(step)
        model({"tower": text if rank else image})
        check.after_backward(step)


def _step_of_rank(is_diverging: bool) -> str:
    from pipeline.config.errors import RunFailed
    from pipeline.training.collectives import Collectives

    collectives = Collectives()
    try:
        checked_step(collectives, collectives.rank if is_diverging else 0, 0)
    except RunFailed as error:
        return str(error)
    return ""


def test_ranks_running_different_experts_are_stopped_by_name() -> None:
    assert run_ranks(_step_of_rank, 2, False) == ["", ""]
    for message in run_ranks(_step_of_rank, 2, True):
        assert "ranks ran different modules" in message
        assert "rank 0 ran 'image_embedding" in message
        assert "rank 1 ran 'text_embedding" in message
    checked_step(None, 0, 3, 9, 11)  # compares nothing: that would need collectives


def _micro_batch(configs: list[RunConfig]) -> int | str | None:
    from pipeline.config.errors import RunFailed
    from pipeline.training.collectives import Collectives
    from pipeline.training.stages import Stage
    from pipeline.training.workload import with_micro_batch

    collectives = Collectives()
    try:
        stage = with_micro_batch(Stage(configs[collectives.rank], 2), collectives, VOCABULARY)
        return stage.run.engine.micro_batch_size
    except RunFailed as error:
        return str(error)


def test_automatic_micro_batch_fits_the_smallest_rank_and_a_configured_one_is_kept() -> None:
    from pipeline.planning.estimate import memory_at
    from pipeline.training.deepspeed_setup import sharding_of
    from pipeline.training.stages import Stage
    from pipeline.training.workload import work_of

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


def _preflight(config: RunConfig) -> tuple[dict[str, str], str]:
    from pipeline.config.errors import MomeError
    from pipeline.training.preflight import preflight

    try:
        return {item.name: item.message for item in preflight(config, lambda _: None)}, ""
    except MomeError as error:
        return {}, str(error)


def preflight_config(folder: Path) -> RunConfig:
    shards, pairs = str(folder / "scenes"), {"itc": {}, "itm": {}, "mlm": {}}
    vision = {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}, "global_batch_size": 8}
    scenes = {"shards": shards, "synthetic": {"scenes": 40, "image_size": 24}}
    values = {
        "name": "checked",
        "output": str(folder / "runs"),
        "model": {"width": 32, "layers": 2, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 8},
        "sources": {"scenes": scenes, "pictures": {"shards": shards, "type": "images"}},
        "data": {"streams": 2},
        "stages": [
            vision | {"steps": 9},
            {"name": "pairs", "sources": {"scenes": 1.0}, "objectives": pairs, "steps": 9, "global_batch_size": 6},
        ],
        "engine": {"precision": "float32", "zero_stage": 2},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    return validate(values, "checked")


def test_preflight_steps_through_every_stage_and_leaves_nothing(tmp_path: Path) -> None:
    from pipeline.tracking.mlflow_server import connect

    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()  # makes the database
    answers = run_ranks(_preflight, 2, preflight_config(tmp_path))
    assert [failure for _, failure in answers] == ["", ""]
    checks = answers[0][0]
    assert list(checks) == ["storage", "tracking", "data and vocabulary", "stage vision", "stage pairs"]
    assert "deleted" in checks["storage"]
    assert "deleted" in checks["tracking"]
    assert "8 rows = 2 ranks x 1 micro-batches" in checks["stage vision"]
    assert not list((tmp_path / "runs").glob("*"))
    assert not client.search_runs([item.experiment_id for item in client.search_experiments()])


def test_preflight_failure_of_one_rank_is_reported_on_all(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the runs' folder should be")
    for _, failure in run_ranks(_preflight, 2, preflight_config(tmp_path)):
        assert "preflight, storage: rank 0" in failure
        assert "rank 1" in failure
