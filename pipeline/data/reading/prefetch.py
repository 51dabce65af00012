"""A bounded cache that knows which training steps need an entry, and fetches entries ahead of them. `read_ahead` walks
the data order ahead of the loader and registers the steps' entries, which is cheap; the fetches follow as far as the
byte limit allows. Evicted are entries that no known step needs: first those whose reads of the epoch are complete, then
the least recently needed; without known steps, the least recently used.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
HORIZON = 256  # steps that the walk may be ahead


class PrefetchRequest(NamedTuple):
    """Entry of a cache that one sample needs."""

    cache: "PrefetchCache[Any]"
    key: Hashable
    size: int  # in the cache's unit
    fetch: Callable[[], Any]
    submit: Callable[[Callable[[], None]], object]  # starts a prefetch
    bytes: int = 0  # to fetch
    reads: int = 0  # maximum number of reads in an epoch


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    """Entry that is absent (no future), queued (with a task), being fetched, or held (the future is done)."""

    size: int
    future: Future[T] | None = None
    task: Callable[[], None] | None = None
    is_used: bool = False
    is_planned: bool = False  # to be prefetched
    last_step: int = -1  # last known step that needs it
    num_planned: int = 0  # known reads
    is_exhausted: bool = False  # the known reads are all of their epoch


@dataclass(eq=False)
class PrefetchCache(Generic[T]):
    """Bounded table shared by threads, of which one fetches an entry while the others wait for it. Only entries that
    readers wait for may exceed the bound; `shortage` is logged once if that evicts a needed entry.
    """

    max_size: int
    shortage: str | None = None
    size: int = field(default=0, init=False)  # of all entries held or being fetched
    _entries: OrderedDict[Hashable, _Entry[T]] = field(default_factory=OrderedDict, init=False)
    _finished_step: int = field(default=-1, init=False)
    _is_closed: bool = field(default=False, init=False)
    # The lock; notified when a step is finished and when the cache is closed.
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)

    def get(self, key: Hashable, size: int, fetch: Callable[[], T]) -> T:
        """Return the entry; fetch it in this thread unless it is held or being fetched. Raise what `fetch` raised."""
        with self._changed:
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

    def plan(self, request: PrefetchRequest, step: int) -> bool:
        """Register a read of an entry by `step`. Return True if the entry should be prefetched."""
        with self._changed:
            entry = self._entry(request.key, request.size)
            entry.last_step = max(entry.last_step, step)
            entry.num_planned += 1
            entry.is_exhausted = request.reads > 0 and entry.num_planned % request.reads == 0
            if entry.future is not None or entry.is_planned:
                return False
            entry.is_planned = True
            return True

    def prefetch(self, request: PrefetchRequest) -> bool:
        """Submit the fetch of an absent entry. Return False if that would evict an entry that is needed sooner."""
        with self._changed:
            entry = self._entry(request.key, request.size)
            if entry.future is not None:
                return True
            if not self._queue(entry, request.fetch, force=False) or entry.task is None:
                return False
            request.submit(entry.task)
            return True

    def read_ahead(self, requests: Callable[[int], Iterable[PrefetchRequest]], step: int, max_bytes: int) -> None:
        """Prefetch `requests(step)` from `step` on, into any caches, until this one is closed. `max_bytes` bounds the
        bytes requested for steps not finished in this one, except for a single larger entry. Failures are left to the
        entry's reader.
        """
        planned: deque[tuple[int, PrefetchRequest]] = deque()  # with the first step that needs it
        submitted: deque[tuple[int, int]] = deque()  # (first step that needs it, bytes)
        bytes_ahead = 0  # summed over `submitted`
        blocked_at: int | None = None  # last finished step when the next request found no room
        with self._changed:
            self._finished_step = max(self._finished_step, step - 1)
        while True:
            with self._changed:
                while True:
                    finished = self._finished_step
                    while submitted and submitted[0][0] <= finished:
                        bytes_ahead -= submitted.popleft()[1]
                    while planned and planned[0][0] <= finished:
                        planned.popleft()  # its reader has fetched it
                    step = max(step, finished + 1)
                    has_room = bool(planned) and finished != blocked_at
                    if has_room and bytes_ahead:  # a single entry may exceed the limit
                        has_room = bytes_ahead + planned[0][1].bytes <= max_bytes
                    if self._is_closed:
                        return
                    if has_room or step <= finished + HORIZON:
                        break
                    self._changed.wait()
            try:
                if has_room:
                    first, request = planned[0]
                    if request.cache.prefetch(request):
                        submitted.append((first, request.bytes))
                        bytes_ahead += request.bytes
                        planned.popleft()
                    else:
                        blocked_at = finished
                    continue
                step += 1
                for request in requests(step - 1):
                    if request.cache.plan(request, step - 1):
                        planned.append((step - 1, request))
            except Exception as error:
                if self._is_closed:  # the other caches and the threads may be, too
                    return
                if has_room:  # submitting failed, which is a bug
                    raise
                log.debug("prefetching for step %d failed: %s", step - 1, error)

    def finish_step(self, step: int) -> None:
        """Mark all reads up to `step` as done."""
        with self._changed:
            self._finished_step = max(self._finished_step, step)
            if step % 16 == 0:  # now and then, because it takes time
                for key in [k for k, e in self._entries.items() if e.future is None and e.last_step <= step]:
                    del self._entries[key]
            self._changed.notify_all()

    def release(self, unneeded_steps: int = 0) -> None:
        """Drop entries that no known step needs: exhausted ones at once, others after `unneeded_steps` steps."""
        with self._changed:
            for key, entry in list(self._entries.items()):
                bound = self._finished_step - (0 if entry.is_exhausted else unneeded_steps)
                if entry.future and entry.future.done() and entry.last_step <= bound:
                    self._drop(key)

    def invalidate(self, key: Hashable, value: T) -> None:
        """Drop an entry whose value proved bad, unless it has been replaced since."""
        with self._changed:
            entry = self._entries.get(key)
            if entry and entry.future and entry.future.done() and entry.future.result() is value:
                self._drop(key)

    def close(self) -> None:
        """Drop all entries. Waiting and later calls raise RuntimeError, except for fetches in progress."""
        with self._changed:
            self._is_closed = True
            waiting = [entry for entry in self._entries.values() if entry.task is not None]
            self._entries.clear()
            for entry in waiting:
                entry.task = None
            self._changed.notify_all()
        for entry in waiting:
            assert entry.future is not None
            entry.future.set_exception(RuntimeError("closed"))

    def _entry(self, key: Hashable, size: int) -> _Entry[T]:
        if self._is_closed:
            raise RuntimeError("closed")
        return self._entries.setdefault(key, _Entry(size))

    def _queue(self, entry: _Entry[T], fetch: Callable[[], T], force: bool) -> bool:
        """Queue a fetch after evicting others until it fits; without `force`, False if needed ones leave no room."""
        while self.size + entry.size > self.max_size:
            candidates = []  # (is needed, rank among those, key); of equals the least recently used is first
            for key, other in self._entries.items():
                is_needed = other.last_step > self._finished_step
                if other.future and other.future.done() and (force or not is_needed):
                    rank = (not other.is_used, 0) if is_needed else (not other.is_exhausted, other.last_step)
                    candidates.append((is_needed, rank, key))
            if not candidates:
                if not force:
                    return False
                break
            is_needed, _, key = min(candidates, key=lambda candidate: candidate[:2])
            if is_needed and self.shortage:
                log.warning(self.shortage)
                self.shortage = None
            self._drop(key)
        entry.future = Future()
        entry.task = partial(self._fetch, entry, entry.future, fetch)
        self.size += entry.size
        return True

    def _fetch(self, entry: _Entry[T], future: Future[T], fetch: Callable[[], T]) -> None:
        with self._changed:
            if entry.task is None or entry.future is not future:
                return  # a reader has taken the fetch over
            entry.task = None
        try:
            value = fetch()
        except BaseException as error:
            with self._changed:
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
