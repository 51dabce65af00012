"""Which job a submission is, and what submitting loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.submit import interpreter, job_id, next_attempt
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"


def test_the_same_run_is_the_same_job_and_another_config_is_another() -> None:
    assert job_id(load_config(DEMO)) == job_id(load_config(DEMO))
    assert job_id(load_config(DEMO)) != job_id(load_config(DEMO, ["stages.vision.steps=81"]))


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({}, "run"),
        ({"run": "RUNNING"}, "run"),
        ({"run": "SUCCEEDED"}, "run"),
        ({"run": "FAILED"}, "run-2"),
        ({"run": "FAILED", "run-2": "STOPPED"}, "run-3"),
        ({"run": "FAILED", "run-2": "PENDING"}, "run-2"),
        ({"another": "FAILED"}, "run"),
    ],
)
def test_only_a_job_that_is_over_is_submitted_anew(states: dict[str, str], expected: str) -> None:
    assert next_attempt(states, "run") == expected


def test_fewest_ranks_above_the_most_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.min_workers: 3 is above cluster\.workers 2"):
        load_config(DEMO, ["cluster.min_workers=3"])


def test_submitting_needs_neither_cuda_nor_what_trains() -> None:
    """A laptop has no GPU, and DeepSpeed looks for one and for its compiler as soon as it is imported."""
    script = (
        "import sys, jobs.cli, jobs.submit, jobs.jobs_command, jobs.logs\n"
        "loaded = {name for name in ('deepspeed', 'mlflow', 'transformers') if name in sys.modules}\n"
        "import torch\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_job_runs_in_this_python_where_the_head_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> str:
        return subprocess.check_output(["bash", "-c", f"echo {interpreter()}"], text=True).strip()

    assert found() == sys.executable
    monkeypatch.setattr(sys, "executable", "/no such/python")
    assert found() == "python"
