"""Supervision of this rank's process: goodput, preemption, hang watchdog, and node statistics."""

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import psutil

from pipeline.config.background import PeriodicThread, within
from pipeline.config.errors import MomeError, Preempted, Superseded
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data import quarantine
from pipeline.data.storage import Storage, join
from pipeline.training.collectives import Collectives, KeyValueStore
from pipeline.training.goodput import GoodputTracker, Phase

log = logging.getLogger(__name__)

# torchrun forwards SIGTERM to its ranks; Slurm sends SIGUSR1 ahead of the time limit with --signal=USR1@300.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RankSupervisor:
    """Tracks the phase this rank is in, for goodput and the watchdog; one per process."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        collectives: Collectives,
        poll: Callable[[], bool] | None = None,
        elapsed: float = 0.0,
    ):
        """`poll` says whether this machine is being preempted; `elapsed`: seconds since the process began training."""
        self._poll, self._notices = poll, list[int]()  # signals received; -1 from `poll`
        self._collectives, guards = collectives, config.guards
        self.goodput = GoodputTracker(storage, config.folder, is_writer=collectives.rank == 0, elapsed=elapsed)
        self.nodes = NodeMonitor(collectives)
        used = {name for stage in config.stages for name in stage.sources}
        is_remote = any(not is_local(config.sources[name].shards) for name in used)
        # Data may be late for as long as its store may be unavailable.
        data_seconds = guards.hang_seconds + (config.storage.retry_timeout_seconds if is_remote else 0.0)
        limits: Limits = {"startup": guards.start_seconds, "training": guards.hang_seconds, "data_wait": data_seconds}
        limits |= {"checkpoint": guards.save_seconds, "evaluation": guards.evaluate_seconds}
        self._watchdog = Watchdog(collectives, storage, config.folder, limits)
        self._is_first_stage = True
        self._first_step: int | None = None  # of this stage, in this process
        self.resumes_account = True  # at the next resume; a stage after another one continues its account

    @contextmanager
    def running(self) -> Iterator[None]:
        """Monitor the rank and its node, and count signals as preemption notices (only in a process's main thread)."""
        handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, lambda number, _: self._notices.append(number)) for number in handled}
        if self._collectives.rank == 0:
            self.goodput.start()
        self._watchdog.start()
        if self._collectives.local_rank == 0:
            self.nodes.start()
        is_complete = is_superseded = False
        try:
            yield
            is_complete = True
        except Superseded:
            is_superseded = True
            raise
        finally:
            self.nodes.stop(timeout=2 * NODE_SECONDS)
            self._watchdog.close()
            self.goodput.close(ended=is_complete, write=not is_superseded)
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def preempted(self) -> bool:
        """Return whether this process is being preempted. Once True it stays True."""
        if not self._notices and self._poll is not None and self._poll():
            self._notices.append(-1)
        return bool(self._notices)

    def begin_stage(self, step: int, is_rollback: bool) -> None:
        """Enter the startup of the stage that begins at global step `step`, or its repetition after a rollback."""
        if not self._is_first_stage:  # the first stage's startup continues that of the process
            self.goodput.enter("restart" if is_rollback else "startup")
            self.resumes_account = is_rollback
        self._is_first_stage, self._first_step = False, None
        self._watchdog.enter("startup", step)

    def enter(self, phase: Phase, step: int) -> None:
        """Enter a phase at global step `step`. Until the stage's first step is done, the startup limit applies."""
        self._first_step = step if self._first_step is None else self._first_step
        has_stepped = step > self._first_step
        self._watchdog.enter(phase, step, phase if has_stepped else "startup")
        if has_stepped or phase == "training":
            self.goodput.enter(phase)

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter("training", step)


# ---- hangs

EXIT_STATUS = Preempted.exit_status  # as after a preemption, the same command resumes the run
HEARTBEATS, HANG, STACKS_WRITTEN = "heartbeats", "hung", "stacks_written"  # topics of the key-value store
PEER_SECONDS = 10.0  # for the other ranks to write their stacks before this rank, which may host the store, exits
WRITE_SECONDS = 30.0  # for writing stacks to the run's folder, whose store may be the cause of the hang
MISSED_TICKS = 4  # heartbeats that a rank may miss before it counts as silent
REQUEST_SECONDS = 5.0  # timeout of a request; a stopped host never responds
RETRY_SECONDS = 60.0  # until a store that did not respond is tried again
T = TypeVar("T")
PHASE_ORDER: tuple[Phase, ...] = ("startup", "data_wait", "training", "evaluation", "checkpoint")  # within a step
Limits = dict[Phase, float]  # seconds; phases without an entry have no limit


@dataclass(frozen=True)
class Heartbeat:
    phase: Phase
    step: int  # global
    seconds: float  # in this phase
    limit: float
    calls: int  # collectives entered so far
    inside: str  # collective the rank is waiting in; empty if none
    beat: int = 0  # incremented while the rank's watchdog runs


class Watchdog(PeriodicThread):
    """Detects a hung rank, records all stacks, and ends the processes so that the launcher restarts them.

    A thread measures how long its rank has been in the phase that `enter` reports. When a rank exceeds its limit, every
    rank writes the stacks of all its threads to its log and to `<run>/stacks`, names the rank that is missing, and
    exits with status 75. A rank that cannot run this code, because it is stopped or a thread holds the interpreter
    lock, is named by the others; in the latter case `faulthandler`, which needs no lock, ends the process. A rank that
    waits for an unavailable store is waited for while it sends heartbeats and is within its own limit.
    """

    def __init__(
        self,
        collectives: Collectives,
        storage: Storage,
        folder: str,
        limits: Limits,
        end: Callable[[int], None] = os._exit,
    ):
        self._collectives, self._storage, self._folder = collectives, storage, join(folder, "stacks")
        self._limits, self._end = limits, end
        self._tick = min(max(min(limits.values()) / 20, 0.5), 5.0)
        super().__init__(self._check, self._tick, "mome-watchdog")
        self._main = threading.get_ident()
        self._beat = 0
        self._last_seen: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was first seen
        self._store: KeyValueStore | None = None
        self._retry_store_at = 0.0
        self.enter("startup", 0)

    def enter(self, phase: Phase, step: int, limited_as: Phase | None = None) -> None:
        """Record that this rank enters a phase; with `limited_as` the limit of that phase applies."""
        self._entered = (phase, step, time.monotonic(), self._limits.get(limited_as or phase, float("inf")))

    def close(self) -> None:
        self.stop()
        faulthandler.cancel_dump_traceback_later()

    def _check(self) -> bool:
        """Publish this rank's heartbeat and end the process if a rank hangs; return False after that."""
        phase, step, entered, limit = self._entered
        self._beat += 1
        calls, inside = self._collectives.calls, self._collectives.inside
        own = Heartbeat(phase, step, time.monotonic() - entered, limit, calls, inside, self._beat)
        if limit < float("inf") and sys.__stderr__ is not None:  # re-armed by every tick
            patience = limit + 10 * self._tick + 4 * REQUEST_SECONDS
            faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        self._request(lambda store: store.write(HEARTBEATS, json.dumps(asdict(own))))
        hang = self._request(lambda store: store.announcement(HANG))
        if not hang and own.seconds > limit:
            position = step, PHASE_ORDER.index(phase)
            live = self._live_heartbeats()
            waits_for_slower_rank = any(  # a live one behind this one and within its own limit
                (other.step, PHASE_ORDER.index(other.phase)) < position and other.seconds <= other.limit
                for rank, other in live.items()
                if rank != self._collectives.rank
            )
            if not waits_for_slower_rank:
                message = (
                    f"rank {self._collectives.rank} has been in '{phase}' of step {step} for {own.seconds:.0f} s "
                    f"(limit: {limit:.0f} s). {self._culprits(live)}"
                )
                hang = self._request(lambda store: store.announcement(HANG, message)) or message  # the first counts
        if hang:
            self._finish(hang)
        return not hang

    def _request(self, request: Callable[[KeyValueStore], T]) -> T | None:
        """Return the store's response; None if its host is gone, stopped or unreachable."""
        if time.monotonic() < self._retry_store_at:
            return None
        try:
            if self._store is None:
                self._store = within(REQUEST_SECONDS, partial(KeyValueStore, self._collectives), "mome-store")
            return within(REQUEST_SECONDS, partial(request, self._store), "mome-store")
        except (RuntimeError, OSError) as error:
            log.debug("the process group's key-value store does not respond: %s", error)
            self._store, self._retry_store_at = None, time.monotonic() + RETRY_SECONDS
            return None

    def _live_heartbeats(self) -> dict[int, Heartbeat]:
        """Return the heartbeats of the ranks whose watchdogs are running."""
        messages = self._request(lambda store: store.read(HEARTBEATS)) or {}
        heartbeats = {rank: Heartbeat(**json.loads(text)) for rank, text in messages.items()}
        now = time.monotonic()
        for rank, heartbeat in heartbeats.items():
            if self._last_seen.get(rank, (0, 0.0))[0] != heartbeat.beat:
                self._last_seen[rank] = (heartbeat.beat, now)
        oldest = now - MISSED_TICKS * self._tick
        return {rank: heartbeat for rank, heartbeat in heartbeats.items() if self._last_seen[rank][1] > oldest}

    def _culprits(self, live: dict[int, Heartbeat]) -> str:
        """Describe the ranks the others wait for: the silent ones, else those that entered the fewest collectives."""
        if not live:
            return "The other ranks cannot be queried: the store's host (rank 0 or the launcher) is stopped or gone"
        lines = [
            f"rank {rank}: step {beat.step}, {beat.phase} for {beat.seconds:.0f} s, "
            + (f"waits in '{beat.inside}' (call {beat.calls})" if beat.inside else f"after {beat.calls} calls")
            for rank, beat in sorted(live.items())
        ]
        silent = [rank for rank in range(self._collectives.world_size) if rank not in live]
        fewest = min(beat.calls for beat in live.values())
        behind = sorted(rank for rank, beat in live.items() if beat.calls == fewest)
        culprits = silent or behind
        ranks = ", ".join(map(str, culprits[:16])) + (f", … ({len(culprits)})" if len(culprits) > 16 else "")
        if silent:
            lines.append(f"no heartbeat from rank(s) {ranks}: stopped, ended, or disconnected")
        elif len(behind) < len(live):
            lines.append(f"not reached by rank(s) {ranks}: the collective the others wait in")
        return "; ".join(lines)

    def _finish(self, message: str) -> None:
        """Write this rank's stacks, give the other ranks time to write theirs, and end the process."""
        if sys.__stderr__ is not None:
            patience = WRITE_SECONDS + 2 * PEER_SECONDS + 4 * REQUEST_SECONDS
            faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        log.error("hung: %s", message)
        decoding = ""
        if samples := quarantine.samples_in_progress():  # a decoder that hangs on one hangs again after every restart
            decoding = f"samples being decoded: {', '.join(samples)}"
            log.error("%s", decoding)
        phase, step, entered, _ = self._entered
        rank, world_size = self._collectives.rank, self._collectives.world_size
        frame = sys._current_frames().get(self._main)
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        line = "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        report = (
            f"rank {rank} of {world_size}\n{message}\n\n"
            f"in '{phase}' of step {step} for {time.monotonic() - entered:.0f} s, at {line}\n{decoding}\n\n{stacks}"
        )
        sys.stderr.write(report)
        sys.stderr.flush()
        url = join(self._folder, f"step-{step:08d}.rank-{rank:05d}.txt")
        try:
            within(WRITE_SECONDS, lambda: self._storage.write(url, report.encode()), "mome-stacks")
        except (MomeError, TimeoutError) as error:
            log.warning("the stacks could not be saved; they are in the log only: %s", error)
        deadline = time.monotonic() + PEER_SECONDS  # until every live rank has written its stacks
        self._request(lambda store: store.write(STACKS_WRITTEN, "yes"))
        while self._store is not None and time.monotonic() < deadline:
            if set(self._live_heartbeats()) <= set(self._request(lambda store: store.read(STACKS_WRITTEN)) or {}):
                break
            time.sleep(self._tick)
        log.error("rank %d exits with status %d, to be restarted", rank, EXIT_STATUS)
        logging.shutdown()
        self._end(EXIT_STATUS)


# ---- node statistics

NODE_SECONDS = 10.0  # interval of node statistics, as in MLflow
TOPIC = "nodes"  # of the key-value store
MEGA = 1e6


class NodeMonitor(PeriodicThread):
    """Statistics of the nodes, named as MLflow's, whose own monitor would contact the server (contract C6).

    Each node's first rank publishes them in the key-value store, from which rank 0 collects all, as `system/<node>/…`.
    """

    def __init__(self, collectives: Collectives, seconds: float = NODE_SECONDS, name: str | None = None):
        super().__init__(self._publish, seconds, "mome-nodes", immediately=True)
        self._collectives, self._node = collectives, name or socket.gethostname()
        self.newest: deque[dict[str, float]] = deque(maxlen=1)  # on rank 0; empty once taken
        self._store: KeyValueStore | None = None
        self._network: Any = None  # traffic at the first call
        self._nvml: Any = None
        self._gpus: list[Any] | None = None  # handles

    def _publish(self) -> bool:
        """Share this node's statistics; return False when that no longer works."""
        try:
            if self._store is None:  # the first statistics cover the time until the next call
                self._store = KeyValueStore(self._collectives)
                self._sample()
                return True
            self._store.write(TOPIC, json.dumps({"node": self._node, "metrics": self._sample()}))
            if self._collectives.rank == 0:
                metrics: dict[str, float] = {}
                names: set[str] = set()
                for rank, text in sorted(self._store.read(TOPIC).items()):
                    node = json.loads(text)["node"]
                    name = node if node not in names else f"{node}-{rank}"  # several nodes may have the same name
                    names.add(name)
                    metrics |= {f"system/{name}/{key}": value for key, value in json.loads(text)["metrics"].items()}
                self.newest.append(metrics)
        except (RuntimeError, OSError, psutil.Error) as error:  # the store's host is gone, or psutil lacks permission
            log.warning("node %s: statistics are no longer sampled: %s", self._node, error)
            return False
        return True

    def _sample(self) -> dict[str, float]:
        """Return this node's current statistics by MLflow's names. Network traffic counts from the first call."""
        network = psutil.net_io_counters()  # None in a container without a network interface
        if self._gpus is None:
            self._network, self._gpus = network, []
            try:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            except Exception as error:  # not installed, or no driver: pynvml's errors share no base class
                log.debug("GPU statistics are not sampled: %s", error)
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGA,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGA,
            "disk_available_megabytes": disk.free / MEGA,
        }
        if network is not None and self._network is not None:
            metrics["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGA
            metrics["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGA
        for number, gpu in enumerate(self._gpus):
            gpu_memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
            metrics |= {
                f"gpu_{number}_utilization_percentage": float(self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
                f"gpu_{number}_memory_usage_megabytes": gpu_memory.used / MEGA,
                f"gpu_{number}_memory_usage_percentage": 100 * gpu_memory.used / gpu_memory.total,
                f"gpu_{number}_power_usage_watts": self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            }
        return metrics
