"""Who prepares a rank's batches: threads of its own process here; processes and Ray actors behind the same interface.

A backend is told which steps to begin, and hands each over when asked. It decides when rows are ready, never what
they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from pipeline.data.examples.batch_buffer import BatchBuffer
from pipeline.data.examples.builder import ExampleBuilder, LoaderSpec
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

MAX_RUN = 16  # rows of one thread's turn at most: what follows an error or a close need not be waited for long


class LoaderBackend(Protocol):
    """Makes the batches of one rank ahead of need. Steps begin in order, one after the other."""

    def submit(self, step: int) -> None:
        """Starts on the rows of a step."""

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        """Waits for the rows of the earliest step begun. Raises what went wrong with them."""

    def close(self) -> None:
        """Ends all that was started. What was handed over stays usable."""


BackendFactory = Callable[[LoaderSpec, Storage], LoaderBackend]


class ExampleThreads:
    """Threads that make a task's rows, a few rows a turn."""

    def __init__(self, maker: ExampleBuilder, threads: int):
        self._maker, self._threads = maker, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._has_begun = False

    def submit(self, step: int, places: range, buffer: BatchBuffer, first: int) -> list[Future[list[BadRecord]]]:
        """Begins the rows of `places`; row 0 of the buffer is place `first`."""
        if not self._has_begun:
            self._maker.begin(step)
            self._has_begun = True
        # A few rows a turn: one by one, handing them over would cost a twentieth of making them.
        length = min(MAX_RUN, max(1, len(places) // (4 * self._threads)))
        runs = [places[start : start + length] for start in range(0, len(places), length)]
        return [self._pool.submit(self._maker.make, step, run, buffer, first) for run in runs]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._maker.close()


class ThreadBackend:
    """Threads of the trainer's own process, whose interpreter they share: a busy trainer is better served by others."""

    def __init__(self, task: LoaderSpec, storage: Storage):
        self._task, self._maker = task, ExampleBuilder(task, storage)
        self._threads = ExampleThreads(self._maker, task.config.data.loader.threads_per_worker)
        self._pending: dict[int, tuple[BatchBuffer, list[Future[list[BadRecord]]]]] = {}

    def submit(self, step: int) -> None:
        buffer, places = BatchBuffer.allocate(self._task.layout), self._task.places
        self._pending[step] = buffer, self._threads.submit(step, places, buffer, places.start)

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        buffer, runs = self._pending.pop(step)
        bad = [record for run in runs for record in run.result()]
        self._maker.reached(step)
        return buffer, bad

    def close(self) -> None:
        self._threads.close()
