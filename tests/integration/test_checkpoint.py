"""Contracts C4 and C5 at the engine: what a checkpoint holds is what was there, at any world size and ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, tiny_batch, tiny_config

STAGE = 2
RATE = 1e-3


def _engine(zero_stage: int):
    """The last tiny stage's engine and step on this rank, with some parts frozen."""
    from pipeline.models import build_model
    from pipeline.models.model import Heads
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.stages import trained_parts
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage)
    stage = config.stages[STAGE]
    collectives = Collectives()
    model = build_model(config.model, VOCABULARY, Heads("pixels"), seed=5)
    trained = trained_parts(model, config, stage) - {"vision_expert.lower", "image_embedding"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    engine = DeepSpeedEngine(model, config, stage, collectives)
    return (
        config,
        stage,
        collectives,
        engine,
        TrainingStep(engine, config, stage, collectives),
    )


def _run(engine, step, config, stage, collectives, steps: range) -> list[float]:
    losses = []
    for number in steps:
        batch = tiny_batch(config, number, collectives.rank, collectives.world_size, stage.batch)
        loss = step(batch)["loss"]
        engine.step(RATE)
        losses.append(float(collectives.sum(loss)))
    return losses


def _store(config, collectives, folder: str, keep: int = 9):
    from pipeline.data.storage import Storage
    from pipeline.training.checkpoint import CheckpointStore

    return CheckpointStore(Storage(config.storage), folder, collectives, keep)


def _metadata(config, stage_step: int) -> dict:
    return {
        "step": stage_step,
        "stage": "vision_language",
        "stage_step": stage_step,
        "plan_digest": "plan",
        "data_counts": {},
        "zero_stage": config.engine.zero_stage,
    }


def _train_and_save(zero_stage: int, folder: str) -> dict:
    """Three steps, a checkpoint, two more steps."""
    config, stage, collectives, engine, step = _engine(zero_stage)
    before = _run(engine, step, config, stage, collectives, range(3))
    _store(config, collectives, folder).save(engine.fragments(), _metadata(config, 3))
    after = _run(engine, step, config, stage, collectives, range(3, 5))
    return {"before": before, "after": after}


def _restore_and_train(zero_stage: int, folder: str) -> dict:
    """The checkpoint into a fresh engine; what it then holds, and the two steps after it."""
    from pipeline.training.deepspeed_engine import KINDS

    config, stage, collectives, engine, step = _engine(zero_stage)
    found = _store(config, collectives, folder).latest()
    assert found is not None
    checkpoint, saved = found
    engine.restore(saved)
    exact = all(
        torch.equal(value, saved.read(fragment.name, kind, fragment.start, fragment.start + len(value)))
        for fragment in engine.fragments()
        for kind, value in fragment.values.items()
        if kind in KINDS
    )
    after = _run(engine, step, config, stage, collectives, range(3, 5))
    return {"exact": exact, "after": after, "stage_step": checkpoint.stage_step}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, run_ranks(_train_and_save, 2, 2, folder)[0]


def test_resume_at_the_same_world_size_is_bit_equal(saved: tuple[str, dict]) -> None:
    folder, trained = saved
    for answer in run_ranks(_restore_and_train, 2, 2, folder):
        assert answer["exact"]
        assert answer["stage_step"] == 3
        assert answer["after"] == trained["after"]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (3, 3), (3, 1)])
def test_resume_at_another_world_size_and_zero_stage_restores_every_bit(
    saved: tuple[str, dict], world_size: int, zero_stage: int
) -> None:
    folder, trained = saved
    for answer in run_ranks(_restore_and_train, world_size, zero_stage, folder):
        assert answer["exact"]
        assert answer["after"] == pytest.approx(trained["after"], rel=1e-5)


def test_stage_3_state_reads_at_stage_1(tmp_path: Path) -> None:
    trained = run_ranks(_train_and_save, 2, 3, str(tmp_path))[0]
    for answer in run_ranks(_restore_and_train, 2, 1, str(tmp_path)):
        assert answer["exact"]
        assert answer["after"] == pytest.approx(trained["after"], rel=1e-5)
