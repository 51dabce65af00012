"""Supervision of this rank's process: goodput, hang watchdog, node statistics and preemption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config.errors import Superseded
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.callbacks import Callback
from pipeline.training.collectives import Collectives
from pipeline.training.goodput import GoodputTracker, Phase, Seconds
from pipeline.training.node_monitor import NodeMonitor
from pipeline.training.watchdog import Limits, Watchdog

if TYPE_CHECKING:
    from pipeline.training.context import StageResult

# torchrun forwards SIGTERM to its ranks; Slurm sends SIGUSR1 ahead of the time limit with --signal=USR1@300.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RankSupervisor(Callback):
    """Tracks the phase this rank is in, for goodput and the watchdog; one per process, attached to every stage."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        collectives: Collectives,
        poll: Callable[[], bool] | None = None,
        elapsed: float = 0.0,
    ):
        """`poll` asks the scheduler or the cloud whether this machine is being preempted.

        `elapsed`: seconds since the process began training, before the process group existed.
        """
        guards = config.guards
        self._start_seconds = guards.start_seconds
        self._poll, self._is_preempted = poll, False
        self.goodput = GoodputTracker(storage, config.folder, is_writer=collectives.rank == 0, elapsed=elapsed)
        self.nodes = NodeMonitor(collectives)
        used = {name for stage in config.stages for name in stage.sources}
        is_remote = any(not is_local(config.sources[name].shards) for name in used)
        limits: Limits = {
            "startup": guards.start_seconds,
            "training": guards.hang_seconds,
            # Data may be late for as long as its store may be unavailable.
            "data_wait": guards.hang_seconds + (config.storage.retry_timeout_seconds if is_remote else 0.0),
            "checkpoint": guards.save_seconds,
            "evaluation": guards.evaluate_seconds,
        }
        self._watchdog = Watchdog(collectives, storage, config.folder, limits)
        self._is_first_stage = True
        self._first_step = 0  # global step of the stage's first
        self._has_begun = self._has_stepped = False  # a step of this stage, in this process
        self._is_resumed = False  # the goodput account has been set to the state the run resumed from

    @contextmanager
    def running(self) -> Iterator[None]:
        """Monitor the rank and its node during the block, and count signals as preemption notices.

        Python allows signal handlers only in a process's main thread; in any other thread (a Ray Train worker) `poll`
        is the only source of notices.
        """

        def receive(number: int, frame: FrameType | None) -> None:
            self._is_preempted = True

        is_main = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, receive) for number in SIGNALS} if is_main else {}
        self.goodput.start()
        self._watchdog.start()
        self.nodes.start()
        is_complete = is_superseded = False
        try:
            yield
            is_complete = True
        except Superseded:
            is_superseded = True
            raise
        finally:
            self.nodes.close()
            self._watchdog.close()
            self.goodput.close(ended=is_complete, write=not is_superseded)
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def preempted(self) -> bool:
        """Return whether this process is being preempted. Once True it stays True."""
        if not self._is_preempted and self._poll is not None:
            self._is_preempted = self._poll()
        return self._is_preempted

    def begin_stage(self, step: int, is_rollback: bool) -> None:
        """Enter the startup of the stage that begins at global step `step`, or its repetition after a rollback."""
        self._first_step = step
        if not self._is_first_stage:  # the first stage's startup continues that of the process
            self.goodput.enter("restart" if is_rollback else "startup")
            self._is_resumed = not is_rollback
        self._is_first_stage = self._has_begun = self._has_stepped = False
        self._watchdog.enter("startup", step)

    def resume_from(self, seconds: Seconds | None) -> None:
        """Resume the goodput account from the checkpoint or hand-over that the stage starts from."""
        if not self._is_resumed:
            self.goodput.resume_from(seconds)
        self._is_resumed = True

    def enter(self, phase: Phase, step: int) -> None:
        """Enter a phase at global step `step`. Until the stage's first step is done, the startup limit applies."""
        self._watchdog.enter(phase, step, None if self._has_stepped else self._start_seconds)
        if self._has_stepped or phase == "training":
            self.goodput.enter(phase)

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Enter a phase for the duration of the block."""
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter("training", step)

    def before_batch(self, step: int) -> None:
        self._has_stepped = self._has_begun
        self._has_begun = True
        self.enter("data_wait", self._first_step + step)

    def before_step(self, step: int, batch: Batch) -> None:
        self.enter("training", self._first_step + step)

    def on_stage_end(self, result: StageResult) -> None:
        self._has_stepped = True
