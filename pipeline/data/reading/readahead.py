"""Fetching what the coming steps need, in the order they need it, a bounded number of bytes before they do.

A walk over the plan runs ahead of the consumer. It only notes who needs what, so that it can be far ahead; fetching
follows it as far as the bound allows. What fails here is left alone: the reader who needs it meets the failure.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.data.reading.working_set import Start, WorkingSet

log = logging.getLogger(__name__)

HORIZON = 256  # steps


@dataclass(frozen=True)
class Need:
    """Something that one slot reads."""

    store: WorkingSet[Any]
    key: Hashable
    size: int  # in the store's measure
    bytes: int  # to be fetched
    reads: int  # of it in an epoch at most
    fetch: Callable[[], Any]
    start: Start


class ReadAhead:
    """A thread that asks for what the steps from `step` on need.

    `needs(step)` yields what each slot of a step needs; `most` bounds the bytes that were asked for and that no step
    up to the reached one has needed, unless a single thing is larger.
    """

    def __init__(self, needs: Callable[[int], Iterable[Need]], step: int, most: int):
        self._needs, self._most = needs, most
        self._next = step  # to be walked
        self._reached = step - 1
        self._queue: deque[tuple[int, Need]] = deque()  # noted and not asked for: (first step that needs it, what)
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
