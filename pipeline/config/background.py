"""Daemon threads: one call in the background, a call with a time limit, and a periodic call."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Self, TypeVar

T = TypeVar("T")


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Start `call` in a daemon thread called `name`; return the future of its result or exception."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T], name: str) -> T:
    """Return or raise what `call` does, or raise TimeoutError after `seconds`; its thread then keeps running."""
    future = in_background(call, name)
    if not wait([future], seconds).done:
        raise TimeoutError(f"no complete response within {seconds:.0f} s")
    return future.result()


class PeriodicThread:
    """Daemon thread: calls `task` every `seconds`, at once if `immediately`, until `stop`, a False or an exception."""

    def __init__(self, task: Callable[[], object], seconds: float, name: str, immediately: bool = False):
        self._task, self._seconds, self._immediately = task, seconds, immediately
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self, timeout: float | None = None) -> bool:
        """Request the thread to end and wait for it, at most `timeout` seconds; return False if it never started."""
        self._stop.set()
        if self._thread.ident is None:
            return False
        self._thread.join(timeout)
        return True

    def _run(self) -> None:
        while not self._stop.wait(0.0 if self._immediately else self._seconds):
            self._immediately = False
            if self._task() is False:
                return
