"""A simulated clock for the retries of storage."""

from types import SimpleNamespace

import pytest

from pipeline.data.storage import retry


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the time of retries by one that advances only while a request waits."""

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    clock = SimpleNamespace(now=0.0, slept=[], sleep=sleep, monotonic=lambda: clock.now)
    monkeypatch.setattr(retry, "time", clock)
    return clock
