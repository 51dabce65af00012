"""Daemon threads: one call in the background, a call with a time limit, and a periodic call."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

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


class PeriodicThread(threading.Thread):
    """Daemon thread: calls `task` every `seconds` until `stop`, a False or an exception.

    The first call is at once if `immediately`; with `at_end`, the last one follows the request to stop.
    """

    def __init__(
        self,
        task: Callable[[], object],
        seconds: float,
        name: str,
        immediately: bool = False,
        at_end: bool = False,
    ):
        super().__init__(name=name, daemon=True)
        self._task, self._seconds, self._immediately, self._at_end = task, seconds, immediately, at_end
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.0 if self._immediately else self._seconds):
            self._immediately = False
            if self._task() is False:
                return
        if self._at_end:
            self._task()

    def stop(self, timeout: float | None = None) -> bool:
        """Request the thread to end and wait for it, at most `timeout` seconds; return False if it never started."""
        self._stopping.set()
        if self.ident is None:
            return False
        self.join(timeout)
        return True
