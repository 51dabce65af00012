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


def filled(max_size: int, keys: str = "") -> PrefetchCache[str]:
    """Return a cache with an entry of size 1 for each key, whose steps begin at 0."""
    cache: PrefetchCache[str] = PrefetchCache(max_size, "a shortage")
    for key in keys:
        put(cache, key)
    cache.restart(0)
    return cache


def put(cache: PrefetchCache[str], key: str) -> None:
    assert cache.get(key, 1, lambda: key) == key


def prefetch(cache: PrefetchCache[str], key: str) -> bool:
    return cache.prefetch(key, 1, lambda: key, lambda task: task())


def held(cache: PrefetchCache[str]) -> str:
    """Return the keys that are held, in alphabetical order."""
    return "".join(sorted(str(key) for key, entry in cache._entries.items() if entry.is_held))


def test_cache_keeps_the_newest_entries_within_its_bound():
    cache: PrefetchCache[bytes] = PrefetchCache(1000)
    for number in range(50):
        assert cache.get(number, 300, lambda: bytes(300)) == bytes(300)
        assert cache.size == min(900, 300 * (number + 1))
    assert cache.get(49, 300, lambda: b"fetched again") == bytes(300)
    assert len(cache.get("big", 5000, lambda: bytes(5000))) == 5000


def test_threads_wait_for_a_single_fetch():
    cache: PrefetchCache[int] = PrefetchCache(10)
    calls = []

    def fetch() -> int:
        time.sleep(0.05)
        calls.append(1)
        return 7

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cache.get("key", 1, fetch), range(8))) == [7] * 8
    assert len(calls) == 1


def test_failed_fetch_raises_in_every_waiter():
    cache: PrefetchCache[bytes] = PrefetchCache(1000)
    started = threading.Event()

    def fail() -> bytes:
        started.set()
        time.sleep(0.05)
        raise DataError("gone")

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(cache.get, "key", 4, fail)]
        started.wait()
        results.append(pool.submit(cache.get, "key", 4, fail))
        assert all(isinstance(result.exception(), DataError) for result in results)
    assert cache.size == 0
    assert cache.get("key", 4, lambda: b"back") == b"back"


def test_unneeded_entries_are_evicted_first():
    cache = filled(4, "abcd")
    for key, step in [("a", 5), ("b", 2), ("d", 3)]:
        cache.plan(key, 1, step)
    cache.finish_step(2)
    put(cache, "e")
    assert held(cache) == "abde"  # c was not planned
    put(cache, "f")
    assert held(cache) == "adef"  # b was planned up to step 2
    assert prefetch(cache, "g")
    assert held(cache) == "adfg"


def test_exhausted_entries_are_evicted_first():
    cache = filled(2, "ab")
    for step in (0, 1):
        cache.plan("b", 1, step, reads=2)
    cache.plan("a", 1, 0, reads=2)
    cache.finish_step(3)
    put(cache, "c")
    assert held(cache) == "ac"


def test_prefetch_never_evicts_needed_entries(caplog: pytest.LogCaptureFixture):
    cache = filled(2, "ab")
    cache.plan("a", 1, 3)
    cache.plan("b", 1, 4)
    assert not prefetch(cache, "c")
    assert (held(cache), caplog.messages) == ("ab", [])
    for key in "cd":
        put(cache, key)  # a reader's entry does
        cache.plan(key, 1, 5)  # needed from now on, so that the next eviction is a shortage again
    assert (len(held(cache)), caplog.messages) == (2, ["a shortage"])


def test_prefetched_unused_entries_are_evicted_last():
    cache = filled(2)
    for key in "ab":
        cache.plan(key, 1, 3)
        prefetch(cache, key)
    put(cache, "b")
    put(cache, "c")
    assert held(cache) == "ac"


def test_reader_takes_over_a_queued_fetch():
    cache, queued = filled(2), []
    assert cache.prefetch("a", 1, lambda: "a", queued.append)
    assert cache.get("a", 1, lambda: "another") == "a"
    (task,) = queued
    task()
    assert (cache.size, held(cache)) == (1, "a")


def test_planned_entries_are_prefetched_again_after_eviction():
    cache = filled(1)
    assert [cache.plan("a", 1, step) for step in (1, 2)] == [True, False]
    prefetch(cache, "a")
    assert not cache.plan("a", 1, 3)
    put(cache, "b")
    assert cache.plan("a", 1, 4)


def test_bad_value_is_invalidated_once():
    cache: PrefetchCache[list] = PrefetchCache(3)
    bad, good = ["bad"], ["good"]
    cache.get("a", 1, lambda: bad)
    for _ in range(2):
        cache.invalidate("a", bad)
        assert cache.get("a", 1, lambda: good) is good


def test_release_drops_exhausted_and_unneeded_entries():
    cache = filled(9, "abc")
    cache.plan("a", 1, 1, reads=1)
    cache.plan("b", 1, 2, reads=5)
    cache.plan("c", 1, 60, reads=5)
    for finished, expected in [(2, "bc"), (12, "c")]:
        cache.finish_step(finished)
        cache.release(unneeded_steps=10)
        assert held(cache) == expected


def test_entries_never_fetched_are_purged():
    cache = filled(1)
    for step in range(1000):
        cache.plan(step, 1, step)
        cache.finish_step(step)
    assert len(cache._entries) < 20


def test_close_raises_in_waiting_and_later_calls():
    cache, release = filled(2), threading.Event()
    cache.prefetch("a", 1, lambda: "a", lambda task: None)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(cache.get, "b", 1, lambda: release.wait(60) and "b")
        future = cache._entries["a"].future
        cache.close()
        with pytest.raises(RuntimeError, match="closed"):
            future.result(60)
        release.set()
        assert running.result(60) == "b"
    with pytest.raises(RuntimeError, match="closed"):
        put(cache, "c")


class Fetches:
    """Cache whose entries of 10 bytes are fetched by one thread; `started` records the order of the fetches."""

    def __init__(self, max_size: int = 10_000):
        self.started: list[str] = []
        self.cache: PrefetchCache[str] = PrefetchCache(max_size)
        self.pool = ThreadPoolExecutor(1)

    def request(self, key: str) -> PrefetchRequest:
        return PrefetchRequest(self.cache, key, 10, 10, 0, lambda: self.fetch(key), self.pool.submit)

    def fetch(self, key: str) -> str:
        self.started.append(key)
        return key

    @contextmanager
    def ahead(self, keys: Callable[[int], Iterable[str]], max_bytes: int, step: int = 0) -> Iterator[None]:
        self.cache.restart(step)
        self.prefetcher = Prefetcher(lambda later: map(self.request, keys(later)), step, max_bytes)
        try:
            yield
        finally:
            self.prefetcher.stop()
            self.prefetcher.join()
            self.pool.shutdown()

    def finish_step(self, step: int) -> None:
        self.cache.finish_step(step)
        self.prefetcher.finish_step(step)

    def expect(self, *keys: str) -> None:
        """Wait until these fetches have started, and check that no other one follows."""
        until(lambda: len(self.started) >= len(keys))
        time.sleep(0.05)
        assert self.started == list(keys)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "condition not met in 30 s"
        time.sleep(0.002)


def test_entries_are_fetched_in_order_within_the_byte_limit():
    fetches, first = Fetches(), ("own2", "shared1", "own3", "own4")
    with fetches.ahead(lambda step: [f"own{step}", f"shared{step // 2}"], max_bytes=40, step=2):
        fetches.expect(*first)
        fetches.finish_step(2)
        fetches.expect(*first, "shared2", "own5")


def test_entry_above_the_byte_limit_is_fetched_alone():
    fetches = Fetches()
    with fetches.ahead(lambda step: [f"{step}"], max_bytes=1):
        for step in range(3):
            fetches.expect(*"012"[: step + 1])
            fetches.finish_step(step)


def test_blocked_entry_is_fetched_when_a_step_finishes():
    fetches = Fetches(max_size=20)
    with fetches.ahead(lambda step: [f"{step}"], max_bytes=1000):
        fetches.expect("0", "1")
        fetches.finish_step(0)
        fetches.expect("0", "1", "2")


def test_finished_steps_are_not_prefetched():
    fetches, slow = Fetches(), threading.Event()

    def keys(step: int) -> list[str]:
        if step == 0:
            slow.wait(60)
        return [f"{step}"]

    with fetches.ahead(keys, max_bytes=30):
        fetches.finish_step(99)
        slow.set()
        fetches.expect("100", "101", "102")


def test_walk_stays_within_the_horizon():
    fetches, walked = Fetches(), []
    with fetches.ahead(lambda step: walked.append(step) or ["same"], max_bytes=30):
        until(lambda: len(walked) == HORIZON)
        fetches.finish_step(3)
        until(lambda: len(walked) == HORIZON + 4)
        fetches.expect("same")
    assert walked == list(range(HORIZON + 4))


def test_prefetch_failure_is_left_to_the_reader():
    fetches = Fetches()

    def fetch(key: str) -> str:
        fetches.started.append(key)
        if key == "4" or (key == "1" and fetches.started.count("1") == 1):
            raise StorageError(f"no {key}")
        return key

    def keys(step: int) -> list[str]:
        if step == 3:
            raise StorageError("the index cannot be read")
        return [f"{step}"]

    fetches.fetch = fetch
    with fetches.ahead(keys, max_bytes=1000):
        until(lambda: "9" in fetches.started)
        for key in "13":
            assert fetches.cache.get(key, 10, lambda key=key: fetch(key)) == key
        assert fetches.started.count("1") == 2
        with pytest.raises(StorageError, match="no 4"):
            fetches.cache.get("4", 10, lambda: fetch("4"))
