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


@pytest.mark.parametrize(
    ("window", "num_steps", "traced"),
    [("6:8", 6, (6, 8)), ("6:50", 3, (6, 7))],
    ids=["inside the stage", "cut by its end"],
)
def test_steps_in_the_window_are_traced_and_logged(
    tmp_path: Path, window: str, num_steps: int, traced: tuple[int, int]
) -> None:
    names: list[str] = []
    tracker = SimpleNamespace(artifact=lambda name, content: names.append(name))
    context: Any = SimpleNamespace(storage=Storage(), tracker=tracker)
    stage = Stage(tiny_config().model_copy(update={"output": str(tmp_path)}), 1)
    assert stage.first_step == 4
    profiler = Profiler(stage, context, window)
    for step in range(num_steps):
        profiler.before_batch(step)
        torch.ones(8) * step
    profiler.close()
    assert names == [f"profile/steps-{traced[0]:08d}-{traced[1]:08d}.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / names[0]).read_bytes()))
    operations = [event for event in trace["traceEvents"] if event.get("name") == "aten::mul"]
    assert len(operations) == traced[1] - traced[0]


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "a:b"])
def test_malformed_window_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected A:B"):
        profile_override(text)
