"""Goodput: each second of a run belongs to one phase, over any number of restarts, and the sum is the wall time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.storage import Storage
from pipeline.training.goodput import PHASES, GoodputTracker, add_time, goodput_metrics, read_record


@pytest.fixture
def restarted(tmp_path: Path) -> Any:
    """Return a function that builds the tracker of a process started at `now` (s), after a last heartbeat at `at`."""

    def build(at: float, now: float, ended: bool = False, **seconds: float) -> GoodputTracker:
        record = {"at": at, "seconds": dict.fromkeys(PHASES, 0.0) | seconds, "restarts": 0, "ended": ended}
        (tmp_path / "time.json").write_text(json.dumps(record), encoding="utf-8")
        return GoodputTracker(Storage(), str(tmp_path), is_writer=True, now=now)

    return build


def rounded(tracker: GoodputTracker) -> dict[str, int]:
    return {phase: round(value) for phase, value in tracker.seconds().items() if round(value)}


def test_time_belongs_to_the_phase_entered_last(tmp_path: Path) -> None:
    tracker = GoodputTracker(Storage(), str(tmp_path), is_writer=False)
    time.sleep(0.2)
    tracker.enter("training")
    time.sleep(0.4)
    tracker.enter("data_wait")
    seconds = tracker.seconds()
    assert seconds["startup"] == pytest.approx(0.2, abs=0.1)
    assert seconds["training"] == pytest.approx(0.4, abs=0.1)
    assert seconds["data_wait"] < 0.1


# The run started at 1000; in the first case the checkpoint covers 66 s, the last heartbeat was at 1100, and the process
# restarted at 1130.
@pytest.mark.parametrize(
    ("at", "now", "recorded", "saved", "expected"),
    [
        (
            1100,
            1130,
            {"startup": 10, "training": 82, "data_wait": 6, "checkpoint": 2},
            {"startup": 10, "training": 50, "data_wait": 5, "checkpoint": 1},
            {"startup": 10, "training": 50, "data_wait": 5, "checkpoint": 2, "lost_work": 33, "restart": 30},
        ),
        (
            1200,
            1210,
            {"startup": 10, "training": 50, "lost_work": 33, "restart": 107},
            {"startup": 10, "training": 50},
            {"startup": 10, "training": 50, "lost_work": 33, "restart": 117},
        ),
        (
            1020,
            1060,
            {"startup": 10, "training": 10},
            {"startup": 10, "training": 30, "checkpoint": 1},
            {"startup": 10, "training": 30, "checkpoint": 1, "restart": 19},
        ),
        (1050, 1050, {"startup": 10, "training": 40}, {}, {"startup": 10, "lost_work": 40}),
    ],
    ids=[
        "work after the checkpoint is lost",
        "killed before its first step",
        "checkpoint newer than the heartbeat",
        "without a checkpoint",
    ],
)
def test_time_after_the_checkpoint_is_lost_work_then_restart(
    restarted: Any, at: float, now: float, recorded: dict[str, float], saved: dict[str, float], expected: dict[str, int]
) -> None:
    tracker = restarted(at, now, **recorded)
    tracker.resume_from(saved)
    assert rounded(tracker) == expected
    assert sum(tracker.seconds().values()) == pytest.approx(sum(expected.values()), abs=0.5)
    assert tracker.restarts == 1


def test_extending_a_finished_run_is_not_a_restart(restarted: Any) -> None:
    tracker = restarted(1050, now=90000, ended=True, startup=10.0, training=40.0)
    assert rounded(tracker) == {"startup": 10, "training": 40}
    assert tracker.restarts == 0


def test_goodput_is_the_fraction_of_time_in_kept_steps() -> None:
    seconds = dict.fromkeys(PHASES, 0.0) | {"training": 60.0, "lost_work": 30.0, "restart": 30.0}
    assert goodput_metrics(seconds)["perf/goodput"] == 0.5
    assert goodput_metrics(seconds)["time/lost_work_s"] == 30.0


def test_record_is_saved_in_the_run_and_includes_evaluation(tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    assert read_record(storage, folder) is None
    tracker = GoodputTracker(storage, folder, is_writer=True)
    tracker.start()
    tracker.close(ended=True)
    with add_time(storage, folder, "evaluation"):
        time.sleep(0.1)
    record = read_record(storage, folder)
    assert record is not None
    assert record["ended"]
    assert record["seconds"]["evaluation"] >= 0.1


def test_damaged_record_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "time.json").write_text("{", encoding="utf-8")
    assert read_record(Storage(), str(tmp_path)) is None
