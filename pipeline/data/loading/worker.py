"""Threads that build examples, and the loader process that runs them (started by `loading.backends`).

A loader process reads jobs from a socket and writes examples into memory shared with its rank. It holds nothing that
outlives it: the memory has no name, there is no semaphore, and when its rank dies the socket closes and it exits.
"""

from __future__ import annotations

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


class ExampleThreads:
    """A thread pool that builds the examples of a loader spec, a few examples per task."""

    def __init__(self, spec: LoaderSpec, storage: Storage):
        self._builder, self._places = ExampleBuilder(spec, storage), spec.places
        self._num_threads = spec.config.data.loader.threads_per_worker
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="loader")
        self._is_prefetching = False

    def submit(self, step: int, buffer: BatchBuffer, first: int) -> list[Future[list[BadRecord]]]:
        """Start to build the spec's examples of a step; row 0 of the buffer is place `first`."""
        if not self._is_prefetching:
            order, places = self._builder.order, self._places
            self._builder.reader.start_prefetch(lambda later: order.samples(later, places), step)
            self._is_prefetching = True
        # Several examples per task: one by one, the hand-over would cost a twentieth of building them.
        length = min(MAX_RUN, max(1, len(self._places) // (4 * self._num_threads)))
        runs = [self._places[start : start + length] for start in range(0, len(self._places), length)]
        return [self._pool.submit(self._builder.build, step, run, buffer, first) for run in runs]

    def result(self, step: int, futures: list[Future[list[BadRecord]]]) -> list[BadRecord]:
        """Wait for a step's examples and return what was replaced. Raises the first error in order of place."""
        bad = [record for future in futures for record in future.result()]
        self._builder.reader.finish_step(step)
        return bad

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


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Build examples until the rank closes the socket."""
    assignment: Assignment = connection.recv()
    spec, lock, threads = assignment.batch_spec, threading.Lock(), None

    def send(message: Done) -> None:
        with lock, suppress(ConnectionError):  # the rank has closed the socket, and `recv` ends this process
            connection.send(message)

    while True:
        job: Job = connection.recv()
        try:
            if threads is None:
                threads = ExampleThreads(assignment.loader_spec, assignment.storage)
            buffer = BatchBuffer(spec, memoryview(memory)[job.offset : job.offset + spec.bytes])
            _send_when_done(threads, threads.submit(job.step, buffer, assignment.first), job.step, send)
        except Exception as error:
            send(Done(job.step, [], _portable(error)))


def _send_when_done(
    threads: ExampleThreads, futures: list[Future[list[BadRecord]]], step: int, send: Callable[[Done], None]
) -> None:
    remaining, lock = len(futures), threading.Lock()

    def count_down(_: Future[list[BadRecord]]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if remaining:
                return
        try:
            send(Done(step, threads.result(step, futures)))
        except Exception as error:
            send(Done(step, [], _portable(error)))

    for future in futures:
        future.add_done_callback(count_down)


def _portable(error: Exception) -> Exception:
    """Return an error that survives pickling: the project's own do, others are formatted as text."""
    if isinstance(error, MomeError):
        return error
    return RunFailed(f"a loader process failed: {''.join(traceback.format_exception(error))}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the rank decides what ends
    configure_logging()
    torch.set_num_threads(1)
    socket, memory, progress = map(int, sys.argv[1:4])
    in_progress.write_to(mmap.mmap(progress, in_progress.BYTES))
    try:
        serve(Connection(socket), mmap.mmap(memory, 0))
    except (EOFError, ConnectionError):
        os._exit(0)  # the rank has gone or closed the socket: no thread may keep the process alive
