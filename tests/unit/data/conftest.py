"""Folders of indexed pairs, and a simulated clock for the retries of storage."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, retry


@pytest.fixture
def indexed_pairs(make_pairs) -> Callable[..., str]:
    """Return `make_pairs`, whose folders are indexed."""

    def make(*arguments) -> str:
        index_shards(Storage(), folder := make_pairs(*arguments))
        return folder

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the time of retries by one that advances only while a request waits."""

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    clock = SimpleNamespace(now=0.0, slept=[], sleep=sleep, monotonic=lambda: clock.now)
    monkeypatch.setattr(retry, "time", clock)
    return clock
