"""Contract C4 end to end: a rank killed in the middle of every stage leaves the uninterrupted run's losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vision", "language", "vision_language")
STEPS = 12
SECONDS = 600


def command(folder: Path, name: str) -> list[str]:
    overrides = [f"stages.{stage}.{key}" for stage in STAGES for key in (f"steps={STEPS}", "batch=16")]
    overrides += ["model.width=32", "model.layers=2", "model.heads=2"]
    overrides += ["checkpoint.every=4", "tracking.metrics_every=1", f"output={folder}", f"name={name}"]
    overrides += ["sources.scenes.synthetic.scenes=300", "sources.unseen.synthetic.scenes=20"]
    overrides += [f"sources.{source}.shards={folder}/scenes" for source in ("scenes", "pictures", "sentences")]
    overrides += [f"sources.unseen.shards={folder}/unseen", "cluster.max_failures=5", "evaluation.source=null"]
    return [sys.executable, "-m", "jobs.cli", "train", str(ROOT / "configs" / "demo.yaml"), *overrides]


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    log = (folder / f"{name}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(folder, name), cwd=ROOT, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    try:
        assert process.wait(timeout=SECONDS) == 0, (folder / f"{name}.log").read_text(encoding="utf-8")[-3000:]
    finally:
        if process.poll() is None:
            process.kill()


def losses(folder: Path, name: str) -> dict[tuple[int, int], str]:
    """(stage, step) -> the loss as the journal holds it, exactly."""
    found: dict[tuple[int, int], str] = {}
    for file in sorted((folder / name / "journal").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "metrics" and "train/loss" in record["values"]:
                assert (record["stage"], record["step"]) not in found, "a step was journaled twice"
                found[record["stage"], record["step"]] = repr(record["values"]["train/loss"])
    return found


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training workers that Ray started for this driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def reached(folder: Path, name: str) -> tuple[int, int]:
    found = losses(folder, name)
    return max(found) if found else (-1, -1)


@pytest.mark.timeout(1200)
def test_a_rank_killed_in_every_stage_changes_no_loss(tmp_path: Path) -> None:
    finish(start(tmp_path, "whole"), tmp_path, "whole")
    process = start(tmp_path, "killed")
    deadline = time.monotonic() + SECONDS
    killed = 0
    while killed < len(STAGES) and process.poll() is None and time.monotonic() < deadline:
        stage, step = reached(tmp_path, "killed")
        workers = ranks_of(process)
        if stage == killed and step >= killed * STEPS + 6 and workers:
            workers[killed % len(workers)].send_signal(signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    finish(process, tmp_path, "killed")
    assert killed == len(STAGES)
    expected, got = losses(tmp_path, "whole"), losses(tmp_path, "killed")
    assert len(expected) == len(STAGES) * STEPS
    assert got == expected
