"""A bounded cache that knows which training steps need an entry, and a thread that fetches entries ahead of them.

`Prefetcher` walks the data order ahead of the loader and registers which step needs which entry, which is cheap; the
fetches follow it as far as the byte limit allows. `PrefetchCache` evicts entries that no known step needs: first those
whose reads of the epoch are complete, then the least recently needed. Without known steps it evicts the least recently
used.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Submit = Callable[[Callable[[], None]], object]
HORIZON = 256  # steps that the walk may be ahead
_PURGE_EVERY = 16  # steps


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    """Entry that is absent (no future), queued (with a task), being fetched, or held (the future is done)."""

    size: int
    future: Future[T] | None = None
    task: Callable[[], None] | None = None
    is_used: bool = False
    is_planned: bool = False  # in the prefetcher's queue
    last_step: int = -1  # last known step that needs it
    num_planned: int = 0  # known reads
    reads: int = 0  # maximum number of reads in an epoch

    @property
    def is_held(self) -> bool:
        return self.future is not None and self.future.done()

    @property
    def is_exhausted(self) -> bool:
        return self.reads > 0 and self.num_planned % self.reads == 0


class PrefetchCache(Generic[T]):
    """Bounded table by key, shared by threads. One thread fetches an entry while the others wait for it.

    Only entries that readers wait for may exceed the bound. The warning `shortage` is logged once when an entry is
    evicted that a known step still needs.
    """

    def __init__(self, max_size: int, shortage: str | None = None):
        self._max_size, self._shortage = max_size, shortage
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self.size = 0  # of all entries held or being fetched
        self._finished_step = -1
        self._is_closed = False
        self._lock = threading.Lock()

    def get(self, key: Hashable, size: int, fetch: Callable[[], T]) -> T:
        """Return the entry; fetch it in this thread unless it is held or being fetched. Raise what `fetch` raised."""
        with self._lock:
            entry = self._entry(key, size)
            self._entries.move_to_end(key)
            entry.is_used = True
            entry.last_step = max(entry.last_step, self._finished_step)
            if entry.future is None:
                self._queue(entry, fetch, force=True)
            future, task = entry.future, entry.task
        if task is not None:
            task()
        assert future is not None
        return future.result()

    def prefetch(self, key: Hashable, size: int, fetch: Callable[[], T], submit: Submit) -> bool:
        """Fetch an absent entry by `submit(task)`. Return False if that would evict an entry that is needed sooner."""
        with self._lock:
            entry = self._entry(key, size)
            if entry.future is not None:
                return True
            if not self._queue(entry, fetch, force=False):
                return False
            task = entry.task
        assert task is not None
        submit(task)
        return True

    def plan(self, key: Hashable, size: int, step: int, reads: int = 0) -> bool:
        """Register a read of the entry by `step`, one of at most `reads` in an epoch.

        Return True if the entry should be prefetched.
        """
        with self._lock:
            entry = self._entry(key, size)
            entry.last_step, entry.reads = max(entry.last_step, step), reads
            entry.num_planned += 1
            if entry.future is not None or entry.is_planned:
                return False
            entry.is_planned = True
            return True

    def finish_step(self, step: int) -> None:
        """Mark all reads up to `step` as done."""
        with self._lock:
            self._finished_step = max(self._finished_step, step)
            if step % _PURGE_EVERY == 0:
                for key in [k for k, e in self._entries.items() if e.future is None and e.last_step <= step]:
                    del self._entries[key]

    def release(self, unneeded_steps: int = 0) -> None:
        """Drop entries that no known step needs: exhausted ones at once, others after `unneeded_steps` steps."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                bound = self._finished_step - (0 if entry.is_exhausted else unneeded_steps)
                if entry.is_held and entry.last_step <= bound:
                    self._drop(key)

    def invalidate(self, key: Hashable, value: T) -> None:
        """Drop an entry whose value proved bad, unless it has been replaced since."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_held and entry.future and entry.future.result() is value:
                self._drop(key)

    def close(self) -> None:
        """Drop all entries. Waiting and later `get` calls raise RuntimeError, except for fetches in progress."""
        with self._lock:
            self._is_closed = True
            waiting = [entry for entry in self._entries.values() if entry.task is not None]
            self._entries.clear()
            for entry in waiting:
                entry.task = None
        for entry in waiting:
            assert entry.future is not None
            entry.future.set_exception(RuntimeError("closed"))

    def _entry(self, key: Hashable, size: int) -> _Entry[T]:
        if self._is_closed:
            raise RuntimeError("closed")
        return self._entries.setdefault(key, _Entry(size))

    def _queue(self, entry: _Entry[T], fetch: Callable[[], T], force: bool) -> bool:
        """Queue the fetch of an absent entry, after evicting others until it fits.

        Entries that a known step needs are evicted only with `force`; without, return False if they have no room.
        """
        while self.size + entry.size > self._max_size:
            candidates = []  # (is needed, rank among those, key); of equals the least recently used is first
            for key, other in self._entries.items():
                is_needed = other.last_step > self._finished_step
                if other.is_held and (force or not is_needed):
                    rank = (not other.is_used, 0) if is_needed else (not other.is_exhausted, other.last_step)
                    candidates.append((is_needed, rank, key))
            if not candidates:
                if not force:
                    return False
                break
            is_needed, _, key = min(candidates, key=lambda candidate: candidate[:2])
            if is_needed and self._shortage:
                log.warning(self._shortage)
                self._shortage = None
            self._drop(key)
        entry.future = Future()
        entry.task = partial(self._fetch, entry, entry.future, fetch)
        self.size += entry.size
        return True

    def _fetch(self, entry: _Entry[T], future: Future[T], fetch: Callable[[], T]) -> None:
        with self._lock:
            if entry.task is None or entry.future is not future:
                return  # a reader has taken the fetch over
            entry.task = None
        try:
            value = fetch()
        except BaseException as error:
            with self._lock:
                entry.future, entry.is_planned = None, False
                self.size -= entry.size
            future.set_exception(error)
        else:
            future.set_result(value)

    def _drop(self, key: Hashable) -> None:
        entry = self._entries[key]
        self.size -= entry.size
        entry.future, entry.is_planned, entry.is_used = None, False, False
        if entry.last_step <= self._finished_step:
            del self._entries[key]


class PrefetchRequest(NamedTuple):
    """Cache entry that one sample needs."""

    cache: PrefetchCache[Any]
    key: Hashable
    size: int  # in the cache's unit
    bytes: int  # to fetch
    reads: int  # maximum number of reads in an epoch
    fetch: Callable[[], Any]
    submit: Submit


class Prefetcher(threading.Thread):
    """Thread that prefetches the entries which the steps from `step` on need, in the order of need.

    `requests(step)` yields the entries of a step. `max_bytes` bounds the bytes requested for unfinished steps, except
    for a single larger entry. Failures are ignored here: the reader of the entry meets them.
    """

    def __init__(self, requests: Callable[[int], Iterable[PrefetchRequest]], step: int, max_bytes: int):
        super().__init__(name="read-ahead", daemon=True)
        self._requests, self._max_bytes = requests, max_bytes
        self._next_step = step  # of the walk
        self._finished_step = step - 1
        self._queue: deque[tuple[int, PrefetchRequest]] = deque()  # planned: (first step that needs it, request)
        self._submitted: deque[tuple[int, int]] = deque()  # (first step that needs it, bytes)
        self._ahead = 0  # bytes, summed over `_submitted`
        self._is_blocked = False  # the next request finds no room until a step is finished
        self._is_closed = False
        self._changed = threading.Condition()
        self.start()

    def finish_step(self, step: int) -> None:
        """Mark all reads up to `step` as done."""
        with self._changed:
            self._finished_step = max(self._finished_step, step)
            self._is_blocked = False
            self._changed.notify()

    def stop(self) -> None:
        """Let the thread end, which may still be waiting for an index."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def run(self) -> None:
        """Submit the next request when there is room for it, else walk one step further, else wait."""
        while True:
            with self._changed:
                while True:
                    finished = self._finished_step
                    while self._submitted and self._submitted[0][0] <= finished:
                        self._ahead -= self._submitted.popleft()[1]
                    while self._queue and self._queue[0][0] <= finished:
                        self._queue.popleft()  # its reader has fetched it
                    self._next_step = max(self._next_step, finished + 1)
                    has_room = bool(self._queue) and not self._is_blocked
                    if has_room and self._ahead:  # a single entry may exceed the limit
                        has_room = self._ahead + self._queue[0][1].bytes <= self._max_bytes
                    if self._is_closed:
                        return
                    if has_room or self._next_step <= finished + HORIZON:
                        break
                    self._changed.wait()
            try:
                if has_room:
                    step, request = self._queue[0]
                    if request.cache.prefetch(request.key, request.size, request.fetch, request.submit):
                        self._submitted.append((step, request.bytes))
                        self._ahead += request.bytes
                        self._queue.popleft()
                    else:
                        with self._changed:
                            self._is_blocked = self._finished_step == finished
                    continue
                step, self._next_step = self._next_step, self._next_step + 1
                for request in self._requests(step):
                    if request.cache.plan(request.key, request.size, step, request.reads):
                        self._queue.append((step, request))
            except Exception as error:
                if self._is_closed:  # and so is the cache
                    return
                if has_room:  # submitting failed, which is a bug; a failed plan is left to the reader
                    raise
                log.debug("prefetching for step %d failed: %s", step, error)
