"""The time account of a run that was killed after a checkpoint and restarted is complete."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.ranks import SECONDS, start_ranks
from tests.support.short_run import STEPS, BeforeStep, journal, train_short, without_mlflow

STEP_SECONDS = 0.3  # in addition to the step itself
DOWN_SECONDS = 3.0
BEAT_SECONDS = 0.1  # time of a killed process after its last heartbeat counts as down time


def _slow(folder: str, killed_at: int | None) -> None:
    """Train one rank with steps of some length; kill it before the given step."""
    from pipeline.training import goodput, loop  # noqa: F401 - importing is not part of the measured run

    without_mlflow()
    goodput.HEARTBEAT_SECONDS = BEAT_SECONDS
    slow = [BeforeStep(step, lambda _: time.sleep(STEP_SECONDS)) for step in range(STEPS)]
    killed = BeforeStep(-1 if killed_at is None else killed_at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    Path(folder, "begun").write_text(f"{time.time()}", encoding="utf-8")
    train_short(folder, cluster__workers=1, callbacks=[killed, *slow])
    Path(folder, "ended").write_text(f"{time.time()}", encoding="utf-8")


def test_every_second_of_a_resumed_run_is_accounted_for(tmp_path: Path) -> None:
    (rank,) = start_ranks(_slow, 1, str(tmp_path), STEPS - 1)
    rank.join(SECONDS)
    assert rank.exitcode == -signal.SIGKILL
    begun = float((tmp_path / "begun").read_text(encoding="utf-8"))
    time.sleep(DOWN_SECONDS)
    (rank,) = start_ranks(_slow, 1, str(tmp_path), None)
    rank.join(SECONDS)
    assert rank.exitcode == 0
    wall = float((tmp_path / "ended").read_text(encoding="utf-8")) - begun
    told = json.loads((tmp_path / "run" / "time.json").read_text(encoding="utf-8"))
    seconds = told["seconds"]
    assert sum(seconds.values()) == pytest.approx(wall, abs=1.0)
    assert told["restarts"] == 1
    assert told["ended"]
    # Killed before step 7 with a checkpoint of 6 steps: one step is lost work, the other sixteen count as training.
    assert seconds["lost_work"] >= STEP_SECONDS - 2 * BEAT_SECONDS
    assert seconds["training"] >= 2 * STEPS * STEP_SECONDS
    assert seconds["restart"] >= DOWN_SECONDS
    assert seconds["startup"] > 0
    assert seconds["checkpoint"] > 0
    points: dict[str, float] = {}
    for record in journal(tmp_path):
        if record["kind"] == "metrics":
            points |= record["values"]
    assert points["time/lost_work_s"] == pytest.approx(seconds["lost_work"])
    assert 0 < points["perf/goodput"] < 1
