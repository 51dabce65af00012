"""A loader process, started by `pipeline.data.loading.process_backend` with a socket and shared memory as open files.

It reads jobs from a socket and writes rows into memory it shares with its rank. It holds nothing that outlives it:
the memory has no name, there is no semaphore, and when its rank dies, however it dies, the socket closes and it ends.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.redaction import configure_logging
from pipeline.data import in_progress
from pipeline.data.examples.batch_buffer import BatchBuffer, BatchSpec
from pipeline.data.examples.builder import ExampleBuilder, LoaderSpec
from pipeline.data.loading.backends import ExampleThreads
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage


@dataclass(frozen=True)
class Assignment:
    """What a loader process is told first."""

    task: LoaderSpec  # of the process's own places
    storage: Storage
    layout: BatchSpec  # of a whole slot, which the rank's processes fill together
    first: int  # the place of a slot's row 0


@dataclass(frozen=True)
class Job:
    """Make the process's rows of `step` in the slot at `offset` of the shared memory."""

    step: int
    offset: int


@dataclass(frozen=True)
class Done:
    """The rows of a step are in their slot, or why not."""

    step: int
    bad: list[BadRecord]
    error: Exception | None = None


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Makes rows until the rank closes the socket."""
    assignment: Assignment = connection.recv()
    send = _locked(connection.send)
    maker = threads = None
    while True:
        job: Job = connection.recv()
        try:
            if maker is None or threads is None:
                maker = ExampleBuilder(assignment.task, assignment.storage)
                threads = ExampleThreads(maker, assignment.task.config.data.loader.threads_per_worker)
            buffer = BatchBuffer(
                assignment.layout, memoryview(memory)[job.offset : job.offset + assignment.layout.bytes]
            )
            runs = threads.submit(job.step, assignment.task.places, buffer, assignment.first)
            _when_all_done(runs, job.step, maker, send)
        except Exception as error:
            send(Done(job.step, [], _portable(error)))


def _when_all_done(
    runs: list[Future[list[BadRecord]]], step: int, maker: ExampleBuilder, send: Callable[[Done], None]
) -> None:
    left, lock = len(runs), threading.Lock()

    def one_done(_: Future[list[BadRecord]]) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = left == 0
        if not is_last:
            return
        maker.reached(step)
        error = next((found for run in runs if (found := run.exception()) is not None), None)
        bad = [] if error else [record for run in runs for record in run.result()]
        send(Done(step, bad, _portable(error) if isinstance(error, Exception) else None))

    for run in runs:
        run.add_done_callback(one_done)


def _portable(error: Exception) -> Exception:
    """An error that survives pickling: ours do, others are told in words."""
    if isinstance(error, MomeError):
        return error
    return RunFailed(f"a loader process failed: {''.join(traceback.format_exception(error))}")


def _locked(call: Callable[[Done], None]) -> Callable[[Done], None]:
    lock = threading.Lock()

    def locked(message: Done) -> None:
        with lock:
            call(message)

    return locked


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the rank decides what ends
    configure_logging()
    torch.set_num_threads(1)
    socket, memory, progress = map(int, sys.argv[1:4])
    in_progress.write_to(mmap.mmap(progress, in_progress.BYTES))
    try:
        serve(Connection(socket), mmap.mmap(memory, 0))
    except (EOFError, ConnectionError):
        os._exit(0)  # the rank is gone or done with us: no thread of ours may hold the process up
