"""Trying again: exponential backoff with full jitter, the store's own RetryPolicy-After, and one deadline.

The deadline is how long a store may be away, or slow, before a run fails: nothing counts tries. It bounds one request,
or each 16 MiB of a longer body.
"""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from pipeline.data.storage.errors import RetryTimeout, TransientError, is_transient

T = TypeVar("T")
PIECE = 16 * 2**20  # bytes of a body that must come within one deadline
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds, before jitter
_QUIET = 5.0  # seconds of trouble that are not worth a line in the log, and between two lines
_jitter = random.SystemRandom()  # never the global generator, and different in forked processes
log = logging.getLogger(__name__)


@dataclass
class RetryPolicy:
    """The policy of one process: its deadline in seconds, and when it last warned of a store in trouble."""

    deadline: float
    _warned: float = float("-inf")

    def __call__(self, url: str, request: Callable[[], T]) -> T:
        """The request's result; its own error when trying again is useless, RetryTimeout after the deadline."""
        budget = self.budget(url)
        while True:
            try:
                return request()
            except Exception as error:
                budget.wait(error)

    def budget(self, url: str) -> RetryBudget:
        """For a request whose tries build on each other."""
        return RetryBudget(self, url)

    def warn(self, url: str, error: Exception, left: float) -> None:
        now = time.monotonic()
        if now - self._warned >= _QUIET:
            self._warned = now
            log.warning("%s: %s: %s; trying on, for %.0f s more", url, type(error).__name__, error, left)


class RetryBudget:
    """What is left of it for one request."""

    def __init__(self, retry: RetryPolicy, url: str):
        self._retry, self._url = retry, url
        self._began = time.monotonic()
        self._tries = self._vain = self._received = 0

    def received(self, num_bytes: int) -> None:
        """Record received bytes, which resets the backoff. Raises TransientError after the deadline."""
        self._vain = 0
        self._received += num_bytes
        if self._received >= PIECE:
            self._began, self._tries, self._received = time.monotonic(), 0, 0
        elif self._left() <= 0:
            raise TransientError("the answer came too slowly")

    def wait(self, error: Exception) -> None:
        """Sleeps before the next try. Raises `error` where none can help, RetryTimeout when the deadline is over."""
        if not is_transient(error):
            raise error
        self._tries += 1
        left = self._left()
        if left <= 0:
            raise RetryTimeout(self._tries, self._retry.deadline - left) from error
        if self._retry.deadline - left > _QUIET:
            self._retry.warn(self._url, error, left)
        time.sleep(min(left, self._pause(error)))  # so that the last try is at the deadline
        self._vain += 1

    def _left(self) -> float:
        return self._began + self._retry.deadline - time.monotonic()

    def _pause(self, error: Exception) -> float:
        # The jitter comes on top of RetryPolicy-After: all clients were told the same seconds.
        asked = error.retry_after if isinstance(error, TransientError) else 0.0
        return asked + _jitter.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self._vain, 16)))


@dataclass(frozen=True)
class RangeResponse:
    """The end (exclusive) of the bytes an answer brings, the version they belong to, and they themselves, as they come.

    `pieces` may raise a TransientError between two pieces; closing it ends the connection.
    """

    stop: int
    etag: str | None
    pieces: Generator[bytes, None, None]


Ask = Callable[[int, int | None, str | None], RangeResponse]


def ranged_get(ask: Ask, url: str, start: int, stop: int | None, etag: str | None, retry: RetryPolicy) -> bytes:
    """The bytes [start, stop), all of one version; `stop` None: to the end.

    `ask(start, stop, etag)` begins one answer, or raises. With `etag` it must refuse any other version.
    """
    received, at = io.BytesIO(), start
    budget = retry.budget(url)
    while stop is None or at < stop:
        try:
            answer = ask(at, stop, etag)
            stop, etag = answer.stop, answer.etag
            with closing(answer.pieces) as pieces:
                for piece in pieces:
                    if at + len(piece) > stop:
                        raise TransientError(f"more than the bytes up to {stop} came")
                    received.write(piece)
                    at += len(piece)
                    budget.received(len(piece))
            if at != stop:
                raise TransientError(f"the body ended at byte {at} and not at {stop}")
        except Exception as error:
            budget.wait(error)
    return received.getvalue()
