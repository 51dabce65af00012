from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, Prefetcher, PrefetchRequest


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


class Fetches:
    """Fetches of things of 10 bytes, by one thread, in the order they were begun."""

    def __init__(self, most: int = 10_000):
        self.begun: list[str] = []
        self.store: PrefetchCache[str] = PrefetchCache(most)
        self.pool = ThreadPoolExecutor(1)

    def need(self, key: str) -> PrefetchRequest:
        return PrefetchRequest(self.store, key, 10, 10, 0, lambda: self.fetch(key), self.pool.submit)

    def fetch(self, key: str) -> str:
        self.begun.append(key)
        return key

    @contextmanager
    def ahead(self, needs: Callable[[int], Iterable[str]], most: int, step: int = 0) -> Iterator[Prefetcher]:
        self.store.restart(step)
        ahead = Prefetcher(lambda later: [self.need(key) for key in needs(later)], step, most)
        try:
            yield ahead
        finally:
            ahead.stop()
            ahead.join()
            self.pool.shutdown()

    def reached(self, ahead: Prefetcher, step: int) -> None:
        self.store.finish_step(step)
        ahead.finish_step(step)


def two_each(step: int) -> list[str]:
    """Every step reads one thing of its own and one that the next step reads too."""
    return [f"own{step}", f"shared{step // 2}"]


def test_things_are_fetched_in_the_order_of_need_within_the_bound():
    fetches = Fetches()
    with fetches.ahead(two_each, most=40, step=2) as ahead:
        until(lambda: len(fetches.begun) == 4)
        assert fetches.begun == ["own2", "shared1", "own3", "own4"]
        fetches.reached(ahead, 2)
        until(lambda: len(fetches.begun) == 6)
        time.sleep(0.05)
        assert fetches.begun == ["own2", "shared1", "own3", "own4", "shared2", "own5"]


def test_a_thing_larger_than_the_bound_is_fetched_alone():
    fetches = Fetches()
    with fetches.ahead(lambda step: [f"{step}"], most=1) as ahead:
        for step in range(5):
            until(lambda step=step: len(fetches.begun) == step + 1)
            fetches.reached(ahead, step)


def test_what_finds_no_room_is_fetched_when_room_is_made():
    fetches = Fetches(most=20)
    with fetches.ahead(lambda step: [f"{step}"], most=1000) as ahead:
        until(lambda: fetches.begun == ["0", "1"])
        time.sleep(0.05)
        assert fetches.begun == ["0", "1"]
        fetches.reached(ahead, 0)
        until(lambda: fetches.begun == ["0", "1", "2"])


def test_steps_that_were_passed_are_not_fetched_for():
    fetches, slow = Fetches(), threading.Event()

    def needs(step: int) -> list[str]:
        if step == 0:
            slow.wait(60)
        return [f"{step}"]

    with fetches.ahead(needs, most=30) as ahead:
        fetches.reached(ahead, 99)
        slow.set()
        until(lambda: len(fetches.begun) == 3)
        assert fetches.begun == ["100", "101", "102"]


def test_the_walk_stays_within_its_horizon():
    fetches, walked = Fetches(), []
    with fetches.ahead(lambda step: walked.append(step) or ["same"], most=30) as ahead:
        until(lambda: len(walked) == HORIZON)
        fetches.reached(ahead, 3)
        until(lambda: len(walked) == HORIZON + 4)
        time.sleep(0.05)
        assert walked == list(range(HORIZON + 4))
    assert fetches.begun == ["same"]


def test_a_failure_is_left_to_who_reads_and_is_tried_again():
    fetches = Fetches()
    failed = threading.Event()

    def fetch(key: str) -> str:
        fetches.begun.append(key)
        if fetches.begun.count("1") == 1 and key == "1":
            failed.set()
            raise StorageError("away")
        if key == "4":
            raise StorageError("still away")
        return key

    fetches.fetch = fetch

    def needs(step: int) -> list[str]:
        if step == 3:
            raise StorageError("the index cannot be read")
        return [f"{step}"]

    with fetches.ahead(needs, most=1000):
        until(lambda: "9" in fetches.begun)
        assert failed.is_set()
        assert fetches.store.get("1", 10, lambda: fetch("1")) == "1"
        assert fetches.store.get("3", 10, lambda: fetch("3")) == "3"
        with pytest.raises(StorageError, match="still away"):
            fetches.store.get("4", 10, lambda: fetch("4"))
