"""Goodput: where a run's wall time goes, over all its restarts.

Every second belongs to exactly one phase, and the phases sum to the wall time. Rank 0 keeps the totals: checkpoints and
hand-overs store them, and `<run>/time.json` holds them as of the last heartbeat. After a restart, the training time
between the restored checkpoint and the last heartbeat is lost work; the time until the first step is the restart's.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from pipeline.config.background import PeriodicThread, within
from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

Phase = Literal["startup", "training", "data_wait", "checkpoint", "evaluation", "restart", "lost_work"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PROGRESS: tuple[Phase, ...] = ("training", "data_wait")  # lost if no checkpoint holds it
FILE = "time.json"
WRITE_SECONDS = 10.0  # limit for retrying one heartbeat, which the next one replaces
CLOSE_SECONDS = 10.0  # limit for the last write, whatever the storage's retry timeout
HEARTBEAT_SECONDS = 5.0  # bounds the time that is attributed to the restart instead of to lost work
Seconds = dict[str, float]  # by phase


class GoodputTracker(PeriodicThread):
    """Seconds by phase since the run first started, saved to the run's folder by this thread. Thread-safe."""

    def __init__(self, storage: Storage, folder: str, is_writer: bool, elapsed: float = 0.0) -> None:
        """Continue from the folder's last heartbeat if `is_writer` (rank 0); the process began `elapsed` s ago."""
        super().__init__(self._write, HEARTBEAT_SECONDS, "mome-goodput", immediately=True)
        self._storage, self._url = storage.within(WRITE_SECONDS), join(folder, FILE)
        self._lock = threading.Lock()
        self._account: Seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase = "startup"
        self._entered = time.monotonic() - elapsed
        self.restarts = 0
        if is_writer and (previous := read_record(storage, folder)) is not None:
            self._account |= previous["seconds"]
            self.restarts = previous["restarts"]
            if not previous["ended"]:  # a finished run that is extended was not down in between
                self.restarts += 1
                self._account["restart"] += max(time.time() - elapsed - previous["at"], 0.0)
                self._phase = "restart"

    def resume_from(self, seconds: Seconds) -> None:
        """Resume from a checkpoint's time account. Training time recorded after it is reclassified as lost work."""
        saved = dict.fromkeys(PHASES, 0.0) | seconds
        self.seconds()  # attributes the time up to now
        with self._lock:
            for phase in PHASES:
                missing = saved[phase] - self._account[phase]  # positive if the last heartbeat is older than the state
                if (missing > 0 and phase != "restart") or phase in PROGRESS:
                    self._account[phase] += missing
                    self._account["restart" if missing > 0 else "lost_work"] -= missing

    def enter(self, phase: Phase) -> None:
        """Attribute the time from now on to `phase`."""
        self.seconds()  # attributes the time up to now
        self._phase = phase

    def seconds(self) -> Seconds:
        with self._lock:
            now = time.monotonic()
            self._account[self._phase] += now - self._entered
            self._entered = now
            return dict(self._account)

    def close(self, ended: bool, write: bool = True) -> None:
        """Stop the heartbeat; `write` the account unless another process owns it now; `ended`: all steps are done."""

        def finish() -> None:
            if self.stop() and write:
                self._write(ended)

        try:
            within(CLOSE_SECONDS, finish, "mome-goodput-end")
        except TimeoutError:
            log.warning("goodput: %s was not written within %.0f s", self._url, CLOSE_SECONDS)

    def _write(self, ended: bool = False) -> None:
        record = {"at": time.time(), "seconds": self.seconds(), "restarts": self.restarts, "ended": ended}
        try:
            self._storage.write(self._url, json.dumps(record).encode())
        except Exception as error:  # no failure here is a reason to stop the run
            log.warning("goodput: %s was not written: %s: %s", self._url, type(error).__name__, error)


def read_record(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Return a run's last heartbeat; None before the first one, or if it cannot be read."""
    url = join(folder, FILE)
    try:
        return json.loads(storage.read(url)) if storage.exists(url) else None
    except (StorageError, ValueError) as error:
        log.warning("goodput: %s cannot be read; the time account starts from zero: %s", url, error)
        return None


@contextmanager
def add_time(storage: Storage, folder: str, phase: Phase) -> Iterator[None]:
    """Add the block's duration to the account of a run that no rank is training, such as one being evaluated."""
    started = time.monotonic()
    try:
        yield
    finally:
        if (record := read_record(storage, folder)) is not None:
            record["seconds"][phase] += time.monotonic() - started
            try:
                storage.write(join(folder, FILE), json.dumps(record | {"at": time.time()}).encode())
            except StorageError as error:  # a less exact account is no reason to fail the evaluation
                log.warning("goodput: the evaluation's time was not recorded: %s", error)
