"""Writing to the run's storage without waiting for it: the training thread makes no storage call between two steps.

A store may be away for minutes and the run goes on; a step that waited for it would be ended by the watchdog.
"""

from __future__ import annotations

import logging
import threading
import time

from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 10.0  # of one write of what the next write replaces anyway


class BackgroundWriter:
    """Writes objects from a thread of its own, which starts with the first. Of each URL only the newest data is kept.

    `write` never waits and never raises: a fault is logged, and the data is dropped.
    """

    def __init__(self, storage: Storage, retry_timeout_seconds: float | None = None, level: int = logging.WARNING):
        """`retry_timeout_seconds`: how long one write may take (default: the storage's); `level`: of logged faults."""
        if retry_timeout_seconds is not None:
            shorter = min(retry_timeout_seconds, storage.config.retry_timeout_seconds)
            storage = Storage(storage.config.model_copy(update={"retry_timeout_seconds": shorter}))
        self._storage, self._level = storage, level
        self._changed = threading.Condition()
        self._pending: dict[str, bytes] = {}
        self._is_writing = self._is_closed = False
        self._thread: threading.Thread | None = None

    def write(self, url: str, data: bytes) -> None:
        """Queue `data` for `url`, in place of what is still queued for it."""
        with self._changed:
            if self._is_closed:
                return
            self._pending[url] = data
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="background-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """End the thread once the queue is written. After `seconds` it is left to end with the process; False then."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            while self._pending or self._is_writing:
                left = deadline - time.monotonic()
                if left <= 0:
                    log.log(
                        self._level, "not written within %.0f s: %s", seconds, ", ".join(self._pending) or "the last"
                    )
                    self._pending.clear()
                    return False
                self._changed.wait(left)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    if self._is_closed:
                        return
                    self._changed.wait()
                url = next(iter(self._pending))
                data = self._pending.pop(url)
                self._is_writing = True
            try:
                self._storage.write(url, data)
            except Exception as error:  # whatever it is, the run goes on without this object
                log.log(self._level, "%s was not written: %s: %s", url, type(error).__name__, error)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
