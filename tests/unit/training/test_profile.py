"""`--profile A:B`: a trace of these steps, and nothing otherwise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage
from pipeline.training.profile import Window, profiled
from tests.support.tiny_model import tiny_config


class Kept:
    def __init__(self) -> None:
        self.names: list[str] = []

    def artifact(self, name: str, content: object) -> None:
        self.names.append(name)


def config_in(folder: Path, window: str | None):
    config = tiny_config()
    tracking = config.tracking.model_copy(update={"profile": window})
    return config.model_copy(update={"output": str(folder), "tracking": tracking})


def steps(number: int):
    for step in range(number):
        torch.ones(8) * step
        yield step, "batch"


def test_the_window_s_steps_are_traced_and_the_trace_is_logged(tmp_path):
    config, kept = config_in(tmp_path, "12:14"), Kept()
    seen = [step for step, _ in profiled(steps(6), 10, config, Storage(), kept, rank=0)]
    assert seen == list(range(6))
    assert kept.names == ["profile/steps-00000012-00000014.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / kept.names[0]).read_bytes()))
    multiplications = [event for event in trace["traceEvents"] if event.get("name") == "aten::mul"]
    assert len(multiplications) == 2  # those of drawing steps 3 and 4: the second one's data are waited for inside


def test_a_window_that_a_stage_ends_in_is_written_too(tmp_path):
    kept = Kept()
    for _ in profiled(steps(3), 0, config_in(tmp_path, "2:50"), Storage(), kept, rank=0):
        pass
    assert kept.names == ["profile/steps-00000002-00000003.json.gz"]


@pytest.mark.parametrize(("window", "rank"), [(None, 0), ("0:2", 1)])
def test_without_a_window_and_on_other_ranks_the_steps_are_the_same_object(tmp_path, window, rank):
    given = steps(2)
    assert profiled(given, 0, config_in(tmp_path, window), Storage(), Kept(), rank) is given


@pytest.mark.parametrize("told", ["5", "5:5", "7:5", "a:b"])
def test_a_wrong_window_is_refused(told):
    with pytest.raises(ConfigError, match="expected A:B"):
        Window.parse(told)
