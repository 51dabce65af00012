"""Contracts C4 and C5 at the engine: a checkpoint restores every bit, at any world size and ZeRO stage."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_model import tiny_config

STAGE = 2
FROZEN = ("vision_expert.lower", "image_embedding")


def _engine(zero_stage: int, ema_decay: float | None = None, **engine: Any):
    """Build the engine of the stage with all of VLMo's objectives; some modules are frozen."""
    from tests.support.engines import build_engine, tiny_model

    config = tiny_config(zero_stage=zero_stage, **engine)
    optimizer = config.stages[STAGE].optimizer.model_copy(update={"ema_decay": ema_decay})
    stages = [stage.model_copy(update={"optimizer": optimizer}) for stage in config.stages]
    config = config.model_copy(update={"stages": tuple(stages)})
    return build_engine(config, STAGE, model=tiny_model(config, STAGE, freeze=FROZEN))


def _train_and_save(zero_stage: int, folder: str, offload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make three steps, save a checkpoint, and make two more steps while it is written."""
    built = _engine(zero_stage, **(offload or {}))
    built.train(range(3))
    store = built.save(folder, 3)
    losses = built.train(range(3, 5))
    store.wait()
    return {"losses": losses, "weights": built.engine.weights(), "norm": built.engine.gradient_norm()}


def _restore_and_train(zero_stage: int, folder: str, offload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Restore the checkpoint into a new engine and make the two steps after it."""
    built = _engine(zero_stage, **(offload or {}))
    exact = built.restore(folder)
    losses = built.train(range(3, 5))
    weights = built.engine.weights()
    built.engine.close()
    return {"exact": exact, "losses": losses, "weights": weights, "norm": built.engine.gradient_norm()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, run_ranks(_train_and_save, 2, 2, folder)[0]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), (1, 0), (3, 3), (3, 1)])
def test_state_is_restored_on_other_ranks_and_zero_stages(saved: tuple[str, dict], world_size: int, zero_stage: int):
    """At the same world size the losses are bit-equal too."""
    folder, trained = saved
    for resumed in run_ranks(_restore_and_train, world_size, zero_stage, folder):
        assert resumed["exact"]
        assert resumed["losses"] == pytest.approx(trained["losses"], rel=0 if world_size == 2 else 1e-5, abs=0)


OFFLOADS: list[tuple[int, dict[str, Any]]] = [
    *((stage, {"offload_optimizer": True}) for stage in (1, 2, 3)),
    (3, {"offload_optimizer": True, "offload_parameters": True}),
    (3, {"offload_parameters": True}),
]


def _restore_into_each(folder: str) -> list[dict[str, Any]]:
    return [_restore_and_train(zero_stage, folder, offload) for zero_stage, offload in OFFLOADS]


def test_state_is_restored_into_engines_that_offload(saved: tuple[str, dict]) -> None:
    """Weights and moments are bit-equal; later losses, norms and weights equal the uninterrupted run's."""
    folder, trained = saved
    for layout, first, *others in zip(OFFLOADS, *run_ranks(_restore_into_each, 2, folder), strict=True):
        assert all(resumed["exact"] for resumed in (first, *others)), layout
        assert first["losses"] == pytest.approx(trained["losses"], rel=1e-5), layout
        assert first["norm"] == pytest.approx(trained["norm"], rel=1e-4), layout
        for name, weight in trained["weights"].items():
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=f"{layout} {name}")


@pytest.mark.parametrize(
    ("offload", "world_size"), [(None, 2), ({"offload_optimizer": True, "offload_parameters": True}, 1)]
)
def test_zero_3_state_is_restored_at_zero_1(tmp_path: Path, offload: dict[str, Any] | None, world_size: int) -> None:
    trained = run_ranks(_train_and_save, 2, 3, str(tmp_path), offload)[0]
    for resumed in run_ranks(_restore_and_train, world_size, 1, str(tmp_path)):
        assert resumed["exact"]
        assert resumed["losses"] == pytest.approx(trained["losses"], rel=1e-5)


LONG = "MOME_LONG_RUNS" in os.environ  # ten minutes
SESSION_STEPS = 10 if LONG else 2
# Ranks and ZeRO stage of each session.
SESSIONS = [[(2, 1), (1, 2), (4, 3), (3, 1)], [(2, 3), (1, 1), (4, 2), (3, 3)], [(2, 2), (1, 3), (4, 1), (3, 2)]]


def _session(zero_stage: int, folder: str, steps: range, save: bool) -> tuple[bool, list[float]]:
    """Resume if there is a checkpoint; return whether the restored state is bit-equal, and the steps' losses."""
    built = _engine(zero_stage)
    exact = built.restore(folder) is not False
    losses = built.train(steps)
    if save:
        built.save(folder, steps.stop).wait()
    return exact, losses


@pytest.mark.timeout(7200)
def test_losses_on_changing_ranks_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    total = range(SESSION_STEPS * len(SESSIONS[0]))
    uninterrupted = run_ranks(_session, 2, 2, str(tmp_path / "none"), total, False, seconds=3600.0)[0][1]
    for number, sessions in enumerate(SESSIONS if LONG else SESSIONS[:1]):
        losses: list[float] = []
        for index, (world_size, zero_stage) in enumerate(sessions):
            steps = range(SESSION_STEPS * index, SESSION_STEPS * (index + 1))
            folder = str(tmp_path / str(number))
            results = run_ranks(_session, world_size, zero_stage, folder, steps, True, seconds=3600.0)
            assert all(exact for exact, _ in results), sessions[index]
            losses += results[0][1]
        assert losses == pytest.approx(uninterrupted, rel=1e-5), sessions


EMA_DECAY = 0.7


def _averages(
    folder: str, zero_stage: int, steps: range, save: bool, ema_decay: float | None = EMA_DECAY
) -> dict[str, Any]:
    """Make steps with a moving average, after the checkpoint in `folder` if any; return the stage's final weights."""
    built = _engine(zero_stage, ema_decay)
    built.restore(folder)
    built.train(steps)
    if save:
        built.save(folder, steps.stop).wait()
    masters = {(fragment.name, fragment.start): fragment.values["weight"] for fragment in built.engine.fragments()}
    return {"average": built.engine.weights(), "masters": masters}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_ranks(_averages, 2, str(tmp_path_factory.mktemp("none")), 2, range(5), False)[0]["average"]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), (1, 0), (1, 2), (3, 3)])
def test_average_is_equal_at_every_world_size_and_zero_stage(tmp_path, uninterrupted, world_size, zero_stage) -> None:
    """At the same world size it is bit-equal."""
    run_ranks(_averages, 2, str(tmp_path), 2, range(3), True)
    resumed = run_ranks(_averages, world_size, str(tmp_path), zero_stage, range(3, 5), False)[0]["average"]
    rtol, atol = (0.0, 0.0) if world_size == 2 else (1e-4, 1e-6)
    for name, average in uninterrupted.items():
        torch.testing.assert_close(resumed[name], average, rtol=rtol, atol=atol, msg=name)


def test_average_is_that_of_the_weights_of_every_step(tmp_path: Path) -> None:
    """a_t = k a + (1 - k) w_t, with k = min(ema_decay, (1 + t) / (10 + t)) and a_0 = w_0."""
    masters = [
        run_ranks(_averages, 1, str(tmp_path / str(steps)), 0, range(steps), False)[0]["masters"] for steps in range(4)
    ]
    averages = run_ranks(_averages, 1, str(tmp_path / "again"), 0, range(3), False)[0]["average"]
    for name, start in masters[0]:
        expected = masters[0][name, start].clone()
        for step in (1, 2, 3):
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * masters[step][name, start]
        torch.testing.assert_close(averages[name].flatten(), expected, rtol=1e-6, atol=1e-8, msg=name)


def test_average_added_on_resume_starts_from_restored_weights(tmp_path: Path) -> None:
    run_ranks(_averages, 1, str(tmp_path), 2, range(3), True, None)
    resumed = run_ranks(_averages, 1, str(tmp_path), 2, range(3, 3), False)[0]
    for (name, start), master in resumed["masters"].items():
        average = resumed["average"][name].flatten()
        assert torch.equal(average[start : start + len(master)], master), name
