"""Notice that this machine is about to be taken away: a signal of the launcher, or what a caller asks the cloud."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# torchrun passes SIGTERM on to its ranks, and Slurm sends SIGUSR1 ahead of the end if asked to (--signal=USR1@300).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """Whether this process was told to go. Within `with`, signals give notice in place of ending it.

    Handlers can only be set in a process's main thread; elsewhere (a worker of Ray Train) `asked` alone is heard.
    """

    def __init__(self, asked: Callable[[], bool] | None = None):
        self._asked = asked
        self._given = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Once given, a notice stands."""
        if not self._given and self._asked is not None:
            self._given = self._asked()
        return self._given

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._given = True
