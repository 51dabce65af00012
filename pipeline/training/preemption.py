"""Preemption: the notice that this machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

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
