"""Retries with exponential backoff, full jitter, the store's Retry-After and one timeout; ranged reads that resume.

`storage.retry_timeout_seconds` bounds the time for which a store may be unavailable or slow before the run fails; the
number of attempts is not limited. The timeout applies to one request, and restarts every 16 MiB of a response body.
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
PROGRESS_BYTES = 16 * 2**20  # received bytes that restart the timeout
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds, before jitter
_WARN_AFTER = 5.0  # seconds of failures before the first warning, and between two warnings
_jitter = random.SystemRandom()  # independent of the global generator, and different in forked processes
log = logging.getLogger(__name__)


@dataclass
class RetryPolicy:
    """Retry policy of one process: the timeout in seconds, and the time of the last warning."""

    timeout: float
    last_warning: float = float("-inf")

    def __call__(self, url: str, request: Callable[[], T]) -> T:
        """Return the result of `request`. Raise its error if permanent, RetryTimeout after the timeout."""
        budget = RetryBudget(self, url)
        while True:
            try:
                return request()
            except Exception as error:
                budget.wait(error)


class RetryBudget:
    """Remaining time for the attempts of one request."""

    def __init__(self, policy: RetryPolicy, url: str):
        self._policy, self._url = policy, url
        self._start = time.monotonic()
        self._attempts = self._failures = self._received = 0  # failures: in a row, without a byte received

    def add_progress(self, num_bytes: int) -> None:
        """Record received bytes, which reset the backoff. Raise TransientError after the timeout."""
        self._failures = 0
        self._received += num_bytes
        if self._received >= PROGRESS_BYTES:
            self._start, self._attempts, self._received = time.monotonic(), 0, 0
        elif time.monotonic() - self._start >= self._policy.timeout:
            raise TransientError("the response arrived too slowly")

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt. Raise `error` if it is permanent, RetryTimeout after the timeout."""
        if not is_transient(error):
            raise error
        self._attempts += 1
        now = time.monotonic()
        elapsed, remaining = now - self._start, self._start + self._policy.timeout - now
        if remaining <= 0:
            raise RetryTimeout(f"{self._attempts} attempts in {elapsed:.0f} s") from error
        if elapsed > _WARN_AFTER and now - self._policy.last_warning >= _WARN_AFTER:
            self._policy.last_warning = now
            log.warning("%s: %s: %s; retrying for %.0f s more", self._url, type(error).__name__, error, remaining)
        # The jitter is added to Retry-After because all clients received the same value.
        retry_after = error.retry_after if isinstance(error, TransientError) else 0.0
        pause = retry_after + _jitter.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self._failures, 16)))
        time.sleep(min(remaining, pause))  # the last attempt is made at the timeout
        self._failures += 1


@dataclass(frozen=True)
class RangeResponse:
    """Response to a ranged read: its exclusive end, the object's ETag, and the body in pieces.

    `pieces` may raise a TransientError between two pieces; closing it closes the connection.
    """

    stop: int
    etag: str | None
    pieces: Generator[bytes, None, None]


Request = Callable[[int, int | None, str | None], RangeResponse]


def ranged_get(
    request: Request, url: str, start: int, stop: int | None, etag: str | None, policy: RetryPolicy
) -> bytes:
    """Return the bytes [start, stop) of one object version; `stop` None reads to the end.

    Received bytes are kept after a failure, and only the rest is requested again. `request(start, stop, etag)` must
    raise PreconditionFailed for any version other than `etag`.
    """
    body, position = io.BytesIO(), start
    budget = RetryBudget(policy, url)
    while stop is None or position < stop:
        try:
            response = request(position, stop, etag)
            stop, etag = response.stop, response.etag
            with closing(response.pieces) as pieces:
                for piece in pieces:
                    if position + len(piece) > stop:
                        raise TransientError(f"the response has more bytes than up to {stop}")
                    body.write(piece)
                    position += len(piece)
                    budget.add_progress(len(piece))
            if position != stop:
                raise TransientError(f"the body ended at byte {position} instead of {stop}")
        except Exception as error:
            budget.wait(error)
    return body.getvalue()
