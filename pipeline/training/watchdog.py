"""A hung rank: noticed, shown, and ended, so that the launcher starts the ranks again.

Collectives wait for ever, or as long as the process group's timeout, for a rank that does not come. A thread of each
rank minds how long the rank has been in what it does. When that is too long on any rank, every rank writes the stacks
of all its threads to its log and to `<run>/stacks`, says who has not come, and ends with status 75. A rank that cannot
even do that, because it was stopped or holds the interpreter's lock, is named by the others; in the second case
`faulthandler`'s own thread, which needs no lock, writes the stacks to the log and ends the process.

A rank that waits for data or writes a checkpoint may have good reason to take longer, such as a store that is away:
while it shows life and is within its own allowance, others wait for it.
"""

from __future__ import annotations

import faulthandler
import functools
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

from pipeline.config.background import within
from pipeline.config.errors import MomeError, Preempted
from pipeline.data import in_progress
from pipeline.data.storage import Storage, join
from pipeline.training.accounting import Kind
from pipeline.training.collectives import Board, Collectives

log = logging.getLogger(__name__)

EXIT_STATUS = Preempted.exit_status  # like a preemption: the same command goes on
SIGNS, CALLED, SHOWN = "signs", "hung", "shown"  # topics of the board
SHOW_SECONDS = 10.0  # for the others to write their stacks, before this rank ends and perhaps takes the board with it
WRITE_SECONDS = 30.0  # for the stacks to reach the run's folder, whose store may be why the rank hangs
SILENT_TICKS = 4  # signs of life that may be missed
ASK_SECONDS = 5.0  # for the board's answer; a stopped holder never gives one
AGAIN_SECONDS = 60.0  # until a board that did not answer is asked again
T = TypeVar("T")
PLACES: tuple[Kind, ...] = ("startup", "data_wait", "training", "evaluation", "checkpoint")  # in the order of a step
Allowances = dict[Kind, float]  # seconds; kinds that are not named have no limit


@dataclass(frozen=True)
class Sign:
    """Of life: what a rank is in, and for how long."""

    kind: Kind
    step: int  # global
    seconds: float  # since it entered it
    allowed: float
    calls: int  # collectives of this module's that it has called
    inside: str  # the one it waits in; empty when none
    beat: int = 0  # counts up while the rank's watchdog runs


class Watchdog:
    """`enter` tells it what this rank does now; between `start` and `close` it minds that this goes on."""

    def __init__(
        self,
        collectives: Collectives,
        storage: Storage,
        folder: str,
        allowed: Allowances,
        end: Callable[[int], None] = os._exit,
    ):
        self._collectives, self._storage, self._folder = collectives, storage, join(folder, "stacks")
        self._allowed, self._end = allowed, end
        self._tick = min(max(min(allowed.values()) / 20, 0.5), 5.0)
        self._main = threading.get_ident()
        self._entered: tuple[Kind, int, float, float] = ("startup", 0, time.monotonic(), self._limit("startup"))
        self._beat = 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was seen
        self._board: Board | None = None
        self._deaf_until = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._mind, name="mome-watchdog", daemon=True)

    def enter(self, kind: Kind, step: int, seconds: float | None = None) -> None:
        """The rank begins something else; `seconds` is its allowance where it is not the usual one."""
        self._entered = (kind, step, time.monotonic(), self._limit(kind) if seconds is None else seconds)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _limit(self, kind: Kind) -> float:
        return self._allowed.get(kind, float("inf"))

    # ---- minding

    def _mind(self) -> None:
        while not self._closed.wait(self._tick):
            sign = self._sign()
            if sign.allowed < float("inf"):  # armed anew by each tick: it fires only when this thread cannot run
                _end_later(sign.allowed + 10 * self._tick + 4 * ASK_SECONDS)
            line = json.dumps(asdict(sign))
            self._ask(functools.partial(Board.write, topic=SIGNS, text=line))
            called = self._ask(lambda board: board.called(CALLED))
            if called is not None:
                self._finish(called)
            elif sign.seconds > sign.allowed and not self._waits_for_busy(sign):
                self._finish(self._call(sign))

    def _ask(self, request: Callable[[Board], T]) -> T | None:
        """What the ranks' board answers; None when it does not, because its holder is gone, stopped or cut off."""

        def asked() -> T:
            self._board = self._board or self._collectives.board()
            return request(self._board)

        if time.monotonic() < self._deaf_until:
            return None
        try:
            return within(ASK_SECONDS, asked, "mome-board")
        except (RuntimeError, OSError) as error:
            log.debug("the ranks' board does not answer: %s", error)
            self._board, self._deaf_until = None, time.monotonic() + AGAIN_SECONDS
            return None

    def _sign(self) -> Sign:
        kind, step, entered, allowed = self._entered
        self._beat += 1
        waited = time.monotonic() - entered
        return Sign(kind, step, waited, allowed, self._collectives.calls, self._collectives.inside, self._beat)

    def _signs(self) -> dict[int, Sign]:
        """Of the ranks whose watchdogs run, as far as they can be asked."""
        told = self._ask(lambda board: board.read(SIGNS)) or {}
        signs = {rank: Sign(**json.loads(text)) for rank, text in told.items()}
        now = time.monotonic()
        for rank, sign in signs.items():
            if self._heard.get(rank, (0, 0.0))[0] != sign.beat:
                self._heard[rank] = (sign.beat, now)
        return {rank: sign for rank, sign in signs.items() if now - self._heard[rank][1] < SILENT_TICKS * self._tick}

    def _waits_for_busy(self, own: Sign) -> bool:
        """Whether some rank has come less far, with an allowance that is not used up, and shows life."""
        return any(
            (sign.step, PLACES.index(sign.kind)) < (own.step, PLACES.index(own.kind)) and sign.seconds <= sign.allowed
            for rank, sign in self._signs().items()
            if rank != self._collectives.rank
        )

    # ---- the end

    def _call(self, own: Sign) -> str:
        """Tell all ranks that this one hangs, and who it waits for."""
        told = (
            f"rank {self._collectives.rank} has been in '{own.kind}' of step {own.step} for {own.seconds:.0f} s "
            f"({own.allowed:.0f} s are allowed). {self._who()}"
        )
        self._ask(lambda board: board.call(CALLED, told))
        return self._ask(lambda board: board.called(CALLED)) or told

    def _who(self) -> str:
        """Which ranks the others wait for: the silent ones, else those that called the fewest collectives."""
        signs = self._signs()
        if not signs:
            return "The other ranks cannot be asked: who keeps their board, rank 0 or the launcher, is stopped or gone"
        lines = [
            f"rank {rank}: step {sign.step}, {sign.kind} for {sign.seconds:.0f} s, "
            + (f"waits in '{sign.inside}' (call {sign.calls})" if sign.inside else f"after {sign.calls} calls")
            for rank, sign in sorted(signs.items())
        ]
        silent = [rank for rank in range(self._collectives.world_size) if rank not in signs]
        if silent:
            lines.append(f"no sign of life of rank(s) {_listed(silent)}: stopped, ended, or cut off")
        fewest = min((sign.calls for sign in signs.values()), default=0)
        behind = [rank for rank, sign in signs.items() if sign.calls == fewest]
        if not silent and len(behind) < len(signs):
            lines.append(f"not reached by rank(s) {_listed(sorted(behind))}: the collective the others wait in")
        return "; ".join(lines)

    def _finish(self, told: str) -> None:
        """Write this rank's stacks, give the others time to write theirs, and end the process."""
        _end_later(WRITE_SECONDS + 2 * SHOW_SECONDS + 4 * ASK_SECONDS)
        log.error("hung: %s", told)
        stacks, decoded = _stacks(), _samples()
        if decoded:
            log.error("%s", decoded)
        header = f"rank {self._collectives.rank} of {self._collectives.world_size}\n{told}\n\n{self._where()}\n"
        header += f"{decoded}\n\n"
        sys.stderr.write(header + stacks)
        sys.stderr.flush()
        self._keep((header + stacks).encode())
        self._wait_for_others()
        log.error("rank %d ends with status %d: it is to be started again", self._collectives.rank, EXIT_STATUS)
        logging.shutdown()
        self._end(EXIT_STATUS)
        self._closed.set()

    def _where(self) -> str:
        kind, step, entered, _ = self._entered
        frame = sys._current_frames().get(self._main)
        at = "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        return f"in '{kind}' of step {step} for {time.monotonic() - entered:.0f} s, at {at}"

    def _keep(self, data: bytes) -> None:
        url = join(self._folder, f"step-{self._entered[1]:08d}.rank-{self._collectives.rank:05d}.txt")

        def write() -> None:
            try:
                self._storage.write(url, data)
            except MomeError as error:
                log.warning("the stacks are in the log only: %s", error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(WRITE_SECONDS)

    def _wait_for_others(self) -> None:
        """Until every rank that shows life has written its stacks."""
        until = time.monotonic() + SHOW_SECONDS
        self._ask(lambda board: board.write(SHOWN, "yes"))
        while self._board is not None and time.monotonic() < until:
            shown = self._ask(lambda board: board.read(SHOWN)) or {}
            if set(self._signs()) <= set(shown):
                return
            time.sleep(self._tick)


def _end_later(seconds: float) -> None:
    """Unless told otherwise before, `faulthandler` then writes all stacks to the log and ends the process."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def _samples() -> str:
    """What this rank's loaders are decoding: one that hangs there hangs again after every restart."""
    names = in_progress.samples()
    return f"samples being decoded: {', '.join(names)}" if names else ""


def _stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown}, … ({len(ranks)})"
