"""Threads that build examples, and the loader process that runs them (started by `loading.backends`).

A loader process reads jobs from a socket and writes examples into memory shared with its rank. It holds nothing that
outlives it: the memory has no name, there is no semaphore, and when its rank dies the socket closes and it exits.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.redaction import configure_logging
from pipeline.data import in_progress
from pipeline.data.batch import BatchBuffer, BatchSpec
from pipeline.data.examples.builder import ExampleBuilder, LoaderSpec
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

MAX_RUN = 16  # examples of one thread's task at most: an error or a close takes effect after the running tasks


class ThreadBackend:
    """Threads that build the examples of a loader spec, a few examples per task.

    In the trainer's own process they share its interpreter lock, so that a busy trainer slows them.
    """

    def __init__(self, spec: LoaderSpec, storage: Storage):
        self._spec, self._builder = spec, ExampleBuilder(spec, storage)
        self._num_threads = spec.config.data.loader.threads_per_worker
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="loader")
        self._pending: dict[int, tuple[BatchBuffer, list[Future[list[BadRecord]]]]] = {}
        self._is_prefetching = False

    def submit(
        self,
        step: int,
        buffer: BatchBuffer | None = None,
        first: int | None = None,
        when_done: Callable[[int], None] | None = None,
    ) -> None:
        """Start to build the spec's examples of a step, in memory of their own or in a buffer whose row 0 is `first`.

        `when_done(step)` is called by a thread when all are built, or have failed.
        """
        places = self._spec.places
        if buffer is None or first is None:
            buffer, first = BatchBuffer(self._spec.batch_spec), places.start
        if not self._is_prefetching:
            order = self._builder.order
            self._builder.reader.start_prefetch(lambda later: order.samples(later, places), step)
            self._is_prefetching = True
        # Several examples per task: one by one, the hand-over would cost a twentieth of building them.
        length = min(MAX_RUN, max(1, len(places) // (4 * self._num_threads)))
        runs = [places[start : start + length] for start in range(0, len(places), length)]
        futures = [self._pool.submit(self._builder.build, step, run, buffer, first) for run in runs]
        self._pending[step] = buffer, futures
        if when_done is not None:
            remaining = itertools.count(len(futures) - 1, -1)  # `next` is atomic: one thread draws 0
            for future in futures:
                future.add_done_callback(lambda _: when_done(step) if next(remaining) == 0 else None)

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        """Wait for a step's examples; return them and what was replaced. Raises the first error in order of place."""
        buffer, futures = self._pending.pop(step)
        bad = [record for future in futures for record in future.result()]
        self._builder.reader.finish_step(step)
        return buffer, bad

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._builder.reader.close()


@dataclass(frozen=True)
class Assignment:
    """The first message to a loader process."""

    loader_spec: LoaderSpec  # of the process's own places
    storage: Storage
    batch_spec: BatchSpec  # of a whole buffer, which the rank's processes fill together
    first: int  # the place of a buffer's row 0


@dataclass(frozen=True)
class Job:
    """A request to build the process's examples of `step` in the buffer at `offset` of the shared memory."""

    step: int
    offset: int


@dataclass(frozen=True)
class Done:
    """The answer to a job: the replaced samples, or the error."""

    step: int
    bad: list[BadRecord]
    error: Exception | None = None


def main() -> None:
    """Build examples in memory that the rank shares, until it closes the socket.

    Arguments: the descriptors of the socket, of the batches' memory, and of the names of samples being decoded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the rank decides what ends
    configure_logging()
    torch.set_num_threads(1)
    socket, descriptor, progress = map(int, sys.argv[1:4])
    in_progress.write_to(mmap.mmap(progress, in_progress.BYTES))
    connection, memory = Connection(socket), mmap.mmap(descriptor, 0)
    lock = threading.Lock()
    threads: ThreadBackend | None = None

    def send(message: Done) -> None:
        with lock, suppress(ConnectionError):  # when the rank has closed the socket, `recv` ends this process
            connection.send(message)

    def answer(step: int) -> None:
        assert threads is not None
        try:
            send(Done(step, threads.result(step)[1]))
        except Exception as error:
            send(Done(step, [], _portable(error)))

    try:
        assignment: Assignment = connection.recv()
        spec = assignment.batch_spec
        while True:
            job: Job = connection.recv()
            try:
                if threads is None:
                    threads = ThreadBackend(assignment.loader_spec, assignment.storage)
                buffer = BatchBuffer(spec, memoryview(memory)[job.offset : job.offset + spec.bytes])
                threads.submit(job.step, buffer, assignment.first, answer)
            except Exception as error:
                send(Done(job.step, [], _portable(error)))
    except (EOFError, ConnectionError):
        os._exit(0)  # the rank has gone or closed the socket: no thread may keep the process alive


def _portable(error: Exception) -> Exception:
    """Return an error that survives pickling: the project's own do, others are formatted as text."""
    if isinstance(error, MomeError):
        return error
    return RunFailed(f"a loader process failed: {''.join(traceback.format_exception(error))}")
