"""Supervision of this rank's process: goodput, hang watchdog, node statistics and preemption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

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


class PreemptionSignal:
    """Preemption notice from a signal or from `poll`, a function that asks the scheduler or the cloud.

    Signals are intercepted while the context manager is entered. Python allows handlers only in a process's main
    thread; in any other thread (a Ray Train worker) `poll` is the only source.
    """

    def __init__(self, poll: Callable[[], bool] | None = None):
        self._poll = poll
        self._received = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether this process is being preempted. Once True it stays True."""
        if not self._received and self._poll is not None:
            self._received = self._poll()
        return self._received

    def __enter__(self) -> PreemptionSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


class RankSupervisor:
    """Tracks the phase this rank is in, for goodput and the watchdog; one per process, over all stages.

    While the context manager is entered, signals count as preemption notices, and the rank and its node are monitored.
    """

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        collectives: Collectives,
        preempted: Callable[[], bool] | None = None,
        elapsed: float = 0.0,
    ):
        """`elapsed`: seconds since the process began training, before the process group existed."""
        self._start_seconds = config.guards.start_seconds
        self.preempted = PreemptionSignal(preempted)
        self.goodput = GoodputTracker(storage, config.folder, is_writer=collectives.rank == 0, elapsed=elapsed)
        self.nodes = NodeMonitor(collectives)
        self._watchdog = Watchdog(collectives, storage, config.folder, _limits(config))
        self._is_first_stage = True
        self._has_stepped = False  # in this stage and process
        self._is_resumed = False  # the goodput account has been set to the state the run resumed from

    def begin_stage(self, step: int, is_rollback: bool) -> None:
        """Enter the startup of a stage at global step `step`, or of its repetition after a rollback."""
        if not self._is_first_stage:  # the first stage's startup continues that of the process
            self.goodput.enter("restart" if is_rollback else "startup")
            self._is_resumed = not is_rollback
        self._is_first_stage, self._has_stepped = False, False
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

    def step_done(self) -> None:
        """Apply the usual limits from now on."""
        self._has_stepped = True

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Enter a phase for the duration of the block."""
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter("training", step)

    def __enter__(self) -> RankSupervisor:
        self.preempted.__enter__()
        self.goodput.start()
        self._watchdog.start()
        self.nodes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nodes.close()
        self._watchdog.close()
        self.goodput.close(ended=error is None, write=not isinstance(error, Superseded))
        self.preempted.__exit__(kind, error, trace)


class SupervisorCallback(Callback):
    """Reports the phases of a stage's steps to the supervisor. `first_step` is the stage's first global step."""

    def __init__(self, supervisor: RankSupervisor, first_step: int):
        self._supervisor, self._first_step = supervisor, first_step
        self._num_begun = 0

    def before_batch(self, step: int) -> None:
        if self._num_begun:
            self._supervisor.step_done()
        self._num_begun += 1
        self._supervisor.enter("data_wait", self._first_step + step)

    def before_step(self, step: int, batch: Batch) -> None:
        self._supervisor.enter("training", self._first_step + step)

    def on_stage_end(self, result: StageResult) -> None:
        self._supervisor.step_done()


def _limits(config: RunConfig) -> Limits:
    """Return the seconds allowed for each phase; waiting for data may take as long as its store may be unavailable."""
    guards = config.guards
    used = {name for stage in config.stages for name in stage.sources}
    outage = (
        0.0 if all(is_local(config.sources[name].shards) for name in used) else config.storage.retry_timeout_seconds
    )
    return {
        "startup": guards.start_seconds,
        "training": guards.hang_seconds,
        "data_wait": guards.hang_seconds + outage,
        "checkpoint": guards.save_seconds,
        "evaluation": guards.evaluate_seconds,
    }
