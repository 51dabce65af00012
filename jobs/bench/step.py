"""`mome bench step`: starts the ranks of `pipeline.training.step_bench` on this machine, and reads rank 0's answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.config.errors import RunFailed
from pipeline.config.load import load_config


def run_step_bench(config: Path, overrides: list[str], stage: str | None, ranks: int, steps: int) -> dict[str, Any]:
    """Raises ConfigError before anything is started, RunFailed with the ranks' own words when they fail."""
    load_config(config, overrides)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "pipeline.training.step_bench", str(config), f"--steps={steps}", *overrides]
    if stage is not None:
        command.append(f"--stage={stage}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        own = [line for line in done.stderr.splitlines() if line.startswith("rank ") or "Error" in line]
        raise RunFailed("bench step: " + ("\n".join(own[:5]) or done.stderr[-2000:]))
    found: dict[str, Any] = json.loads(answers[-1])
    return found
