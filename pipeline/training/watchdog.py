"""Hang watchdog: detects a hung rank, records all stacks, and ends the processes so that the launcher restarts them.

Collectives block forever, or until the process group's timeout, if one rank never enters them. A thread of each rank
therefore measures how long the rank has been in its current phase. When a rank exceeds its limit, every rank writes the
stacks of all its threads to its log and to `<run>/stacks`, names the rank that is missing, and exits with status 75. A
rank that cannot run this code, because it is stopped or a thread holds the interpreter lock, is named by the others; in
the latter case `faulthandler`, which does not need the lock, writes the stacks to the log and ends the process.

A rank that waits for data or writes a checkpoint may have good reason to take longer, such as an unavailable store:
while it sends heartbeats and is within its own limit, the others wait for it.
"""

import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from pipeline.config.background import PeriodicThread, within
from pipeline.config.errors import MomeError, Preempted
from pipeline.data import quarantine
from pipeline.data.storage import Storage, join
from pipeline.training.collectives import Collectives, KeyValueStore
from pipeline.training.goodput import Phase

log = logging.getLogger(__name__)

EXIT_STATUS = Preempted.exit_status  # as after a preemption, the same command resumes the run
HEARTBEATS, HANG, STACKS_WRITTEN = "heartbeats", "hung", "stacks_written"  # topics of the key-value store
PEER_SECONDS = 10.0  # for the other ranks to write their stacks before this rank, which may host the store, exits
WRITE_SECONDS = 30.0  # for writing stacks to the run's folder, whose store may be the cause of the hang
MISSED_TICKS = 4  # heartbeats that a rank may miss before it counts as silent
REQUEST_SECONDS = 5.0  # timeout of a request; a stopped host never responds
RETRY_SECONDS = 60.0  # until a store that did not respond is tried again
T = TypeVar("T")
PHASE_ORDER: tuple[Phase, ...] = ("startup", "data_wait", "training", "evaluation", "checkpoint")  # within a step
Limits = dict[Phase, float]  # seconds; phases without an entry have no limit


@dataclass(frozen=True)
class Heartbeat:
    """A rank's current phase and collective."""

    phase: Phase
    step: int  # global
    seconds: float  # in this phase
    limit: float
    calls: int  # collectives entered so far
    inside: str  # collective the rank is waiting in; empty if none
    beat: int = 0  # incremented while the rank's watchdog runs


class Watchdog(PeriodicThread):
    """Ends the process when a rank exceeds the limit of its phase; `enter` reports the phase of this rank."""

    def __init__(
        self,
        collectives: Collectives,
        storage: Storage,
        folder: str,
        limits: Limits,
        end: Callable[[int], None] = os._exit,
    ):
        self._collectives, self._storage, self._folder = collectives, storage, join(folder, "stacks")
        self._limits, self._end = limits, end
        self._tick = min(max(min(limits.values()) / 20, 0.5), 5.0)
        super().__init__(self._check, self._tick, "mome-watchdog")
        self._main = threading.get_ident()
        self._beat = 0
        self._last_seen: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was first seen
        self._store: KeyValueStore | None = None
        self._retry_store_at = 0.0
        self.enter("startup", 0)

    def enter(self, phase: Phase, step: int, limit: float | None = None) -> None:
        """Record that this rank enters a phase; `limit` overrides the phase's usual one (seconds)."""
        limit = self._limits.get(phase, float("inf")) if limit is None else limit
        self._entered = (phase, step, time.monotonic(), limit)

    def close(self) -> None:
        """Stop watching."""
        self.stop()
        faulthandler.cancel_dump_traceback_later()

    def _check(self) -> bool:
        """Publish this rank's heartbeat and end the process if a rank hangs; return False after that."""
        phase, step, entered, limit = self._entered
        self._beat += 1
        calls, inside = self._collectives.calls, self._collectives.inside
        own = Heartbeat(phase, step, time.monotonic() - entered, limit, calls, inside, self._beat)
        if limit < float("inf") and sys.__stderr__ is not None:  # re-armed by every tick
            patience = limit + 10 * self._tick + 4 * REQUEST_SECONDS
            faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        self._request(lambda store: store.write(HEARTBEATS, json.dumps(asdict(own))))
        hang = self._request(lambda store: store.announcement(HANG))
        if not hang and own.seconds > limit:
            position = step, PHASE_ORDER.index(phase)
            live = self._live_heartbeats()
            waits_for_slower_rank = any(  # a live one behind this one and within its own limit
                (other.step, PHASE_ORDER.index(other.phase)) < position and other.seconds <= other.limit
                for rank, other in live.items()
                if rank != self._collectives.rank
            )
            if not waits_for_slower_rank:
                message = (
                    f"rank {self._collectives.rank} has been in '{phase}' of step {step} for {own.seconds:.0f} s "
                    f"(limit: {limit:.0f} s). {self._culprits(live)}"
                )
                hang = self._request(lambda store: store.announcement(HANG, message)) or message  # the first counts
        if hang:
            self._finish(hang)
        return not hang

    def _request(self, request: Callable[[KeyValueStore], T]) -> T | None:
        """Return the store's response; None if its host is gone, stopped or unreachable."""

        def call() -> T:
            self._store = self._store or KeyValueStore(self._collectives)
            return request(self._store)

        if time.monotonic() < self._retry_store_at:
            return None
        try:
            return within(REQUEST_SECONDS, call, "mome-store")
        except (RuntimeError, OSError) as error:
            log.debug("the process group's key-value store does not respond: %s", error)
            self._store, self._retry_store_at = None, time.monotonic() + RETRY_SECONDS
            return None

    def _live_heartbeats(self) -> dict[int, Heartbeat]:
        """Return the heartbeats of the ranks whose watchdogs are running."""
        messages = self._request(lambda store: store.read(HEARTBEATS)) or {}
        heartbeats = {rank: Heartbeat(**json.loads(text)) for rank, text in messages.items()}
        now = time.monotonic()
        for rank, heartbeat in heartbeats.items():
            if self._last_seen.get(rank, (0, 0.0))[0] != heartbeat.beat:
                self._last_seen[rank] = (heartbeat.beat, now)
        oldest = now - MISSED_TICKS * self._tick
        return {rank: heartbeat for rank, heartbeat in heartbeats.items() if self._last_seen[rank][1] > oldest}

    def _culprits(self, live: dict[int, Heartbeat]) -> str:
        """Describe the ranks the others wait for: the silent ones, else those that entered the fewest collectives."""
        if not live:
            return "The other ranks cannot be queried: the store's host (rank 0 or the launcher) is stopped or gone"
        lines = [
            f"rank {rank}: step {beat.step}, {beat.phase} for {beat.seconds:.0f} s, "
            + (f"waits in '{beat.inside}' (call {beat.calls})" if beat.inside else f"after {beat.calls} calls")
            for rank, beat in sorted(live.items())
        ]
        silent = [rank for rank in range(self._collectives.world_size) if rank not in live]
        fewest = min(beat.calls for beat in live.values())
        behind = sorted(rank for rank, beat in live.items() if beat.calls == fewest)
        culprits = silent or behind
        ranks = ", ".join(map(str, culprits[:16])) + (f", … ({len(culprits)})" if len(culprits) > 16 else "")
        if silent:
            lines.append(f"no heartbeat from rank(s) {ranks}: stopped, ended, or disconnected")
        elif len(behind) < len(live):
            lines.append(f"not reached by rank(s) {ranks}: the collective the others wait in")
        return "; ".join(lines)

    def _finish(self, message: str) -> None:
        """Write this rank's stacks, give the other ranks time to write theirs, and end the process."""
        if sys.__stderr__ is not None:
            patience = WRITE_SECONDS + 2 * PEER_SECONDS + 4 * REQUEST_SECONDS
            faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        log.error("hung: %s", message)
        samples = quarantine.samples_in_progress()  # a decoder that hangs on a sample hangs again after every restart
        decoding = f"samples being decoded: {', '.join(samples)}" if samples else ""
        if decoding:
            log.error("%s", decoding)
        phase, step, entered, _ = self._entered
        frame = sys._current_frames().get(self._main)
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        line = "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        report = (
            f"rank {self._collectives.rank} of {self._collectives.world_size}\n{message}\n\n"
            f"in '{phase}' of step {step} for {time.monotonic() - entered:.0f} s, at {line}\n{decoding}\n\n{stacks}"
        )
        sys.stderr.write(report)
        sys.stderr.flush()
        url = join(self._folder, f"step-{step:08d}.rank-{self._collectives.rank:05d}.txt")
        try:
            within(WRITE_SECONDS, lambda: self._storage.write(url, report.encode()), "mome-stacks")
        except (MomeError, TimeoutError) as error:
            log.warning("the stacks could not be saved; they are in the log only: %s", error)
        deadline = time.monotonic() + PEER_SECONDS  # until every live rank has written its stacks
        self._request(lambda store: store.write(STACKS_WRITTEN, "yes"))
        while self._store is not None and time.monotonic() < deadline:
            written = self._request(lambda store: store.read(STACKS_WRITTEN)) or {}
            if set(self._live_heartbeats()) <= set(written):
                break
            time.sleep(self._tick)
        log.error("rank %d exits with status %d, to be restarted", self._collectives.rank, EXIT_STATUS)
        logging.shutdown()
        self._end(EXIT_STATUS)
