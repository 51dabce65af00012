"""Background writes: the caller neither waits nor receives errors, and only the newest data is written."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage
from pipeline.tracking.tracker import Status, Tracker
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.goodput import GoodputTracker
from pipeline.training.loop import _close_tracker


class SlowStore:
    """Replacement of `Storage.write` that waits for `back`, and then fails or writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None):
        self.back, self.reached = threading.Event(), threading.Event()
        self.written: list[tuple[str, bytes]] = []
        self._fault = fault
        monkeypatch.setattr(Storage, "write", lambda _, url, data: self._write(url, data))

    def _write(self, url: str, data: bytes) -> None:
        self.reached.set()
        assert self.back.wait(30)
        if self._fault is not None:
            raise self._fault
        self.written.append((url, data))


def test_newest_data_of_each_url_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store, writer = SlowStore(monkeypatch), BackgroundWriter(Storage())
    writer.write("a", b"first")
    assert store.reached.wait(10)
    for data in (b"1", b"2", b"3"):
        writer.write("a", data)
        writer.write("b", data)
    store.back.set()
    assert writer.close(10)
    assert store.written == [("a", b"first"), ("a", b"3"), ("b", b"3")]


@pytest.mark.parametrize("fault", [StorageError("away"), ValueError("no URL"), MemoryError()])
def test_error_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    store, writer = SlowStore(monkeypatch, fault), BackgroundWriter(Storage())
    store.back.set()
    with caplog.at_level(logging.WARNING):
        writer.write("memory://run/progress.json", b"")
        assert writer.close(10)
    assert f"progress.json was not written: {type(fault).__name__}" in caplog.text


def test_close_waits_no_longer_than_its_timeout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, writer = SlowStore(monkeypatch), BackgroundWriter(Storage())
    writer.write("a", b"1")
    assert store.reached.wait(10)
    writer.write("b", b"2")
    assert not writer.close(0.05)
    assert "not written within" in caplog.text
    writer.write("c", b"after the end")
    store.back.set()
    time.sleep(0.05)
    assert store.written == [("a", b"1")]


def test_goodput_tracker_closes_while_its_store_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.goodput.CLOSE_SECONDS", 0.05)
    store, tracker = SlowStore(monkeypatch), GoodputTracker(Storage(), "memory://run", is_writer=True)
    tracker.start()
    assert store.reached.wait(10)
    tracker.close(ended=True)
    assert not store.written
    store.back.set()


def test_superseded_run_does_not_write_the_time_account(monkeypatch: pytest.MonkeyPatch) -> None:
    store, tracker = SlowStore(monkeypatch), GoodputTracker(Storage(), "memory://run", is_writer=True)
    store.back.set()
    tracker.start()
    assert store.reached.wait(10)
    tracker.close(ended=False, write=False)
    assert len(store.written) == 1


@pytest.mark.parametrize(("status", "waits"), [("FINISHED", True), ("FAILED", False), ("KILLED", False)])
def test_only_a_finished_run_waits_for_its_record_to_be_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: Status, waits: bool
) -> None:
    class SlowTracker(Tracker):
        closed = False

        def close(self, timeout: float = 20.0) -> None:
            back.wait(10)
            self.closed = True

    monkeypatch.setattr("pipeline.training.loop.CLOSE_SECONDS", 0.05)
    tracker, back = SlowTracker(), threading.Event()
    timer = threading.Timer(0.3, back.set)
    timer.start()
    _close_tracker(tracker, status)
    assert tracker.closed == waits
    assert ("not closed within" in caplog.text) != waits
    timer.join()
