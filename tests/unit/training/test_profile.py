"""`--profile A:B` writes a trace of these steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage
from pipeline.training.profile import Profiler, profile_override
from pipeline.training.stages import Stage
from tests.support.tiny_model import tiny_config


def profile(folder: Path, window: str, num_steps: int) -> list[str]:
    """Profile steps of the stage that begins at global step 8; return the names of the artifacts."""
    config = tiny_config().model_copy(update={"output": str(folder)})
    names: list[str] = []
    tracker = SimpleNamespace(artifact=lambda name, content: names.append(name))
    context: Any = SimpleNamespace(storage=Storage(), tracker=tracker)
    stage = Stage(config, 1)
    profiler = Profiler(stage, context, window)
    for step in range(num_steps):
        profiler.before_batch(step)
        torch.ones(8) * step
    profiler.close()
    assert stage.first_step == FIRST
    return names


FIRST = sum(stage.steps for stage in tiny_config().stages[:1])


def test_steps_in_the_window_are_traced_and_logged(tmp_path: Path) -> None:
    (name,) = profile(tmp_path, f"{FIRST + 2}:{FIRST + 4}", 6)
    assert name == f"profile/steps-{FIRST + 2:08d}-{FIRST + 4:08d}.json.gz"
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / name).read_bytes()))
    assert len([event for event in trace["traceEvents"] if event.get("name") == "aten::mul"]) == 2


def test_window_cut_by_the_end_of_the_stage_is_written(tmp_path: Path) -> None:
    assert profile(tmp_path, f"{FIRST + 2}:50", 3) == [f"profile/steps-{FIRST + 2:08d}-{FIRST + 3:08d}.json.gz"]


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "a:b"])
def test_malformed_window_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected A:B"):
        profile_override(text)
