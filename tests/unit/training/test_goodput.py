"""Goodput: each second of a run belongs to one phase, over any number of restarts; background writes never block."""

import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.goodput import PHASES, GoodputTracker, add_time, goodput_metrics, read_record
from pipeline.training.loop import _close_tracker


def test_time_belongs_to_the_phase_entered_last(tmp_path: Path) -> None:
    tracker = GoodputTracker(Storage(), str(tmp_path), is_writer=False)
    time.sleep(0.2)
    tracker.enter("training")
    time.sleep(0.4)
    tracker.enter("data_wait")
    seconds = tracker.seconds()
    assert (seconds["startup"], seconds["training"]) == pytest.approx((0.2, 0.4), abs=0.1)
    assert seconds["data_wait"] < 0.1
    metrics = goodput_metrics(dict.fromkeys(PHASES, 0.0) | {"training": 60.0, "lost_work": 30.0, "restart": 30.0})
    assert metrics["perf/goodput"] == 0.5, "the fraction of the time in steps that were kept"
    assert metrics["time/lost_work_s"] == 30.0


# The run started at 1000; in the first case the checkpoint covers 66 s, the last heartbeat was at 1100, and the process
# restarted at 1130. The times, then the seconds of the heartbeat, of the checkpoint, and after the restart.
RESTARTS: dict[str, tuple[tuple[float, float], dict[str, float], dict[str, float] | None, dict[str, float]]] = {
    "work after the checkpoint is lost": (
        (1100, 1130),
        {"startup": 10, "training": 82, "data_wait": 6, "checkpoint": 2},
        {"startup": 10, "training": 50, "data_wait": 5, "checkpoint": 1},
        {"startup": 10, "training": 50, "data_wait": 5, "checkpoint": 2, "lost_work": 33, "restart": 30},
    ),
    "killed before its first step": (
        (1200, 1210),
        {"startup": 10, "training": 50, "lost_work": 33, "restart": 107},
        {"startup": 10, "training": 50},
        {"startup": 10, "training": 50, "lost_work": 33, "restart": 117},
    ),
    "checkpoint newer than the heartbeat": (
        (1020, 1060),
        {"startup": 10, "training": 10},
        {"startup": 10, "training": 30, "checkpoint": 1},
        {"startup": 10, "training": 30, "checkpoint": 1, "restart": 19},
    ),
    "lost work is in the checkpoint and in the heartbeat": (
        (1100, 1100),
        {"startup": 10, "training": 60, "lost_work": 30},
        {"startup": 10, "training": 50, "lost_work": 40},
        {"startup": 10, "training": 50, "lost_work": 40},
    ),
    "without a checkpoint": ((1050, 1050), {"startup": 10, "training": 40}, {}, {"startup": 10, "lost_work": 40}),
    "extended after it had finished": (
        (1050, 90000),
        {"startup": 10, "training": 40},
        None,
        {"startup": 10, "training": 40},
    ),
}


@pytest.mark.parametrize("case", RESTARTS)
def test_time_after_the_checkpoint_is_lost_work_then_restart(tmp_path: Path, case: str) -> None:
    (at, now), recorded, saved, expected = RESTARTS[case]
    record = {"at": at, "seconds": dict.fromkeys(PHASES, 0.0) | recorded, "restarts": 0, "ended": saved is None}
    (tmp_path / "time.json").write_text(json.dumps(record), encoding="utf-8")
    tracker = GoodputTracker(Storage(), str(tmp_path), is_writer=True, now=now)
    if saved is not None:
        tracker.resume_from(saved)
    assert {phase: round(value) for phase, value in tracker.seconds().items() if round(value)} == expected
    assert sum(tracker.seconds().values()) == pytest.approx(sum(expected.values()), abs=0.5)
    assert tracker.restarts == (saved is not None)


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
    (tmp_path / "time.json").write_text("{", encoding="utf-8")
    assert read_record(storage, folder) is None, "a damaged record counts as none"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace `Storage.write` by one that waits for `back`, and then raises `fault`, if any, or keeps the data."""
    store = Mock(back=threading.Event(), reached=threading.Event(), written=[], fault=None)

    def write(_: Storage, url: str, data: bytes) -> None:
        store.reached.set()
        assert store.back.wait(30)
        if store.fault is not None:
            raise store.fault
        store.written.append((url, data))

    monkeypatch.setattr(Storage, "write", write)
    return store


def test_newest_data_of_each_url_is_written_and_errors_are_logged(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    writer = BackgroundWriter(Storage())
    writer.write("a", b"first")
    assert store.reached.wait(10)
    for data in (b"1", b"2", b"3"):
        writer.write("a", data)
        writer.write("b", data)
    store.back.set()
    assert writer.close(10)
    assert store.written == [("a", b"first"), ("a", b"3"), ("b", b"3")]
    for store.fault in (StorageError("away"), ValueError("no URL"), MemoryError()):
        writer = BackgroundWriter(Storage())
        writer.write("memory://run/progress.json", b"")
        assert writer.close(10)
        assert f"progress.json was not written: {type(store.fault).__name__}" in caplog.text


def test_close_waits_no_longer_than_its_timeout(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    writer = BackgroundWriter(Storage())
    writer.write("a", b"1")
    assert store.reached.wait(10)
    writer.write("b", b"2")
    assert not writer.close(0.05)
    assert "not written within" in caplog.text
    writer.write("c", b"after the end")
    store.back.set()
    time.sleep(0.05)
    assert store.written == [("a", b"1")]


@pytest.mark.parametrize("is_available", [False, True])
def test_unavailable_store_or_a_new_owner_ends_the_account(
    store: Any, monkeypatch: pytest.MonkeyPatch, is_available: bool
) -> None:
    monkeypatch.setattr("pipeline.training.goodput.CLOSE_SECONDS", 10.0 if is_available else 0.05)
    tracker = GoodputTracker(Storage(), "memory://run", is_writer=True)
    if is_available:
        store.back.set()
    tracker.start()
    assert store.reached.wait(10)
    tracker.close(ended=not is_available, write=not is_available)
    assert len(store.written) == is_available, "only the first heartbeat, whose write had begun"
    store.back.set()


@pytest.mark.parametrize(("status", "waits"), [("FINISHED", True), ("FAILED", False), ("KILLED", False)])
def test_only_a_finished_run_waits_for_its_record_to_be_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: Any, waits: bool
) -> None:
    monkeypatch.setattr("pipeline.training.loop.CLOSE_SECONDS", 0.05)
    closed = threading.Event()
    tracker = Mock(close=lambda: time.sleep(0.3) or closed.set())  # type: ignore[func-returns-value]
    _close_tracker(tracker, status)
    assert closed.is_set() == waits
    assert ("not closed within" in caplog.text) != waits
