"""Contracts C4 and C5: a checkpoint restores every bit at any world size and ZeRO stage; runs keep the right ones."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.training.checkpoint.committed import read_committed
from pipeline.training.checkpoint.weights import load_weights
from tests.support.ranks import run_ranks
from tests.support.tiny_model import tiny_config

STAGE = 2
FROZEN = ("vision_expert.lower", "image_embedding")
EMA_DECAY = 0.7


def _train(
    folder: str,
    zero_stage: int,
    steps: range,
    later: range | None = None,
    ema_decay: float | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Restore the checkpoint in `folder`, if any, and make steps; save, and make `later` steps while it is written.

    Without `later` nothing is saved. The stage has all of VLMo's objectives; some modules are frozen.
    """
    from tests.support.engines import build_engine, tiny_model

    config = tiny_config(zero_stage=zero_stage, **engine)
    optimizer = config.stages[STAGE].optimizer.model_copy(update={"ema_decay": ema_decay})
    stages = [stage.model_copy(update={"optimizer": optimizer}) for stage in config.stages]
    config = config.model_copy(update={"stages": tuple(stages)})
    built = build_engine(config, STAGE, model=tiny_model(config, STAGE, freeze=FROZEN))
    exact, losses = built.restore(folder), built.train(steps)
    if later is not None:
        store = built.save(folder, steps.stop)
        losses = built.train(later) or losses
        store.wait()
    masters = {(fragment.name, fragment.start): fragment.values["weight"] for fragment in built.engine.fragments()}
    results = {
        "weights": built.engine.weights(),
        "norm": built.engine.gradient_norm() if losses else None,
        "masters": masters,
    }
    built.engine.close()
    return {"exact": exact, "losses": losses, **results}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, run_ranks(_train, 2, folder, 2, range(3), range(3, 5))[0]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), (1, 0), (3, 3), (3, 1)])
def test_state_is_restored_on_other_ranks_and_zero_stages(saved: tuple[str, dict], world_size: int, zero_stage: int):
    """At the same world size the losses are bit-equal too."""
    folder, trained = saved
    for resumed in run_ranks(_train, world_size, folder, zero_stage, range(3, 5)):
        assert resumed["exact"]
        assert resumed["losses"] == pytest.approx(trained["losses"], rel=0 if world_size == 2 else 1e-5, abs=0)


BOTH = {"offload_optimizer": True, "offload_parameters": True}
OFFLOADS: list[tuple[int, dict[str, Any]]] = [
    *((stage, {"offload_optimizer": True}) for stage in (1, 2, 3)),
    *((3, offload) for offload in (BOTH, {"offload_parameters": True})),
]


def _restore_into_each(folder: str) -> list[dict[str, Any]]:
    return [_train(folder, zero_stage, range(3, 5), **offload) for zero_stage, offload in OFFLOADS]


def test_state_is_restored_into_engines_that_offload(saved: tuple[str, dict]) -> None:
    """Weights and moments are bit-equal; later losses, norms and weights equal the uninterrupted run's."""
    folder, trained = saved
    for layout, first, *others in zip(OFFLOADS, *run_ranks(_restore_into_each, 2, folder), strict=True):
        assert all(resumed["exact"] for resumed in (first, *others)), layout
        assert first["losses"] == pytest.approx(trained["losses"], rel=1e-5), layout
        assert first["norm"] == pytest.approx(trained["norm"], rel=1e-4), layout
        for name, weight in trained["weights"].items():
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=f"{layout} {name}")


def test_zero_3_state_is_restored_at_zero_1_also_from_an_engine_that_offloads(tmp_path: Path) -> None:
    for world_size, offload in ((2, {}), (1, BOTH)):
        folder = str(tmp_path / str(world_size))
        trained = run_ranks(partial(_train, **offload), 2, folder, 3, range(3), range(3, 5))[0]
        for resumed in run_ranks(_train, world_size, folder, 1, range(3, 5)):
            assert resumed["exact"]
            assert resumed["losses"] == pytest.approx(trained["losses"], rel=1e-5)


LONG = "MOME_LONG_RUNS" in os.environ  # ten minutes
SESSION_STEPS = 10 if LONG else 2
# Ranks and ZeRO stage of each session.
SESSIONS = [[(2, 1), (1, 2), (4, 3), (3, 1)], [(2, 3), (1, 1), (4, 2), (3, 3)], [(2, 2), (1, 3), (4, 1), (3, 2)]]


@pytest.mark.timeout(7200)
def test_losses_on_changing_ranks_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    total = range(SESSION_STEPS * len(SESSIONS[0]))
    uninterrupted = run_ranks(_train, 2, str(tmp_path / "none"), 2, total, seconds=3600.0)[0]["losses"]
    for number, sessions in enumerate(SESSIONS if LONG else SESSIONS[:1]):
        losses: list[float] = []
        for index, (world_size, zero_stage) in enumerate(sessions):
            steps, folder = total[SESSION_STEPS * index :][:SESSION_STEPS], str(tmp_path / str(number))
            results = run_ranks(_train, world_size, folder, zero_stage, steps, range(0), seconds=3600.0)
            assert all(result["exact"] is not False for result in results), sessions[index]
            losses += results[0]["losses"]
        assert losses == pytest.approx(uninterrupted, rel=1e-5), sessions


# ---- moving averages


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_ranks(_train, 2, str(tmp_path_factory.mktemp("none")), 2, range(5), None, EMA_DECAY)[0]["weights"]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 2), (1, 0), (1, 2), (3, 3)])
def test_average_is_equal_at_every_world_size_and_zero_stage(tmp_path, uninterrupted, world_size, zero_stage) -> None:
    """At the same world size it is bit-equal."""
    run_ranks(_train, 2, str(tmp_path), 2, range(3), range(0), EMA_DECAY)
    resumed = run_ranks(_train, world_size, str(tmp_path), zero_stage, range(3, 5), None, EMA_DECAY)[0]["weights"]
    rtol, atol = (0.0, 0.0) if world_size == 2 else (1e-4, 1e-6)
    for name, average in uninterrupted.items():
        torch.testing.assert_close(resumed[name], average, rtol=rtol, atol=atol, msg=name)


def test_average_is_that_of_the_weights_of_every_step(tmp_path: Path) -> None:
    """a_t = k a + (1 - k) w_t, with k = min(ema_decay, (1 + t) / (10 + t)) and a_0 = w_0."""
    results = [run_ranks(_train, 1, str(tmp_path), 0, range(steps), None, EMA_DECAY)[0] for steps in range(4)]
    for name, start in results[0]["masters"]:
        expected = results[0]["masters"][name, start].clone()
        for step in (1, 2, 3):
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * results[step]["masters"][name, start]
        torch.testing.assert_close(results[3]["weights"][name].flatten(), expected, rtol=1e-6, atol=1e-8, msg=name)


def test_average_added_on_resume_starts_from_restored_weights(tmp_path: Path) -> None:
    run_ranks(_train, 1, str(tmp_path), 2, range(3), range(0))
    resumed = run_ranks(_train, 1, str(tmp_path), 2, range(3, 3), None, EMA_DECAY)[0]
    for (name, start), master in resumed["masters"].items():
        average = resumed["weights"][name].flatten()
        assert torch.equal(average[start : start + len(master)], master), name


# ---- a whole run


def test_checkpoints_of_a_run_are_kept_recorded_and_loadable(tmp_path: Path) -> None:
    """A run of one short stage saves a checkpoint every two steps."""
    (tmp_path / "run.yaml").write_text(
        f"name: saved\noutput: {tmp_path}\ntracking: {{metrics_every: 1}}\n"
        f"sources: {{texts: {{shards: {tmp_path}/scenes, type: text, synthetic: {{scenes: 60, image_size: 16}}}}}}\n"
        "model: {width: 16, layers: 2, heads: 2, vision_language_layers: 1, image_size: 16, patch_size: 8}\n"
        "data: {streams: 2}\nengine: {precision: float32}\n"
        "checkpoint: {every: 2, keep: 1, keep_every: 4, keep_best: {metric: train/loss, mode: max}}\n"
        f"stages:\n- {{name: language, sources: {{texts: 1.0}}, objectives: {{mlm: {{}}}}, global_batch_size: 4, "
        f"steps: 12, max_text_length: 16}}\n",
        encoding="utf-8",
    )
    command, root = [sys.executable, "-m", "pipeline.training", str(tmp_path / "run.yaml")], Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "saved"

    values: dict[str, dict[int, float]] = {}  # metric -> step -> value
    for record in Journal(run / "journal").all_records():
        for name, value in record.get("values", {}).items():
            values.setdefault(name, {})[record["step"]] = value
    losses = values["train/loss"]
    best = max((step for step in losses if step % 2 == 0 and step < 12), key=lambda step: losses[step])
    manifests = [read_committed(Storage(), str(folder))[0] for folder in (run / "checkpoints").iterdir()]
    assert {manifest["step"] for manifest in manifests} == {4, 8, 10, best}
    for manifest in manifests:
        assert manifest["metrics"]["train/loss"] == losses[manifest["step"]]
    for name in ("ckpt/stall_s", "ckpt/wait_s", "ckpt/write_s"):
        assert sorted(values[name]) == [2, 4, 6, 8, 10], name
    assert all(waited <= values["ckpt/stall_s"][step] for step, waited in values["ckpt/wait_s"].items())

    # A checkpoint loads like the weights of a stage, so a stage may start from it.
    handed_over = load_weights(Storage(), str(run))
    (folder,) = (run / "checkpoints").glob("step-00000010.*")
    weights = load_weights(Storage(), str(folder))
    assert {n: t.shape for n, t in weights.tensors.items()} == {n: t.shape for n, t in handed_over.tensors.items()}
    assert (weights.step, weights.stage, weights.vocabulary) == (10, "language", handed_over.vocabulary)
    assert weights.config == handed_over.config
    far = [n for n, t in weights.tensors.items() if (t - handed_over.tensors[n]).abs().max() > 0.01]
    assert not far, "two steps from the end, weights are near those of the end"
