"""Job identifiers of submissions are stable per config, and submitting imports no training library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.submit import interpreter, job_id
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({}, ""),
        ({"": "RUNNING"}, ""),
        ({"": "SUCCEEDED"}, ""),
        ({"": "FAILED"}, "-2"),
        ({"": "FAILED", "-2": "STOPPED"}, "-3"),
        ({"": "FAILED", "-2": "PENDING"}, "-2"),
    ],
)
def test_job_id_follows_from_the_config_and_its_failed_attempts(states: dict[str, str], expected: str) -> None:
    base = job_id(load_config(DEMO), {"another": "FAILED"})
    assert base.startswith("mome-demo-")
    assert base != job_id(load_config(DEMO, ["stages.vision.steps=81"]), {})
    assert job_id(load_config(DEMO), {base + suffix: status for suffix, status in states.items()}) == base + expected


def test_min_workers_above_workers_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.min_workers: 3 is above cluster\.workers 2"):
        load_config(DEMO, ["cluster.min_workers=3"])


def test_submitting_needs_neither_cuda_nor_training_libraries() -> None:
    """A laptop has no GPU, and importing DeepSpeed searches for one and for its compiler."""
    script = (
        "import sys, jobs.cli, jobs.submit, jobs.dashboard\n"
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


def test_job_uses_this_interpreter_if_the_head_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> str:
        return subprocess.check_output(["bash", "-c", f"echo {interpreter()}"], text=True).strip()

    assert found() == sys.executable
    monkeypatch.setattr(sys, "executable", "/no such/python")
    assert found() == "python"
