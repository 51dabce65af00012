"""A run that exceeds memory or disk ends at once and reports its use and what to change."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.callbacks import Callback
from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, BeforeStep, losses, train_short, without_mlflow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _allocate_too_much(folder: str) -> dict[str, str]:
    """Return the messages of runs that exceed memory in a step and while the model is built."""
    from pipeline.config.errors import RunFailed

    class AllocateWhileBuilding(Callback):
        def on_model_built(self, model: Any) -> None:
            torch.empty(10**15)

    without_mlflow()
    messages = {}
    callbacks = {"step": BeforeStep(2, lambda _: torch.empty(10**15)), "build": AllocateWhileBuilding()}
    for name, callback in callbacks.items():
        with pytest.raises(RunFailed) as caught:
            train_short(folder, name, engine__zero_stage=2, callbacks=[callback])
        messages[name] = str(caught.value)
    return messages


def test_out_of_memory_reports_use_and_remedies(tmp_path: Path) -> None:
    (told,) = run_ranks(_allocate_too_much, 1, str(tmp_path))
    assert "stage vision, rank 0 of 1: out of memory: " in told["step"]
    assert "engine.zero_stage 2: parameters " in told["step"]
    assert "gradients " in told["step"]
    assert "optimizer " in told["step"]
    assert "8 of the rank's 8 rows (engine.micro_batch_size: not set)" in told["step"]
    assert "engine.micro_batch_size=4" in told["step"]
    assert "engine.zero_stage=3" in told["step"]
    assert "before the first step" in told["build"]


def _fill_the_disk(folder: str, disk: str) -> str:
    """Train on a disk that is full from the fifth step on, then again with room; return the first run's message."""
    from pipeline.config.errors import RunFailed

    without_mlflow()
    ballast = Path(disk, "ballast")

    def fill(_: object) -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    train_short(folder, "whole")
    with pytest.raises(RunFailed) as caught:
        train_short(disk, callbacks=[BeforeStep(4, fill)], **_data_in(folder))
    committed = sorted(file.parent.name for file in Path(disk, "run", "checkpoints").glob("*/COMMIT.json"))
    assert [name[:13] for name in committed] == ["step-00000003"]
    ballast.unlink()
    train_short(disk, **_data_in(folder))
    return str(caught.value)


def _data_in(folder: str) -> dict[str, Any]:
    scenes = {"shards": f"{folder}/scenes", "synthetic": {"scenes": 60, "image_size": 24}}
    return {"sources": {"scenes": scenes, "pictures": {"shards": f"{folder}/scenes", "type": "images"}}}


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path, small_disk: Path) -> None:
    (told,) = run_ranks(_fill_the_disk, 1, str(tmp_path), str(small_disk))
    assert f"{small_disk}/run/checkpoints/step-00000006" in told
    assert "no space left" in told
    assert "Committed checkpoints are kept" in told
    assert len(losses(small_disk)) == 2 * STEPS
    assert losses(small_disk) == losses(tmp_path, "whole")
