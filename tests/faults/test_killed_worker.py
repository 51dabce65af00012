"""Contract C4 end to end: a rank killed in every stage leaves the uninterrupted run's losses.

MLflow has one run with one child per stage and each step once.
"""

import signal
import time
from pathlib import Path

import pytest

from tests.support.journals import assert_tracked_once
from tests.support.train_process import SECONDS, STAGES, TrainProcess

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.mark.timeout(1200)
def test_rank_killed_in_every_stage_changes_no_loss(tmp_path: Path) -> None:
    whole = TrainProcess(tmp_path, "whole", STEPS)
    whole.start().finish()
    killed = TrainProcess(tmp_path, "killed", STEPS).start()
    deadline = time.monotonic() + SECONDS
    kills = 0
    while kills < len(STAGES) and killed.running() and time.monotonic() < deadline:
        stage, step = killed.last_step()
        if stage == kills and step >= kills * STEPS + 6 and (ranks := killed.ranks()):
            ranks[kills % len(ranks)].send_signal(signal.SIGKILL)
            kills += 1
        time.sleep(0.02)
    killed.finish()
    assert kills == len(STAGES)
    assert len(whole.losses()) == len(STAGES) * STEPS
    assert killed.losses() == whole.losses()
    assert killed.restart_causes() == ["failed"] * kills
    assert_tracked_once(killed, tmp_path, attempts=kills + 1)


@pytest.mark.timeout(1800)
def test_process_killed_twice_is_one_mlflow_run(tmp_path: Path) -> None:
    """Without Ray, a user restarts the same command."""
    run = TrainProcess(tmp_path, "killed", 8)
    for step in (5, 12):
        run.start_alone()
        deadline = time.monotonic() + SECONDS
        while run.step() < step and run.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.kill()
    run.start_alone().finish()
    assert_tracked_once(run, tmp_path, attempts=3)
