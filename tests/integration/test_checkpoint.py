"""Contracts C4 and C5 at the engine: what a checkpoint holds is what was there, at any world size and ZeRO stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

STAGE = 2
RATE = 1e-3


def _engine(zero_stage: int, ema: float | None = None, **keys: Any):
    """The last tiny stage's engine and step on this rank, with some parts frozen, and perhaps a moving average."""
    from pipeline.models import build_model
    from pipeline.models.model import HeadConfig
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.stages import trained_parts
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage, **keys)
    stage = config.stages[STAGE]
    stage = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"ema": ema})})
    collectives = Collectives()
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
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
        batch = tiny_batch(config, number, collectives.rank, collectives.world_size, stage.global_batch_size)
        loss = step(batch)["loss"]
        engine.step(RATE)
        losses.append(float(collectives.sum(loss)))
    return losses


def _store(config, collectives, folder: str, keep: int = 9):
    from pipeline.config.schema import CheckpointConfig
    from pipeline.data.storage import Storage
    from pipeline.training.checkpoint import CheckpointStore

    return CheckpointStore(Storage(config.storage), folder, collectives, CheckpointConfig(keep=keep))


def _metadata(config, stage_step: int) -> dict:
    return {
        "step": stage_step,
        "stage": "vision_language",
        "stage_step": stage_step,
        "plan_digest": "plan",
        "data_counts": {},
        "zero_stage": config.engine.zero_stage,
    }


def _train_and_save(zero_stage: int, folder: str, keys: dict[str, Any] = {}) -> dict:  # noqa: B006 - read alone
    """Three steps, a checkpoint, two more steps."""
    config, stage, collectives, engine, step = _engine(zero_stage, **keys)
    before = _run(engine, step, config, stage, collectives, range(3))
    store = _store(config, collectives, folder)
    store.save(engine.fragments(), _metadata(config, 3))  # written while training goes on
    after = _run(engine, step, config, stage, collectives, range(3, 5))
    store.wait()
    return {"before": before, "after": after, "handed_over": engine.weights(), "norm": engine.gradient_norm()}


def _restore_and_train(zero_stage: int, folder: str, keys: dict[str, Any] = {}) -> dict:  # noqa: B006 - read alone
    """The checkpoint into a fresh engine; what it then holds, and the two steps after it."""
    from pipeline.training.deepspeed_engine import KINDS

    config, stage, collectives, engine, step = _engine(zero_stage, **keys)
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
    handed_over = engine.weights()
    engine.close()
    return {
        "exact": exact,
        "after": after,
        "stage_step": checkpoint.stage_step,
        "handed_over": handed_over,
        "norm": engine.gradient_norm(),
    }


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


LONG = "MOME_LONG_RUNS" in os.environ  # ten minutes
SESSION_STEPS = 10 if LONG else 2
# Ranks and ZeRO stage of each session.
SESSIONS = [[(2, 1), (1, 2), (4, 3), (3, 1)], [(2, 3), (1, 1), (4, 2), (3, 3)], [(2, 2), (1, 3), (4, 1), (3, 2)]]


def _session(zero_stage: int, folder: str, steps: range, save: bool) -> tuple[bool, list[float]]:
    """Whether every weight and moment restored is bit-equal to what was saved, and the steps' losses."""
    config, stage, collectives, engine, step = _engine(zero_stage)
    store = _store(config, collectives, folder)
    exact = True
    if (found := store.latest()) is not None:
        engine.restore(found[1])
        exact = all(
            torch.equal(value, found[1].read(fragment.name, kind, fragment.start, fragment.start + len(value)))
            for fragment in engine.fragments()
            for kind, value in fragment.values.items()
        )
    losses = _run(engine, step, config, stage, collectives, steps)
    if save:
        store.save(engine.fragments(), _metadata(config, steps.stop))
        store.wait()
    return exact, losses


@pytest.mark.timeout(7200)
def test_sessions_on_changing_ranks_have_the_uninterrupted_losses(tmp_path: Path) -> None:
    total = SESSION_STEPS * len(SESSIONS[0])
    uninterrupted = run_ranks(_session, 2, 2, str(tmp_path / "none"), range(total), False, seconds=3600.0)[0][1]
    for number, sessions in enumerate(SESSIONS if LONG else SESSIONS[:1]):
        losses: list[float] = []
        for index, (world_size, zero_stage) in enumerate(sessions):
            steps = range(SESSION_STEPS * index, SESSION_STEPS * (index + 1))
            answers = run_ranks(
                _session, world_size, zero_stage, str(tmp_path / str(number)), steps, True, seconds=3600.0
            )
            assert all(exact for exact, _ in answers), sessions[index]
            losses += answers[0][1]
        worst = max(abs(got / right - 1) for got, right in zip(losses, uninterrupted, strict=True))
        print(f"{sessions}: worst relative difference of a loss {worst:.1e}")
        assert worst <= 1e-5, sessions


OFFLOADS: list[tuple[int, dict[str, Any]]] = [
    *((stage, {"offload_optimizer": True}) for stage in (1, 2, 3)),
    (3, {"offload_optimizer": True, "offload_parameters": True}),
    (3, {"offload_parameters": True}),
]


def _restore_into_each(folder: str) -> list[dict]:
    return [_restore_and_train(zero_stage, folder, keys) for zero_stage, keys in OFFLOADS]


def test_state_of_no_offload_reads_at_every_stage_with_offload(saved: tuple[str, dict]) -> None:
    """Its moments bit for bit, then the losses, norms and weights of the whole run."""
    folder, trained = saved
    for answers in zip(OFFLOADS, *run_ranks(_restore_into_each, 2, folder), strict=True):
        where, first, *_ = answers
        assert all(answer["exact"] for answer in answers[1:]), where
        assert first["after"] == pytest.approx(trained["after"], rel=1e-5), where
        assert first["norm"] == pytest.approx(trained["norm"], rel=1e-4), where
        for name, weight in trained["handed_over"].items():
            torch.testing.assert_close(first["handed_over"][name], weight, rtol=1e-4, atol=1e-6, msg=f"{where} {name}")


def test_state_of_offload_at_stage_3_reads_without_it_at_another_world_size(tmp_path: Path) -> None:
    keys = {"offload_optimizer": True, "offload_parameters": True}
    trained = run_ranks(_train_and_save, 2, 3, str(tmp_path), keys)[0]
    (answer,) = run_ranks(_restore_and_train, 1, 1, str(tmp_path))
    assert answer["exact"]
    assert answer["after"] == pytest.approx(trained["after"], rel=1e-5)


EMA = 0.7


def _averages(folder: str, zero_stage: int, first: int, last: int, save: bool, ema: float | None = EMA) -> dict:
    """Steps first … last with a moving average, from the checkpoint in `folder` if any; what would be handed over."""
    config, stage, collectives, engine, step = _engine(zero_stage, ema)
    store = _store(config, collectives, folder)
    if (found := store.latest()) is not None:
        engine.restore(found[1])
    _run(engine, step, config, stage, collectives, range(first, last))
    if save:
        store.save(engine.fragments(), _metadata(config, last))
        store.wait()
    masters = {(fragment.name, fragment.start): fragment.values["weight"] for fragment in engine.fragments()}
    return {"handed_over": engine.weights(), "masters": masters}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_ranks(_averages, 2, str(tmp_path_factory.mktemp("none")), 2, 0, 5, False)[0]


def test_the_average_of_a_resumed_run_is_bit_equal_to_the_uninterrupted(tmp_path: Path, uninterrupted: dict) -> None:
    run_ranks(_averages, 2, str(tmp_path), 2, 0, 3, True)
    resumed = run_ranks(_averages, 2, str(tmp_path), 2, 3, 5, False)[0]
    for name, average in uninterrupted["handed_over"].items():
        assert torch.equal(average, resumed["handed_over"][name]), name


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (1, 2), (3, 3)])
def test_the_average_is_the_same_at_every_world_size_and_zero_stage(
    tmp_path: Path, uninterrupted: dict, world_size: int, zero_stage: int
) -> None:
    """Restored there from another world's checkpoint, it is what the uninterrupted run has, within C2's tolerance."""
    run_ranks(_averages, 2, str(tmp_path), 1, 0, 3, True)
    resumed = run_ranks(_averages, world_size, str(tmp_path), zero_stage, 3, 5, False)[0]
    for name, average in uninterrupted["handed_over"].items():
        torch.testing.assert_close(resumed["handed_over"][name], average, rtol=1e-4, atol=1e-6, msg=name)


def test_the_average_is_that_of_the_weights_of_every_step(tmp_path: Path) -> None:
    """Computed beside the engine: a_t = k a + (1 - k) w_t, with k = min(ema, (1 + t) / (10 + t)) and a_0 = w_0."""
    masters = [
        run_ranks(_averages, 1, str(tmp_path / str(steps)), 0, 0, steps, False)[0]["masters"] for steps in range(4)
    ]
    found = run_ranks(_averages, 1, str(tmp_path / "again"), 0, 0, 3, False)[0]["handed_over"]
    for name, start in masters[0]:
        expected = masters[0][name, start].clone()
        for step in (1, 2, 3):
            keep = min(EMA, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * masters[step][name, start]
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-6, atol=1e-8, msg=name)


def test_an_average_asked_for_on_resume_starts_from_the_restored_weights(tmp_path: Path) -> None:
    run_ranks(_averages, 1, str(tmp_path), 2, 0, 3, True, None)
    found = run_ranks(_averages, 1, str(tmp_path), 2, 3, 3, False)[0]
    for (name, start), master in found["masters"].items():
        whole = found["handed_over"][name].flatten()
        assert torch.equal(whole[start : start + len(master)], master), name
