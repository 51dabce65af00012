"""A call in a background thread returns its result, raises its error, or times out."""

from __future__ import annotations

import threading

import pytest

from pipeline.config.background import in_background, within


def test_a_background_call_returns_its_result_or_error() -> None:
    assert in_background(lambda: 3, "three").result(10) == 3
    assert isinstance(in_background(lambda: {}["absent"], "fails").exception(10), KeyError)


def test_a_call_within_its_limit_returns_its_result_or_error() -> None:
    def late() -> None:
        raise TimeoutError("its own")

    assert within(10, lambda: 3, "three") == 3
    with pytest.raises(TimeoutError, match="its own"):
        within(10, late, "late")


def test_a_late_call_does_not_keep_the_process_alive() -> None:
    over = threading.Event()
    with pytest.raises(TimeoutError, match="no complete response within 0 s"):
        within(0.01, over.wait, "waits")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "waits")
    over.set()
