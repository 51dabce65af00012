"""Loader backends: threads of the trainer's process, or loader processes that share memory with it. Each process builds
a fixed, contiguous part of the rank's places, and so reads its own streams only. The memory is anonymous and processes
communicate through sockets alone, so that after a SIGKILL of any of them the kernel reclaims everything. A process that
dies is restarted when its examples are next waited for, and repeats its unfinished steps with equal results.
"""

import ctypes
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import torch

from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.redaction import configure_logging
from pipeline.data import quarantine
from pipeline.data.batch import BatchBuffer, BatchSpec
from pipeline.data.examples.builder import ExampleBuilder, LoaderSpec
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

MAX_RUN = 16  # examples of one thread's task at most: an error or a close takes effect after the running tasks
MAX_RESTARTS = 3  # of one process within RESTART_STEPS: a cause that persists would restart it endlessly
RESTART_STEPS = 100
HELD = 2  # buffers that the consumer may hold while the processes fill the others
END_SECONDS = 5.0  # for a process to exit by itself
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # examples are the unit of parallel work
PROGRAM = "from pipeline.data.loading.backends import main; main()"  # not -m: that would pickle messages as __main__'s


class LoaderBackend:
    """Builds the batches of one rank ahead of need. It decides when examples are ready, never what they contain."""

    submit: Callable[[int], None]  # start to build the examples of a step; steps are submitted in order
    # Wait for the examples of the earliest step submitted; return them with the records of replaced samples.
    result: Callable[[int], tuple[BatchBuffer, list[BadRecord]]]
    close: Callable[[], None]  # stop all threads and processes; buffers that were returned stay usable


BackendFactory = Callable[[LoaderSpec, Storage], LoaderBackend]


@dataclass(eq=False, repr=False)
class ThreadBackend(LoaderBackend):
    """Threads that build examples; in the trainer's own process they share its interpreter lock, and it slows them."""

    spec: LoaderSpec
    storage: Storage
    # Made by the first `submit`, because errors of the builder's constructor belong to that step.
    _builder: ExampleBuilder | None = field(default=None, init=False)
    _pool: ThreadPoolExecutor = field(init=False)
    _pending: dict[int, tuple[BatchBuffer, list[Future[list[BadRecord]]]]] = field(default_factory=dict, init=False)

    def submit(self, step: int, buffer: BatchBuffer | None = None, first: int | None = None) -> None:
        """Start to build a step's examples, in memory of their own or in a buffer whose row 0 is place `first`."""
        places, num_threads = self.spec.places, self.spec.config.data.loader.threads_per_worker
        if buffer is None or first is None:
            buffer, first = BatchBuffer(self.spec.batch_spec), places.start
        if self._builder is None:
            self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")  # starts no thread yet
            self._builder = ExampleBuilder(self.spec, self.storage)
            order = self._builder.order
            self._builder.reader.start_prefetch(lambda later: order.samples(later, places), step)
        # Several examples per task: one by one, the hand-over would cost a twentieth of building them.
        length = min(MAX_RUN, max(1, len(places) // (4 * num_threads)))
        runs = [places[start : start + length] for start in range(0, len(places), length)]
        self._pending[step] = buffer, [self._pool.submit(self._builder.build, step, r, buffer, first) for r in runs]

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        """Wait for a step's examples. Raises the first error in order of place."""
        assert self._builder is not None
        buffer, futures = self._pending.pop(step)
        bad = [record for future in futures for record in future.result()]
        self._builder.reader.finish_step(step)
        return buffer, bad

    def close(self) -> None:
        if self._builder is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._builder.reader.close()


# The first message to a loader process: the spec of its own places, the storage, the spec of a whole buffer, which the
# rank's processes fill together, and the place of a buffer's row 0. All others are jobs: (step, offset of its buffer),
# which are answered by (step, replaced samples, error).
Assignment = tuple[LoaderSpec, Storage, BatchSpec, int]


@dataclass(eq=False)
class _Worker:
    """One loader process, its socket, and the jobs it has not finished."""

    assignment: Assignment
    progress: int  # descriptor of `samples`
    samples: mmap.mmap  # names of those that the process is decoding
    jobs: dict[int, int] = field(default_factory=dict)  # step -> offset of its buffer, in order
    restarts: int = 0
    steps_since_restart: int = 0
    process: subprocess.Popen[bytes] = field(init=False)
    connection: Connection = field(init=False)


class ProcessBackend(LoaderBackend):
    """`loader.num_workers` processes of threads, which write into equal buffers of the trainer's memory."""

    def __init__(self, spec: LoaderSpec, storage: Storage):
        loader = spec.config.data.loader
        self._spec, count = spec.batch_spec, loader.prefetch_batches + 1 + HELD
        self._bytes = self._spec.layout()[1]  # of one buffer
        self._descriptor = _anonymous_file(self, self._bytes * count)
        self._memory = mmap.mmap(self._descriptor, self._bytes * count)
        self._free: deque[int] = deque(range(count))
        self._buffers: dict[int, int] = {}  # step -> index of its buffer
        self._done: dict[int, list[tuple[list[BadRecord], Exception | None]]] = {}  # step -> answers of the processes
        self._workers: list[_Worker] = []
        try:
            for part in spec.split(loader.num_workers):
                progress = _anonymous_file(self, quarantine.BOARD_BYTES)
                samples = mmap.mmap(progress, quarantine.BOARD_BYTES)
                worker = _Worker((part, storage, self._spec, spec.places.start), progress, samples)
                self._start(worker)
                self._workers.append(worker)
                quarantine.boards.append(samples)
        except BaseException:
            self.close()
            raise

    def submit(self, step: int) -> None:
        self._buffers[step], self._done[step] = self._free.popleft(), []
        for worker in self._workers:
            worker.jobs[step] = self._buffers[step] * self._bytes
            try:
                worker.connection.send((step, worker.jobs[step]))
            except ConnectionError:
                self._restart(worker)

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        while len(self._done[step]) < len(self._workers):
            ready = wait([worker.connection for worker in self._workers])
            for worker in self._workers:
                if worker.connection in ready:
                    try:
                        done, replaced, failure = worker.connection.recv()
                    except (EOFError, ConnectionError):
                        self._restart(worker)
                        continue
                    del worker.jobs[done]
                    worker.steps_since_restart += 1
                    if worker.steps_since_restart >= RESTART_STEPS:
                        worker.restarts = 0
                    self._done[done].append((replaced, failure))
        index, parts = self._buffers.pop(step), self._done.pop(step)
        memory = (ctypes.c_char * self._bytes).from_buffer(self._memory, index * self._bytes)
        weakref.finalize(memory, self._free.append, index).atexit = False
        if (error := next((error for _, error in parts if error is not None), None)) is not None:
            raise error
        bad = sorted((record for replaced, _ in parts for record in replaced), key=lambda record: record.place)
        # If none is free, the consumer holds more batches than HELD: it gets this one as a copy.
        return BatchBuffer(self._spec, memory if self._free else bytearray(memory)), bad

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            _wait_or_kill(worker.process)
            quarantine.boards.remove(worker.samples)

    def _start(self, worker: _Worker) -> None:
        """Start a process with its unfinished jobs."""
        own_socket, worker_socket = socket.socketpair()
        with worker_socket:
            descriptors = (worker_socket.fileno(), self._descriptor, worker.progress)
            worker.samples[:] = bytes(quarantine.BOARD_BYTES)
            command = [sys.executable, "-c", PROGRAM, *map(str, descriptors)]
            environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            worker.process = subprocess.Popen(command, pass_fds=descriptors, env=environment)
        worker.connection = Connection(own_socket.detach())
        for message in (worker.assignment, *worker.jobs.items()):
            worker.connection.send(message)

    def _restart(self, worker: _Worker) -> None:
        """Start a process that died again. Raises RunFailed after MAX_RESTARTS in a short while."""
        worker.connection.close()
        status = _wait_or_kill(worker.process)
        cause = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        if worker.restarts == MAX_RESTARTS:
            raise RunFailed(
                f"a loader process died {MAX_RESTARTS + 1} times in a short while, the last time {cause}. If the "
                "machine is short of memory, lower data.loader.num_workers, memory_bytes or read_ahead_bytes"
            )
        worker.restarts, worker.steps_since_restart = worker.restarts + 1, 0
        log.warning("a loader process died (%s): restarting it (%d of %d)", cause, worker.restarts, MAX_RESTARTS)
        self._start(worker)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a process whose socket is closed; kill it after END_SECONDS."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(END_SECONDS)
    process.kill()
    return process.wait()


def _anonymous_file(owner: object, size: int) -> int:
    """Return the descriptor of a file of `size` bytes that has no name, closed when `owner` is deleted."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("mome-batches")
    else:  # systems without Linux's call
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    weakref.finalize(owner, os.close, descriptor)
    os.ftruncate(descriptor, size)
    return descriptor


def main() -> None:
    """Run a loader process. Arguments: the descriptors of its socket, the buffers, and the samples being decoded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the rank decides what ends
    configure_logging()
    torch.set_num_threads(1)
    number, descriptor, progress = map(int, sys.argv[1:4])
    quarantine.boards[0] = mmap.mmap(progress, quarantine.BOARD_BYTES)
    connection, memory = Connection(number), mmap.mmap(descriptor, 0)

    def answer(threads: ThreadBackend, step: int, error: Exception | None) -> None:
        """Send the result of a step, or the error that its submission met; one thread does so, in order of step."""
        bad: list[BadRecord] = []
        try:
            if error is not None:
                raise error
            bad = threads.result(step)[1]
        except MomeError as failure:
            error = failure
        except Exception as failure:  # others may not survive pickling
            error = RunFailed(f"a loader process failed: {''.join(traceback.format_exception(failure))}")
        with suppress(ConnectionError):  # when the rank has closed the socket, `recv` ends this process
            connection.send((step, bad, error))

    try:
        loader_spec, storage, batch_spec, first = connection.recv()
        threads, answers, size = ThreadBackend(loader_spec, storage), ThreadPoolExecutor(1), batch_spec.layout()[1]
        while True:
            step, offset = connection.recv()
            failure: Exception | None = None
            try:
                threads.submit(step, BatchBuffer(batch_spec, memoryview(memory)[offset : offset + size]), first)
            except Exception as error:
                failure = error
            answers.submit(answer, threads, step, failure)
    except (EOFError, ConnectionError):
        os._exit(0)  # the rank has gone or closed the socket: no thread may keep the process alive
