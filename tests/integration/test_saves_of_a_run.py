"""The checkpoints of a finished run: those that the config keeps, with their metrics, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.training.checkpoint.committed import read_manifest
from pipeline.training.checkpoint.weights import load_weights
from tests.support.journals import all_records

STEPS = 12


def test_checkpoints_of_a_run_are_kept_recorded_and_loadable(tmp_path: Path) -> None:
    """A run of one short stage saves a checkpoint every two steps."""
    (tmp_path / "run.yaml").write_text(
        f"name: saved\noutput: {tmp_path}\ntracking: {{metrics_every: 1}}\n"
        f"sources: {{texts: {{shards: {tmp_path}/scenes, type: text, synthetic: {{scenes: 60, image_size: 16}}}}}}\n"
        "model: {width: 16, layers: 2, heads: 2, vision_language_layers: 1, image_size: 16, patch_size: 8}\n"
        "data: {streams: 2}\nengine: {precision: float32}\n"
        "checkpoint: {every: 2, keep: 1, keep_every: 4, keep_best: {metric: train/loss, mode: max}}\n"
        f"stages:\n- {{name: language, sources: {{texts: 1.0}}, objectives: {{mlm: {{}}}}, global_batch_size: 4, "
        f"steps: {STEPS}, max_text_length: 16}}\n",
        encoding="utf-8",
    )
    command, root = [sys.executable, "-m", "pipeline.training", str(tmp_path / "run.yaml")], Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "saved"

    values: dict[str, dict[int, float]] = {}  # metric -> step -> value
    for record in all_records(Journal(run / "journal")):
        for name, value in record.get("values", {}).items():
            values.setdefault(name, {})[record["step"]] = value
    losses = values["train/loss"]
    best = max((step for step in losses if step % 2 == 0 and step < STEPS), key=lambda step: losses[step])
    manifests = [read_manifest(Storage(), str(folder)) for folder in (run / "checkpoints").iterdir()]
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
