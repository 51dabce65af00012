"""Background writes to the run's storage: the training thread makes no storage call between two steps.

A store may be unavailable for minutes while training continues; the watchdog would end a step that waited for it.
"""

import logging
import threading

from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 10.0  # of one write of a status that the next write replaces


class BackgroundWriter:
    """Writes objects in a thread; of each URL only the newest data is written.

    `write` never blocks and never raises: a failure is logged, and the data is dropped.
    """

    def __init__(self, storage: Storage, retry_timeout_seconds: float | None = None, level: int = logging.WARNING):
        """`retry_timeout_seconds`: how long one write may take (default: the storage's); `level`: of logged faults."""
        self._storage = storage if retry_timeout_seconds is None else storage.within(retry_timeout_seconds)
        self._level = level
        self._changed = threading.Condition()
        self._pending: dict[str, bytes] = {}
        self._is_writing = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="background-writer", daemon=True)

    def write(self, url: str, data: bytes) -> None:
        """Queue `data` for `url`, replacing data still queued for it."""
        with self._changed:
            if not self._is_closed:
                self._pending[url] = data
                if self._thread.ident is None:
                    self._thread.start()
                self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """Wait up to `seconds` for the queue to be written; return False, dropping the rest, if that is not enough."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_written = self._changed.wait_for(lambda: not (self._pending or self._is_writing), max(seconds, 0.0))
            if not is_written:
                urls = ", ".join(self._pending) or "the last"
                log.log(self._level, "not written within %.0f s: %s", seconds, urls)
                self._pending.clear()
        return is_written

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if not self._pending:
                    return
                url = next(iter(self._pending))
                data = self._pending.pop(url)
                self._is_writing = True
            try:
                self._storage.write(url, data)
            except Exception as error:  # no failure here is a reason to stop the run
                log.log(self._level, "%s was not written: %s: %s", url, type(error).__name__, error)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
