"""Supervision of this rank's process: goodput, hang watchdog, node statistics and preemption."""

import json
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from pipeline.config.background import PeriodicThread
from pipeline.config.errors import Superseded
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.callbacks import Callback, StageResult
from pipeline.training.collectives import Collectives, KeyValueStore
from pipeline.training.goodput import GoodputTracker, Phase
from pipeline.training.watchdog import Limits, Watchdog

log = logging.getLogger(__name__)

# torchrun forwards SIGTERM to its ranks; Slurm sends SIGUSR1 ahead of the time limit with --signal=USR1@300.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NODE_SECONDS = 10.0  # interval of node statistics, as in MLflow
TOPIC = "nodes"  # of the key-value store
MEGA = 1e6


class RankSupervisor(Callback):
    """Tracks the phase this rank is in, for goodput and the watchdog; one per process, attached to every stage."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        collectives: Collectives,
        poll: Callable[[], bool] | None = None,
        elapsed: float = 0.0,
    ):
        """`poll` asks the scheduler or the cloud whether this machine is being preempted.

        `elapsed`: seconds since the process began training, before the process group existed.
        """
        self._poll, self._notices = poll, list[int]()  # signals received; -1 from `poll`
        self._collectives, self._start_seconds = collectives, config.guards.start_seconds
        self.goodput = GoodputTracker(storage, config.folder, is_writer=collectives.rank == 0, elapsed=elapsed)
        self.nodes = NodeMonitor(collectives)
        used = {name for stage in config.stages for name in stage.sources}
        is_remote = any(not is_local(config.sources[name].shards) for name in used)
        limits: Limits = {
            "startup": config.guards.start_seconds,
            "training": config.guards.hang_seconds,
            # Data may be late for as long as its store may be unavailable.
            "data_wait": config.guards.hang_seconds + (config.storage.retry_timeout_seconds if is_remote else 0.0),
            "checkpoint": config.guards.save_seconds,
            "evaluation": config.guards.evaluate_seconds,
        }
        self._watchdog = Watchdog(collectives, storage, config.folder, limits)
        self._is_first_stage = True
        self._has_begun = self._has_stepped = False  # a step of this stage, in this process
        self._resumes_account = True  # at the next resume; a stage after another one continues its account

    @contextmanager
    def running(self) -> Iterator[None]:
        """Monitor the rank and its node during the block, and count signals as preemption notices.

        Python allows signal handlers only in a process's main thread; in any other thread (a Ray Train worker) `poll`
        is the only source of notices.
        """
        is_main = threading.current_thread() is threading.main_thread()
        handled = SIGNALS if is_main else ()
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
            self._resumes_account = is_rollback
        self._is_first_stage = self._has_begun = self._has_stepped = False
        self._watchdog.enter("startup", step)

    def resume_from(self, seconds: dict[str, float]) -> None:
        """Resume the goodput account from the checkpoint or hand-over that the stage starts from."""
        if self._resumes_account:
            self.goodput.resume_from(seconds)

    def enter(self, phase: Phase, step: int) -> None:
        """Enter a phase at global step `step`. Until the stage's first step is done, the startup limit applies."""
        self._watchdog.enter(phase, step, None if self._has_stepped else self._start_seconds)
        if self._has_stepped or phase == "training":
            self.goodput.enter(phase)

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Enter a phase for the duration of the block."""
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter("training", step)

    def before_batch(self, step: int) -> None:
        self._has_stepped, self._has_begun = self._has_begun, True
        self.enter("data_wait", self.state.stage.global_step(step))

    def before_step(self, step: int, batch: Batch) -> None:
        self.enter("training", self.state.stage.global_step(step))

    def on_stage_end(self, result: StageResult) -> None:
        self._has_stepped = True


class NodeMonitor(PeriodicThread):
    """Node statistics: CPU, memory, disk, network and GPU utilisation, named as MLflow's system metrics.

    A thread of each node's first rank samples them every few seconds and publishes them in the ranks' key-value store,
    from which rank 0 collects them for the journal. No rank and no training step waits for this. MLflow's own monitor
    is not used because it would contact the server from the trainer (contract C6).
    """

    def __init__(self, collectives: Collectives, seconds: float = NODE_SECONDS, name: str | None = None):
        super().__init__(self._publish, seconds, "mome-nodes", immediately=True)
        self._collectives, self._name = collectives, name or socket.gethostname()
        self._newest: deque[dict[str, float]] = deque(maxlen=1)
        self._store: KeyValueStore | None = None
        self._network: Any = None  # traffic at the first call
        self._nvml: Any = None
        self._gpus: list[Any] | None = None  # handles

    def take(self) -> dict[str, float]:
        """Return all nodes' statistics as `system/<node>/…` on rank 0; empty if none are newer than the last call."""
        return self._newest.pop() if self._newest else {}

    def _publish(self) -> bool:
        """Share this node's statistics; return False when that no longer works."""
        try:
            if self._store is None:  # the first statistics cover the time until the next call
                self._store = KeyValueStore(self._collectives)
                self._sample()
                return True
            self._store.write(TOPIC, json.dumps({"node": self._name, "metrics": self._sample()}))
            if self._collectives.rank == 0:
                metrics: dict[str, float] = {}
                names: set[str] = set()
                for rank, text in sorted(self._store.read(TOPIC).items()):
                    node = json.loads(text)["node"]
                    name = node if node not in names else f"{node}-{rank}"  # several nodes may have the same name
                    names.add(name)
                    metrics |= {f"system/{name}/{key}": value for key, value in json.loads(text)["metrics"].items()}
                self._newest.append(metrics)
        except (RuntimeError, OSError, psutil.Error) as error:  # the store's host is gone, or psutil lacks permission
            log.warning("node %s: statistics are no longer sampled: %s", self._name, error)
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
