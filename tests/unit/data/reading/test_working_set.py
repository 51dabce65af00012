from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.config.errors import DataError
from pipeline.data.reading.prefetch import PrefetchCache


def filled(most: int, keys: str, told: list | None = None) -> PrefetchCache[str]:
    """Each thing measures 1."""
    store: PrefetchCache[str] = PrefetchCache(most, lambda: (told if told is not None else []).append("shortage"))
    for key in keys:
        store.get(key, 1, lambda key=key: key)
    return store


def kept(store: PrefetchCache[str], keys: str) -> str:
    """Which of the keys need not be fetched again."""
    return "".join(key for key in keys if (entry := store._entries.get(key)) is not None and entry.is_held)


def test_what_is_kept_stays_within_the_bound_and_the_newest_are_kept():
    store: PrefetchCache[bytes] = PrefetchCache(1000)
    for number in range(50):
        assert store.get(number, 300, lambda: bytes(300)) == bytes(300)
        assert store.size == min(900, 300 * (number + 1))
    calls = []
    store.get(49, 300, lambda: calls.append(1) or b"")
    assert not calls
    assert len(store.get("big", 5000, lambda: bytes(5000))) == 5000


def test_threads_wait_for_the_one_that_fetches():
    store: PrefetchCache[int] = PrefetchCache(10)
    calls = []

    def fetch() -> int:
        time.sleep(0.05)
        calls.append(1)
        return 7

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: store.get("key", 1, fetch), range(8))) == [7] * 8
    assert len(calls) == 1


def test_a_failed_fetch_reaches_every_waiter_and_is_tried_again():
    store: PrefetchCache[bytes] = PrefetchCache(1000)
    begun = threading.Event()

    def fail() -> bytes:
        begun.set()
        time.sleep(0.05)
        raise DataError("gone")

    def wait() -> bytes:
        begun.wait()
        return store.get("key", 4, fail)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(store.get, "key", 4, fail), pool.submit(wait)]
        assert all(isinstance(result.exception(), DataError) for result in results)
    assert store.size == 0
    assert store.get("key", 4, lambda: b"back") == b"back"


def test_what_no_known_step_needs_leaves_before_what_one_needs():
    store = filled(4, "abcd")
    store.restart(0)
    for key, step in [("a", 5), ("b", 2), ("d", 3)]:
        store.plan(key, 1, step)
    store.finish_step(2)
    store.get("e", 1, lambda: "e")
    assert kept(store, "abcde") == "abde"  # nobody was known to need c
    store.get("f", 1, lambda: "f")
    assert kept(store, "abdef") == "adef"  # b was needed up to step 2
    assert store.prefetch("g", 1, lambda: "g", lambda task: task())
    assert kept(store, "adefg") == "adfg"


def test_what_an_epoch_has_read_to_its_end_leaves_first():
    store = filled(2, "ab")
    store.restart(0)
    for step in (0, 1):
        store.plan("b", 1, step, reads=2)
    store.plan("a", 1, 0, reads=2)
    store.finish_step(3)
    store.get("c", 1, lambda: "c")
    assert kept(store, "abc") == "ac"


def test_asking_never_costs_what_is_needed_and_a_reader_is_told_what_it_costs():
    told: list[str] = []
    store = filled(2, "ab", told)
    store.restart(0)
    store.plan("a", 1, 3)
    store.plan("b", 1, 4)
    assert not store.prefetch("c", 1, lambda: "c", lambda task: task())
    assert (kept(store, "abc"), told) == ("ab", [])
    assert store.get("c", 1, lambda: "c") == "c"
    assert (len(kept(store, "ab")), told) == (1, ["shortage"])


def test_what_was_read_ahead_and_not_yet_used_leaves_last():
    store: PrefetchCache[str] = PrefetchCache(2)
    for key in "ab":
        store.plan(key, 1, 3)
        store.prefetch(key, 1, lambda key=key: key, lambda task: task())
    store.get("b", 1, lambda: "never called")
    store.get("c", 1, lambda: "c")
    assert kept(store, "abc") == "ac"


def test_a_reader_takes_over_what_was_asked_for_and_has_not_begun():
    store: PrefetchCache[str] = PrefetchCache(2)
    waiting = []
    assert store.prefetch("a", 1, lambda: "a", waiting.append)
    assert store.get("a", 1, lambda: "another") == "a"
    (task,) = waiting
    task()
    assert (store.size, kept(store, "a")) == (1, "a")


def test_needs_are_asked_for_once_and_again_when_they_had_to_leave():
    store: PrefetchCache[str] = PrefetchCache(1)
    assert [store.plan("a", 1, step) for step in (1, 2)] == [True, False]
    store.prefetch("a", 1, lambda: "a", lambda task: task())
    assert not store.plan("a", 1, 3)
    store.get("b", 1, lambda: "b")
    assert store.plan("a", 1, 4)


def test_a_bad_thing_is_forgotten_once_however_many_saw_it():
    store: PrefetchCache[list] = PrefetchCache(3)
    bad, good = ["bad"], ["good"]
    store.get("a", 1, lambda: bad)
    for _ in range(2):
        store.invalidate("a", bad)
        assert store.get("a", 1, lambda: good) is good


def test_things_are_released_when_they_are_read_to_the_end_or_long_unneeded():
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


def test_notes_of_what_was_never_fetched_do_not_pile_up():
    store: PrefetchCache[str] = PrefetchCache(1)
    for step in range(1000):
        store.plan(step, 1, step)
        store.finish_step(step)
    assert len(store._entries) < 20


def test_closing_wakes_who_waits_and_refuses_who_asks():
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
