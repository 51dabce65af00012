"""Loader processes of one rank, filling slots of memory that they share with it.

Each process makes a fixed, contiguous part of the rank's places, and so reads its own streams only. The memory is
anonymous (it has no name in any file system) and the processes hear from their rank through sockets alone, so that
after a SIGKILL of anyone the kernel itself takes everything back. A process that dies is noticed when its rows are
next waited for, started anew, and given its unfinished steps again: they come out the same.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from multiprocessing.connection import Connection, wait

from pipeline.config.errors import RunFailed
from pipeline.data import in_progress
from pipeline.data.examples.batch_buffer import BatchBuffer
from pipeline.data.examples.builder import LoaderSpec
from pipeline.data.loading.worker import Assignment, Done, Job
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of one process within RESTART_STEPS: what kills it again and again would do so for ever
RESTART_STEPS = 100
HELD = 2  # slots that the consumer may hold while the processes fill the others
END_SECONDS = 5.0  # for a process to end by itself
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # rows are the unit of parallel work
PROGRAM = "from pipeline.data.loading.worker import main; main()"  # not -m: its messages would be pickled as __main__'s


class ProcessBackend:
    """`loader.num_workers` processes of `loader.threads_per_worker` threads each. Rows are handed over where they
    were written."""

    def __init__(self, task: LoaderSpec, storage: Storage):
        loader = task.config.data.loader
        self._layout, self._first = task.layout, task.places.start
        self._memory = _SlotMemory(self._layout.bytes, loader.prefetch_batches + 1 + HELD)
        self._workers: list[_Worker] = []
        try:
            for share in task.split(loader.num_workers):
                assignment = Assignment(share, storage, self._layout, self._first)
                self._workers.append(_Worker(assignment, self._memory.descriptor))
        except BaseException:
            self.close()
            raise
        self._slots: dict[int, int] = {}  # step -> its slot
        self._done: dict[int, list[Done]] = {}

    def submit(self, step: int) -> None:
        self._slots[step] = self._memory.take()
        self._done[step] = []
        for worker in self._workers:
            worker.give(Job(step, self._slots[step] * self._layout.bytes))

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        while len(self._done[step]) < len(self._workers):
            self._receive()
        slot, parts = self._slots.pop(step), self._done.pop(step)
        rows = BatchBuffer(self._layout, self._memory.lend(slot))
        for part in parts:
            if part.error is not None:
                raise part.error
        if not self._memory.has_free:  # the consumer keeps more batches than HELD: this one it gets as a copy
            rows = rows.copy()
        bad = [record for part in parts for record in part.bad]
        return rows, sorted(bad, key=lambda record: record.place)

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.close()

    def _receive(self) -> None:
        connections = {worker.connection: worker for worker in self._workers}
        for ready in wait(list(connections)):
            worker = connections[ready]  # type: ignore[index]  # wait() returns what it was given
            try:
                done: Done = worker.connection.recv()
            except (EOFError, ConnectionError):
                worker.restart()
                continue
            worker.finished(done.step)
            self._done[done.step].append(done)


class _Worker:
    """One process, its socket, and the jobs it has not finished."""

    def __init__(self, assignment: Assignment, memory: int):
        self._assignment, self._memory = assignment, memory
        self._progress = _anonymous_file()  # which samples it decodes
        weakref.finalize(self, os.close, self._progress)
        os.ftruncate(self._progress, in_progress.BYTES)
        self._samples = mmap.mmap(self._progress, in_progress.BYTES)
        in_progress.watch(self._samples)
        self._restarts = self._steps_since = 0
        self.jobs: dict[int, Job] = {}  # by step, in order
        self._start()

    def give(self, job: Job) -> None:
        self.jobs[job.step] = job
        try:
            self.connection.send(job)
        except ConnectionError:
            self.restart()

    def finished(self, step: int) -> None:
        del self.jobs[step]
        self._steps_since += 1
        if self._steps_since >= RESTART_STEPS:
            self._restarts = 0

    def restart(self) -> None:
        """Starts the process anew with what it has not finished. Raises RunFailed when that would not end."""
        self.connection.close()
        self.end()
        how = _how_it_ended(self._process.returncode)
        if self._restarts == MAX_RESTARTS:
            raise RunFailed(
                f"a loader process died {MAX_RESTARTS + 1} times in a short while, the last time {how}. If the machine "
                "is short of memory, lower data.loader.num_workers, memory_bytes or read_ahead_bytes"
            )
        self._restarts, self._steps_since = self._restarts + 1, 0
        log.warning("a loader process died (%s): starting it again (%d of %d)", how, self._restarts, MAX_RESTARTS)
        self._start()
        for job in self.jobs.values():
            self.connection.send(job)

    def close(self) -> None:
        """Nothing more is wanted of the process, whose socket is closed."""
        self.end()
        in_progress.forget(self._samples)

    def end(self) -> None:
        """Waits for the process, whose socket is closed; it is killed if it does not end."""
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), self._memory, self._progress)
            self._samples[:] = bytes(in_progress.BYTES)
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, descriptors)],
                pass_fds=descriptors,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.connection = Connection(ours.detach())
        self.connection.send(self._assignment)


class _SlotMemory:
    """Equal slots of anonymous shared memory. A lent slot is free again when nothing refers to it any more."""

    def __init__(self, slot_bytes: int, slots: int):
        self._slot_bytes = slot_bytes
        self.descriptor = _anonymous_file()
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, slot_bytes * slots)
        self._memory = mmap.mmap(self.descriptor, slot_bytes * slots)
        self._free: deque[int] = deque(range(slots))

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self) -> int:
        return self._free.popleft()

    def lend(self, slot: int) -> object:
        """The slot's memory, as an object whose end frees the slot."""
        lent = (ctypes.c_char * self._slot_bytes).from_buffer(self._memory, slot * self._slot_bytes)
        weakref.finalize(lent, self._free.append, slot).atexit = False
        return lent


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mome-batches")
    with tempfile.TemporaryFile() as file:  # without Linux's call: a file that is unlinked already
        return os.dup(file.fileno())


def _how_it_ended(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
