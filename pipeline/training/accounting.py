"""Where a run's time goes, over all its restarts: each second belongs to one kind, and they sum to the wall time.

The account is kept on rank 0. Every checkpoint and hand-over holds it as it then stood; `<run>/time.json` holds it as
it stood at the last sign of life. After a restart, what was achieved between the two is lost work, and the time since
the last sign of life, until the first step, belongs to the restart.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage, join
from pipeline.training.background_writer import DEADLINE_SECONDS, BackgroundWriter

log = logging.getLogger(__name__)

Kind = Literal["startup", "training", "data_wait", "checkpoint", "evaluation", "restart", "lost_work"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROGRESS: tuple[Kind, ...] = ("training", "data_wait")  # what is lost where no checkpoint holds it
FILE = "time.json"
CLOSE_SECONDS = 10.0  # for the last account to be written, whatever the store's own patience is
BEAT_SECONDS = 5.0  # between two signs of life: how finely lost work is told from the restart's time

Seconds = dict[str, float]  # by kind


class Account:
    """Seconds by kind, from the run's first start to now. Safe to read from another thread."""

    def __init__(self, before: dict[str, Any] | None = None, now: float | None = None, elapsed: float = 0.0):
        """`before`: the last sign of life of the process before; `now`: seconds since the epoch, when this one began,
        `elapsed` seconds ago."""
        now = time.time() - elapsed if now is None else now
        self._lock = threading.Lock()
        self._seconds: Seconds = dict.fromkeys(KINDS, 0.0)
        self.restarts = 0
        self._kind: Kind = "startup"
        if before is not None:
            self._seconds |= before["seconds"]
            self.restarts = before["restarts"]
            if not before["ended"]:  # a run that ended and is given more to do was not down in between
                self.restarts += 1
                self._seconds["restart"] += max(now - before["at"], 0.0)
                self._kind = "restart"
        self._marked = time.monotonic() - elapsed

    def goes_on_from(self, seconds: Seconds | None) -> None:
        """`seconds`: the account in the state that the run goes on from; what was achieved since then is lost work."""
        kept = dict.fromkeys(KINDS, 0.0) | (seconds or {})
        with self._lock:
            self._settle()
            for kind in KINDS:
                newer = kept[kind] - self._seconds[kind]  # above 0 where the last sign of life is older than that state
                if newer > 0 and kind != "restart":
                    self._seconds[kind] += newer
                    self._seconds["restart"] -= newer
                elif kind in PROGRESS:
                    self._seconds[kind] += newer
                    self._seconds["lost_work"] -= newer

    def enter(self, kind: Kind) -> None:
        """From now on, time is of this kind. The start of a process goes on until its first step."""
        with self._lock:
            self._settle()
            self._kind = kind

    def seconds(self) -> Seconds:
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._kind] += now - self._marked
        self._marked = now


def metrics(seconds: Seconds) -> dict[str, float]:
    """As the tracker has them. Goodput is the share of all time that went into steps that stand."""
    total = sum(seconds.values())
    return {f"time/{kind}_s": value for kind, value in seconds.items()} | {
        "perf/goodput": seconds["training"] / total if total else 0.0
    }


class Ledger:
    """The account of a run in its folder. On other ranks than 0 nothing is read or written."""

    def __init__(self, storage: Storage, folder: str, writes: bool, elapsed: float = 0.0):
        self._url, self._writes = join(folder, FILE), writes
        self._writer = BackgroundWriter(storage, DEADLINE_SECONDS)
        self.account = Account(read(storage, folder) if writes else None, elapsed=elapsed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mome-ledger", daemon=True)

    def start(self) -> None:
        if self._writes:
            self._thread.start()

    def close(self, ended: bool, last_word: bool = True) -> None:
        """Write the account once more, unless `last_word` is False: another process keeps it now.

        `ended`: the run has done all its steps.
        """
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            if last_word:
                self._write(ended)
            self._writer.close(CLOSE_SECONDS)

    def _beat(self) -> None:
        self._write(False)
        while not self._ended.wait(BEAT_SECONDS):
            self._write(False)

    def _write(self, ended: bool) -> None:
        seconds, at = self.account.seconds(), time.time()
        told = {"at": at, "seconds": seconds, "restarts": self.account.restarts, "ended": ended}
        self._writer.write(self._url, json.dumps(told).encode())


def read(storage: Storage, folder: str) -> dict[str, Any] | None:
    """The last sign of life of a run; None before its first, or where it cannot be read."""
    url = join(folder, FILE)
    try:
        return json.loads(storage.read(url)) if storage.exists(url) else None
    except (StorageError, ValueError) as error:
        log.warning("time account: begins anew: %s", error)
        return None


@contextmanager
def spent(storage: Storage, folder: str, kind: Kind) -> Iterator[None]:
    """Adds what the block takes to the account of a run that no rank works on: an evaluation after its last stage."""
    started = time.monotonic()
    try:
        yield
    finally:
        told = read(storage, folder)
        if told is not None:
            told["seconds"][kind] += time.monotonic() - started
            try:
                storage.write(join(folder, FILE), json.dumps(told | {"at": time.time()}).encode())
            except StorageError as error:  # the account is less exact then; the run goes on
                log.warning("time account: %s", error)
