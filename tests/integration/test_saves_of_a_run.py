"""The checkpoints of a finished run: those that the config keeps, with their metrics, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.storage import Storage
from pipeline.training.checkpoint import load_weights, read_committed

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one short stage with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(
        f"name: saved\noutput: {folder}\ntracking: {{metrics_every: 1}}\n"
        f"sources: {{texts: {{shards: {folder}/scenes, type: text, synthetic: {{scenes: 60, image_size: 16}}}}}}\n"
        "model: {width: 16, layers: 2, heads: 2, vision_language_layers: 1, image_size: 16, patch_size: 8}\n"
        "data: {streams: 2}\nengine: {precision: float32}\n"
        "checkpoint: {every: 2, keep: 1, keep_every: 4, keep_best: {metric: train/loss, mode: max}}\n"
        f"stages:\n- {{name: language, sources: {{texts: 1.0}}, objectives: {{mlm: {{}}}}, global_batch_size: 4, "
        f"steps: {STEPS}, max_text_length: 16}}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pipeline.training", str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "saved"


def metrics(run: Path, name: str) -> dict[int, float]:
    records = [
        json.loads(line)
        for file in sorted((run / "journal").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return {r["step"]: r["values"][name] for r in records if r["kind"] == "metrics" and name in r["values"]}


def test_kept_checkpoints_exist_and_are_whole(run: Path) -> None:
    losses = metrics(run, "train/loss")
    saved = [step for step in losses if step % 2 == 0 and step < STEPS]
    best = max(saved, key=lambda step: losses[step])
    manifests = [read_committed(Storage(), str(folder))[0] for folder in (run / "checkpoints").iterdir()]
    assert {manifest["step"] for manifest in manifests} == {4, 8, 10, best}
    for manifest in manifests:
        assert manifest["metrics"]["train/loss"] == losses[manifest["step"]]


def test_every_save_records_its_stall_and_duration(run: Path) -> None:
    for name in ("ckpt/stall_s", "ckpt/wait_s", "ckpt/write_s"):
        assert sorted(metrics(run, name)) == [2, 4, 6, 8, 10], name
    stalls = metrics(run, "ckpt/stall_s")
    assert all(waited <= stalls[step] for step, waited in metrics(run, "ckpt/wait_s").items())


def test_checkpoint_loads_like_the_weights_of_a_stage(run: Path) -> None:
    """Names, shapes, vocabulary and config are equal, so a stage may start from a checkpoint."""
    handed_over = load_weights(Storage(), str(run))
    (folder,) = (run / "checkpoints").glob("step-00000010.*")
    weights = load_weights(Storage(), str(folder))
    assert {n: t.shape for n, t in weights.tensors.items()} == {n: t.shape for n, t in handed_over.tensors.items()}
    assert (weights.step, weights.stage, weights.vocabulary) == (10, "language", handed_over.vocabulary)
    assert weights.config == handed_over.config
    far = [n for n, t in weights.tensors.items() if (t - handed_over.tensors[n]).abs().max() > 0.01]
    assert not far, "two steps from the end, weights are near those of the end"
