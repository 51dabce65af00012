"""The prefetch cache and its planner fetch each entry once, in order and within their byte limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, Prefetcher, PrefetchRequest


def filled(max_size: int, keys: str, on_shortage: Callable[[], None] = lambda: None) -> PrefetchCache[str]:
    """Return a cache with an entry of size 1 for each key."""
    store: PrefetchCache[str] = PrefetchCache(max_size, on_shortage)
    for key in keys:
        store.get(key, 1, lambda key=key: key)
    return store


def kept(store: PrefetchCache[str], keys: str) -> str:
    """Return the keys that are held."""
    return "".join(key for key in keys if (entry := store._entries.get(key)) is not None and entry.is_held)


def test_cache_keeps_the_newest_entries_within_its_bound():
    store: PrefetchCache[bytes] = PrefetchCache(1000)
    for number in range(50):
        assert store.get(number, 300, lambda: bytes(300)) == bytes(300)
        assert store.size == min(900, 300 * (number + 1))
    calls = []
    store.get(49, 300, lambda: calls.append(1) or b"")
    assert not calls
    assert len(store.get("big", 5000, lambda: bytes(5000))) == 5000


def test_threads_wait_for_a_single_fetch():
    store: PrefetchCache[int] = PrefetchCache(10)
    calls = []

    def fetch() -> int:
        time.sleep(0.05)
        calls.append(1)
        return 7

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: store.get("key", 1, fetch), range(8))) == [7] * 8
    assert len(calls) == 1


def test_failed_fetch_raises_in_every_waiter():
    store: PrefetchCache[bytes] = PrefetchCache(1000)
    started = threading.Event()

    def fail() -> bytes:
        started.set()
        time.sleep(0.05)
        raise DataError("gone")

    def wait() -> bytes:
        started.wait()
        return store.get("key", 4, fail)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(store.get, "key", 4, fail), pool.submit(wait)]
        assert all(isinstance(result.exception(), DataError) for result in results)
    assert store.size == 0
    assert store.get("key", 4, lambda: b"back") == b"back"


def test_unneeded_entries_are_evicted_first():
    store = filled(4, "abcd")
    store.restart(0)
    for key, step in [("a", 5), ("b", 2), ("d", 3)]:
        store.plan(key, 1, step)
    store.finish_step(2)
    store.get("e", 1, lambda: "e")
    assert kept(store, "abcde") == "abde"  # c was not planned
    store.get("f", 1, lambda: "f")
    assert kept(store, "abdef") == "adef"  # b was planned up to step 2
    assert store.prefetch("g", 1, lambda: "g", lambda task: task())
    assert kept(store, "adefg") == "adfg"


def test_exhausted_entries_are_evicted_first():
    store = filled(2, "ab")
    store.restart(0)
    for step in (0, 1):
        store.plan("b", 1, step, reads=2)
    store.plan("a", 1, 0, reads=2)
    store.finish_step(3)
    store.get("c", 1, lambda: "c")
    assert kept(store, "abc") == "ac"


def test_prefetch_never_evicts_needed_entries():
    shortages: list[str] = []
    store = filled(2, "ab", lambda: shortages.append("shortage"))
    store.restart(0)
    store.plan("a", 1, 3)
    store.plan("b", 1, 4)
    assert not store.prefetch("c", 1, lambda: "c", lambda task: task())
    assert (kept(store, "abc"), shortages) == ("ab", [])
    assert store.get("c", 1, lambda: "c") == "c"
    assert (len(kept(store, "ab")), shortages) == (1, ["shortage"])


def test_prefetched_unused_entries_are_evicted_last():
    store: PrefetchCache[str] = PrefetchCache(2)
    for key in "ab":
        store.plan(key, 1, 3)
        store.prefetch(key, 1, lambda key=key: key, lambda task: task())
    store.get("b", 1, lambda: "never called")
    store.get("c", 1, lambda: "c")
    assert kept(store, "abc") == "ac"


def test_reader_takes_over_a_queued_fetch():
    store: PrefetchCache[str] = PrefetchCache(2)
    waiting = []
    assert store.prefetch("a", 1, lambda: "a", waiting.append)
    assert store.get("a", 1, lambda: "another") == "a"
    (task,) = waiting
    task()
    assert (store.size, kept(store, "a")) == (1, "a")


def test_planned_entries_are_prefetched_again_after_eviction():
    store: PrefetchCache[str] = PrefetchCache(1)
    assert [store.plan("a", 1, step) for step in (1, 2)] == [True, False]
    store.prefetch("a", 1, lambda: "a", lambda task: task())
    assert not store.plan("a", 1, 3)
    store.get("b", 1, lambda: "b")
    assert store.plan("a", 1, 4)


def test_bad_value_is_invalidated_once():
    store: PrefetchCache[list] = PrefetchCache(3)
    bad, good = ["bad"], ["good"]
    store.get("a", 1, lambda: bad)
    for _ in range(2):
        store.invalidate("a", bad)
        assert store.get("a", 1, lambda: good) is good


def test_release_drops_exhausted_and_unneeded_entries():
    store = filled(9, "abc")
    store.restart(0)
    store.plan("a", 1, 1, reads=1)
    store.plan("b", 1, 2, reads=5)
    store.plan("c", 1, 60, reads=5)
    store.finish_step(2)
    store.release(unneeded_steps=10)
    assert kept(store, "abc") == "bc"
    store.finish_step(12)
    store.release(unneeded_steps=10)
    assert kept(store, "abc") == "c"


def test_entries_never_fetched_are_purged():
    store: PrefetchCache[str] = PrefetchCache(1)
    for step in range(1000):
        store.plan(step, 1, step)
        store.finish_step(step)
    assert len(store._entries) < 20


def test_close_raises_in_waiting_and_later_calls():
    store: PrefetchCache[str] = PrefetchCache(2)
    release = threading.Event()
    store.prefetch("a", 1, lambda: "a", lambda task: None)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(store.get, "b", 1, lambda: release.wait(60) and "b")
        future = store._entries["a"].future
        store.close()
        with pytest.raises(RuntimeError, match="closed"):
            future.result(60)
        release.set()
        assert running.result(60) == "b"
    with pytest.raises(RuntimeError, match="closed"):
        store.get("c", 1, lambda: "c")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "condition not met in 30 s"
        time.sleep(0.002)


class Fetches:
    """Cache whose entries of 10 bytes are fetched by one thread; `started` records the order of the fetches."""

    def __init__(self, most: int = 10_000):
        self.started: list[str] = []
        self.store: PrefetchCache[str] = PrefetchCache(most)
        self.pool = ThreadPoolExecutor(1)

    def need(self, key: str) -> PrefetchRequest:
        return PrefetchRequest(self.store, key, 10, 10, 0, lambda: self.fetch(key), self.pool.submit)

    def fetch(self, key: str) -> str:
        self.started.append(key)
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
    """Return an entry used by one step only and one that it shares with a neighbouring step."""
    return [f"own{step}", f"shared{step // 2}"]


def test_entries_are_fetched_in_order_within_the_byte_limit():
    fetches = Fetches()
    with fetches.ahead(two_each, most=40, step=2) as ahead:
        until(lambda: len(fetches.started) == 4)
        assert fetches.started == ["own2", "shared1", "own3", "own4"]
        fetches.reached(ahead, 2)
        until(lambda: len(fetches.started) == 6)
        time.sleep(0.05)
        assert fetches.started == ["own2", "shared1", "own3", "own4", "shared2", "own5"]


def test_entry_above_the_byte_limit_is_fetched_alone():
    fetches = Fetches()
    with fetches.ahead(lambda step: [f"{step}"], most=1) as ahead:
        for step in range(5):
            until(lambda step=step: len(fetches.started) == step + 1)
            fetches.reached(ahead, step)


def test_blocked_entry_is_fetched_when_a_step_finishes():
    fetches = Fetches(most=20)
    with fetches.ahead(lambda step: [f"{step}"], most=1000) as ahead:
        until(lambda: fetches.started == ["0", "1"])
        time.sleep(0.05)
        assert fetches.started == ["0", "1"]
        fetches.reached(ahead, 0)
        until(lambda: fetches.started == ["0", "1", "2"])


def test_finished_steps_are_not_prefetched():
    fetches, slow = Fetches(), threading.Event()

    def needs(step: int) -> list[str]:
        if step == 0:
            slow.wait(60)
        return [f"{step}"]

    with fetches.ahead(needs, most=30) as ahead:
        fetches.reached(ahead, 99)
        slow.set()
        until(lambda: len(fetches.started) == 3)
        assert fetches.started == ["100", "101", "102"]


def test_walk_stays_within_the_horizon():
    fetches, walked = Fetches(), []
    with fetches.ahead(lambda step: walked.append(step) or ["same"], most=30) as ahead:
        until(lambda: len(walked) == HORIZON)
        fetches.reached(ahead, 3)
        until(lambda: len(walked) == HORIZON + 4)
        time.sleep(0.05)
        assert walked == list(range(HORIZON + 4))
    assert fetches.started == ["same"]


def test_prefetch_failure_is_left_to_the_reader():
    fetches = Fetches()
    failed = threading.Event()

    def fetch(key: str) -> str:
        fetches.started.append(key)
        if fetches.started.count("1") == 1 and key == "1":
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
        until(lambda: "9" in fetches.started)
        assert failed.is_set()
        assert fetches.store.get("1", 10, lambda: fetch("1")) == "1"
        assert fetches.store.get("3", 10, lambda: fetch("3")) == "3"
        with pytest.raises(StorageError, match="still away"):
            fetches.store.get("4", 10, lambda: fetch("4"))
