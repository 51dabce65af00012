"""The prefetch cache and its planner fetch each entry once, in order and within their byte limits."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, PrefetchRequest


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "condition not met in 30 s"
        time.sleep(0.002)


class Letters(PrefetchCache[str]):
    """Cache whose entries are their keys, of size 1 and 10 bytes, at first those of `keys`; it records the fetches."""

    def __init__(self, max_size: int = 1000, keys: str = ""):
        super().__init__(max_size, "a shortage")
        self.started: list[str] = []
        self.put(*keys)

    def fetch(self, key: str) -> str:
        self.started.append(key)
        if key == "bad" or (key == "once" and self.started.count(key) == 1):
            raise StorageError(f"no {key}")
        return key

    def put(self, *keys: str) -> None:
        for key in keys:
            assert self.get(key, 1, partial(self.fetch, key)) == key

    def request(self, key: str, submit=lambda task: task(), reads: int = 0) -> PrefetchRequest:
        return PrefetchRequest(self, key, 1, partial(self.fetch, key), submit, 10, reads)

    def needs(self, key: str, *steps: int, reads: int = 0) -> bool:
        return [self.plan(self.request(key, reads=reads), step) for step in steps][-1]

    @property
    def held(self) -> str:
        return "".join(sorted(str(key) for key, entry in self._entries.items() if entry.future and entry.future.done()))

    @contextmanager
    def ahead(self, keys: Callable[[int], Iterable[str]], max_bytes: int, step: int = 0) -> Iterator[None]:
        """Fetch the entries of each step ahead in one thread."""
        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as prefetcher:
            requests = (lambda step: [self.request(key, pool.submit) for key in keys(step)], step, max_bytes)
            ended = prefetcher.submit(self.read_ahead, *requests)
            try:
                yield
            finally:
                self.close()
                ended.result(60)

    def expect(self, *keys: str) -> None:
        """Wait until these fetches have started, and check that no other one follows."""
        until(lambda: len(self.started) >= len(keys))
        time.sleep(0.05)
        assert self.started == list(keys)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_wait_for_a_single_fetch_and_share_its_failure(fails: bool):
    cache, started, calls = Letters(10), threading.Event(), []

    def fetch() -> str:
        calls.append(1)
        started.set()
        time.sleep(0.05)
        if fails:
            raise DataError("gone")
        return "value"

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(cache.get, "key", 4, fetch)]
        started.wait()
        results += [pool.submit(cache.get, "key", 4, fetch) for _ in range(1 if fails else 7)]
        assert {type(result.exception()) for result in results} == {DataError if fails else type(None)}
    assert (len(calls), cache.size) == (1, 0 if fails else 4)
    assert cache.get("key", 4, lambda: "again") == ("again" if fails else "value")


def test_unneeded_then_exhausted_then_used_entries_are_evicted_first(caplog: pytest.LogCaptureFixture):
    cache = Letters(4, "abcd")
    for key, step in [("a", 5), ("b", 2), ("d", 3)]:
        cache.needs(key, step)
    cache.finish_step(2)
    for key, held in (("e", "abde"), ("f", "adef")):  # c was not planned, and b up to step 2
        cache.put(key)
        assert cache.held == held
    assert (cache.prefetch(cache.request("g")), cache.held) == (True, "adfg")
    exhausted = Letters(2, "ab")
    exhausted.needs("b", 0, 1, reads=2)
    exhausted.needs("a", 0, reads=2)
    exhausted.finish_step(3)
    exhausted.put("c")
    assert exhausted.held == "ac"
    unused = Letters(2)
    for key in "ab":
        unused.needs(key, 3)
        unused.prefetch(unused.request(key))
    unused.put("b")
    assert caplog.messages == []
    unused.put("c")
    assert (unused.held, caplog.messages) == ("ac", ["a shortage"])
    caplog.clear()
    needed = Letters(2, "ab")
    needed.needs("a", 3)
    needed.needs("b", 4)
    assert not needed.prefetch(needed.request("c")), "a prefetch evicts no needed entry"
    assert (needed.held, caplog.messages) == ("ab", [])
    for key in "cd":
        needed.put(key)  # a reader's entry does
        needed.needs(key, 5)  # from now on, so that the next eviction is a shortage again
    assert (len(needed.held), caplog.messages) == (2, ["a shortage"])


def test_newest_entries_are_kept_within_the_bound_and_lost_ones_fetched_when_next_needed():
    bounded: PrefetchCache[bytes] = PrefetchCache(1000)
    for number in range(50):
        assert bounded.get(number, 300, lambda: bytes(300)) == bytes(300)
        assert bounded.size == min(900, 300 * (number + 1))
    assert bounded.get(49, 300, lambda: b"fetched again") == bytes(300)
    assert len(bounded.get("big", 5000, lambda: bytes(5000))) == 5000
    cache, queued = Letters(2), []
    assert cache.prefetch(cache.request("a", queued.append))
    assert cache.get("a", 1, lambda: "another") == "a"
    queued[0]()
    assert (cache.size, cache.held, len(queued)) == (1, "a", 1)
    evicted = Letters(1)
    assert [evicted.needs("a", step) for step in (1, 2)] == [True, False]
    evicted.prefetch(evicted.request("a"))
    assert not evicted.needs("a", 3)
    evicted.put("b")
    assert evicted.needs("a", 4)
    lists: PrefetchCache[list] = PrefetchCache(3)
    bad, good = ["bad"], ["good"]
    lists.get("a", 1, lambda: bad)
    for _ in range(2):
        lists.invalidate("a", bad)
        assert lists.get("a", 1, lambda: good) is good


def test_finished_entries_are_released_and_purged():
    cache = Letters(9, "abc")
    for key, step, reads in [("a", 1, 1), ("b", 2, 5), ("c", 60, 5)]:
        cache.needs(key, step, reads=reads)
    for finished, expected in [(2, "bc"), (12, "c")]:
        cache.finish_step(finished)
        cache.release(unneeded_steps=10)
        assert cache.held == expected
    for step in range(1000):  # entries that are never fetched
        cache.needs(f"{step}", step)
        cache.finish_step(step)
    assert len(cache._entries) < 20


def test_close_raises_in_waiting_and_later_calls():
    cache, release = Letters(2), threading.Event()
    cache.prefetch(cache.request("a", lambda task: None))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(cache.get, "b", 1, lambda: release.wait(60) and "b")
        future = cache._entries["a"].future
        cache.close()
        for call in (partial(future.result, 60), partial(cache.put, "c")):
            with pytest.raises(RuntimeError, match="closed"):
                call()
        release.set()
        assert running.result(60) == "b"


def test_entries_of_unfinished_steps_are_fetched_in_order_within_the_byte_limit_and_the_horizon():
    fetches, first = Letters(), ("own2", "shared1", "own3", "own4")
    with fetches.ahead(lambda step: [f"own{step}", f"shared{step // 2}"], max_bytes=40, step=2):
        fetches.expect(*first)
        fetches.finish_step(2)
        fetches.expect(*first, "shared2", "own5")
    fetches, slow = Letters(), threading.Event()
    with fetches.ahead(lambda step: [f"{step}"] if step or slow.wait(60) else [], max_bytes=30):
        fetches.finish_step(99)
        slow.set()
        fetches.expect("100", "101", "102")
    for max_size, max_bytes, num_at_once in [(1000, 1, 1), (2, 1000, 2)]:  # large and blocked entries
        fetches = Letters(max_size)
        with fetches.ahead(lambda step: [f"{step}"], max_bytes):
            for step in range(3):
                fetches.expect(*"01234"[: step + num_at_once])
                fetches.finish_step(step)
    fetches, walked = Letters(), []  # the walk stays within the horizon
    with fetches.ahead(lambda step: walked.append(step) or ["same"], max_bytes=30):
        until(lambda: len(walked) == HORIZON)
        fetches.finish_step(3)
        until(lambda: len(walked) == HORIZON + 4)
        fetches.expect("same")
    assert walked == list(range(HORIZON + 4))


def test_prefetch_failure_is_left_to_the_reader():
    fetches = Letters()

    def keys(step: int) -> list[str]:
        if step == 3:
            raise StorageError("the index cannot be read")
        return [{1: "once", 4: "bad"}.get(step, f"{step}")]

    with fetches.ahead(keys, max_bytes=1000):
        until(lambda: "9" in fetches.started)
        fetches.put("once", "3")
        assert fetches.started.count("once") == 2
        with pytest.raises(StorageError, match="no bad"):
            fetches.put("bad")
