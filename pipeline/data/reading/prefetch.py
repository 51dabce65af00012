"""Things that are fetched once, and kept within a bound as long as the coming steps need them.

Whoever reads ahead tells which step needs what. What no known step needs leaves first: at once what has been read to
the end of its epoch, then what was needed longest ago. Without such knowledge the longest unused leaves first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Start = Callable[[Callable[[], None]], object]
_TIDY_EVERY = 16  # steps


class _Entry(Generic[T]):
    """One thing: not there (no future), asked for, on its way (begun), or there (the future is done)."""

    __slots__ = ("future", "is_begun", "is_planned", "is_used", "last", "reads", "size", "task", "walked")

    def __init__(self, size: int):
        self.size = size
        self.future: Future[T] | None = None
        self.task: Callable[[], None] | None = None
        self.is_begun = self.is_used = False
        self.is_planned = False  # reading ahead has it in its queue
        self.last = -1  # the last known step that needs it
        self.walked, self.reads = 0, 0  # known reads, and how many an epoch has at most

    @property
    def is_held(self) -> bool:
        return self.future is not None and self.future.done()

    @property
    def is_exhausted(self) -> bool:
        return self.reads > 0 and self.walked % self.reads == 0


class PrefetchCache(Generic[T]):
    """A bounded table by key. Threads share it; each thing is fetched by one of them while the others wait for it.

    The bound is exceeded only by what readers wait for. `on_shortage` is called when something must leave that a
    known step still needs.
    """

    def __init__(self, most: int, on_shortage: Callable[[], None] = lambda: None):
        self._most, self._on_shortage = most, on_shortage
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._held = 0
        self._reached = -1
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """The size of all that is kept or on its way."""
        return self._held

    def get(self, key: Hashable, size: int, fetch: Callable[[], T]) -> T:
        """The thing; fetched by this thread unless it is there or another has begun. Raises what `fetch` raised."""
        with self._lock:
            entry = self._entry(key, size)
            self._entries.move_to_end(key)
            entry.is_used = True
            entry.last = max(entry.last, self._reached)
            if entry.future is None:
                self._make_room(size, must=True)
                self._ask(entry, fetch)
            future, task = entry.future, None if entry.is_begun else entry.task
        if task is not None:
            task()
        assert future is not None
        return future.result()

    def ask(self, key: Hashable, size: int, fetch: Callable[[], T], start: Start) -> bool:
        """Has it fetched by `start(task)` unless it is there; False when that would cost what is needed sooner."""
        with self._lock:
            entry = self._entry(key, size)
            if entry.future is not None:
                return True
            if not self._make_room(size, must=False):
                return False
            self._ask(entry, fetch)
            task = entry.task
        assert task is not None
        start(task)
        return True

    def need(self, key: Hashable, size: int, step: int, reads: int = 0) -> bool:
        """Notes that `step` reads it, one of at most `reads` times an epoch; True when it should be asked for."""
        with self._lock:
            entry = self._entry(key, size)
            entry.last = max(entry.last, step)
            entry.reads = reads
            entry.walked += 1
            if entry.future is not None or entry.is_planned:
                return False
            entry.is_planned = True
            return True

    def restart(self, step: int) -> None:
        """Forgets all needs: the coming steps will be told anew, from `step` on."""
        with self._lock:
            self._reached = step - 1
            for entry in self._entries.values():
                entry.last, entry.walked, entry.is_planned = -1, 0, False

    def reached(self, step: int) -> None:
        """No need up to `step` remains."""
        with self._lock:
            self._reached = max(self._reached, step)
            if step % _TIDY_EVERY == 0:
                gone = [k for k, e in self._entries.items() if e.future is None and e.last <= step]
                for key in gone:
                    del self._entries[key]

    def release(self, unneeded_steps: int = 0) -> None:
        """Lets go of what no known step needs: what an epoch has read to its end, the rest after some steps more."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                bound = self._reached - (0 if entry.is_exhausted else unneeded_steps)
                if entry.is_held and entry.last <= bound:
                    self._drop(key)

    def invalidate(self, key: Hashable, value: T) -> None:
        """Lets go of a thing that proved bad, so that it is fetched again, unless that has been done already."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_held and entry.future and entry.future.result() is value:
                self._drop(key)

    def close(self) -> None:
        """Lets go of everything. Who waits for what has not begun gets a RuntimeError, and so does who asks again."""
        with self._lock:
            self._is_closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            waiting = [entry for entry in entries if entry.future is not None and not entry.is_begun]
            for entry in waiting:
                entry.is_begun = True
        for entry in waiting:
            assert entry.future is not None
            entry.future.set_exception(RuntimeError("closed"))

    def _entry(self, key: Hashable, size: int) -> _Entry[T]:
        if self._is_closed:
            raise RuntimeError("closed")
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(size)
        return entry

    def _ask(self, entry: _Entry[T], fetch: Callable[[], T]) -> None:
        entry.future, entry.is_begun = Future(), False
        entry.task = partial(self._run, entry, entry.future, fetch)
        self._held += entry.size

    def _run(self, entry: _Entry[T], future: Future[T], fetch: Callable[[], T]) -> None:
        with self._lock:
            if entry.is_begun or entry.future is not future:
                return  # a reader that could not wait has taken it over
            entry.is_begun, entry.task = True, None
        try:
            value = fetch()
        except BaseException as error:
            with self._lock:
                entry.future, entry.is_planned = None, False
                self._held -= entry.size
            future.set_exception(error)
        else:
            future.set_result(value)

    def _make_room(self, size: int, must: bool) -> bool:
        while self._held + size > self._most:
            candidates = [(self._rank(e), k) for k, e in self._entries.items() if e.is_held]
            if not must:
                candidates = [(rank, key) for rank, key in candidates if not rank[0]]
            if not candidates:
                return must
            rank, key = min(candidates, key=_first)
            if rank[0]:
                self._on_shortage()
            self._drop(key)
        return True

    def _rank(self, entry: _Entry[T]) -> tuple[Any, ...]:
        """What has the lowest leaves first; of equals, the longest unused."""
        if entry.last > self._reached:
            return True, not entry.is_used, 0
        return False, not entry.is_exhausted, entry.last

    def _drop(self, key: Hashable) -> None:
        entry = self._entries[key]
        self._held -= entry.size
        entry.future, entry.is_planned, entry.is_used = None, False, False
        if entry.last <= self._reached:
            del self._entries[key]


def _first(candidate: tuple[tuple[Any, ...], Hashable]) -> tuple[Any, ...]:
    return candidate[0]


log = logging.getLogger(__name__)

HORIZON = 256  # steps


@dataclass(frozen=True)
class PrefetchRequest:
    """Something that one slot reads."""

    store: PrefetchCache[Any]
    key: Hashable
    size: int  # in the store's measure
    bytes: int  # to be fetched
    reads: int  # of it in an epoch at most
    fetch: Callable[[], Any]
    start: Start


class Prefetcher:
    """A thread that asks for what the steps from `step` on need.

    `needs(step)` yields what each slot of a step needs; `most` bounds the bytes that were asked for and that no step
    up to the reached one has needed, unless a single thing is larger.
    """

    def __init__(self, needs: Callable[[int], Iterable[PrefetchRequest]], step: int, most: int):
        self._needs, self._most = needs, most
        self._next = step  # to be walked
        self._reached = step - 1
        self._queue: deque[tuple[int, PrefetchRequest]] = deque()  # (first step that needs it, request)
        self._asked: deque[tuple[int, int]] = deque()  # (first step that needs it, bytes)
        self._ahead = 0  # bytes, the sum over `_asked`
        self._is_blocked = False  # what is next in the queue finds no room before another step is reached
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """The consumer has what all steps up to this one need."""
        with self._changed:
            self._reached = max(self._reached, step)
            self._is_blocked = False
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._pass()
                while not (self._is_closed or self._may_ask() or self._may_walk()):
                    self._changed.wait()
                    self._pass()
                if self._is_closed:
                    return
            try:
                self._ask()
                if self._may_walk():
                    self._walk()
            except RuntimeError:
                if not self._is_closed:
                    raise
                return

    def _may_walk(self) -> bool:
        return self._next <= self._reached + HORIZON

    def _may_ask(self) -> bool:
        if not self._queue or self._is_blocked:
            return False
        return not self._ahead or self._ahead + self._queue[0][1].bytes <= self._most

    def _pass(self) -> None:
        """Takes account of the reached step."""
        while self._asked and self._asked[0][0] <= self._reached:
            self._ahead -= self._asked.popleft()[1]
        while self._queue and self._queue[0][0] <= self._reached:
            self._queue.popleft()  # whoever needed it has fetched it
        self._next = max(self._next, self._reached + 1)

    def _ask(self) -> None:
        while self._may_ask():
            (step, need), reached = self._queue[0], self._reached
            if not need.store.ask(need.key, need.size, need.fetch, need.start):
                with self._changed:
                    self._is_blocked = self._reached == reached
                return
            self._queue.popleft()
            self._asked.append((step, need.bytes))
            self._ahead += need.bytes

    def _walk(self) -> None:
        step = self._next
        self._next += 1
        try:
            for need in self._needs(step):
                if need.store.need(need.key, need.size, step, need.reads):
                    self._queue.append((step, need))
        except Exception as error:
            if self._is_closed:
                return
            log.debug("reading ahead of step %d: %s", step, error)
