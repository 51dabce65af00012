"""Calls in a thread of their own, which does not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Start `call` in a daemon thread of this name; return the future of its result or its error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T], name: str) -> T:
    """Return the result of `call`, or raise its error; TimeoutError when it takes longer: its thread is then left."""
    future = in_background(call, name)
    if not wait([future], seconds).done:
        raise TimeoutError(f"no whole answer within {seconds:.0f} s: it comes too slowly")
    return future.result()
