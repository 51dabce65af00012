"""Node statistics: CPU, memory, disk, network and GPU utilisation, named as MLflow's system metrics.

A thread of each node's first rank samples them every few seconds and publishes them in the ranks' key-value store, from
which rank 0 collects them for the journal. No rank and no training step waits for this. MLflow's own monitor is not
used because it would contact the server from the trainer (contract C6).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from typing import Any

import psutil

from pipeline.config.background import PeriodicThread
from pipeline.training.collectives import Collectives, KeyValueStore

log = logging.getLogger(__name__)

SECONDS = 10.0  # sampling interval, as in MLflow
TOPIC = "nodes"
MEGA = 1e6

Metrics = dict[str, float]


class NodeMonitor:
    """Samples this node's statistics between `start` and `close`; on rank 0, `take` returns those of all nodes."""

    def __init__(self, collectives: Collectives, seconds: float = SECONDS, name: str | None = None):
        self._collectives, self._seconds = collectives, seconds
        self._name = name or socket.gethostname()
        self._lock = threading.Lock()
        self._new: Metrics = {}
        self._store: KeyValueStore | None = None
        self._sampler: NodeSampler | None = None
        self._thread = PeriodicThread(self._publish, seconds, "mome-nodes", immediately=True)

    def start(self) -> None:
        if self._collectives.local_rank == 0:
            self._thread.start()

    def close(self) -> None:
        self._thread.stop(timeout=2 * self._seconds)

    def take(self) -> Metrics:
        """Return all nodes' statistics as `system/<node>/…` on rank 0; empty if none are newer than the last call."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def _publish(self) -> bool:
        """Share this node's statistics; return False when that no longer works."""
        try:
            if self._store is None or self._sampler is None:  # the first statistics cover the time until the next call
                self._store, self._sampler = self._collectives.key_value_store(), NodeSampler()
                return True
            self._store.write(TOPIC, json.dumps({"node": self._name, "metrics": self._sampler.sample()}))
            if self._collectives.rank == 0:
                gathered = metrics_by_node({rank: json.loads(text) for rank, text in self._store.read(TOPIC).items()})
                with self._lock:
                    self._new = gathered
        except (RuntimeError, OSError, psutil.Error) as error:  # the store's host is gone, or psutil lacks permission
            log.warning("node %s: statistics are no longer sampled: %s", self._name, error)
            return False
        return True


def metrics_by_node(reports: dict[int, dict[str, Any]]) -> Metrics:
    """Merge the ranks' reports; if several nodes have the same name, all but the first get their rank appended."""
    metrics: Metrics = {}
    names: set[str] = set()
    for rank, report in sorted(reports.items()):
        name = report["node"] if report["node"] not in names else f"{report['node']}-{rank}"
        names.add(name)
        metrics |= {f"system/{name}/{key}": value for key, value in report["metrics"].items()}
    return metrics


class NodeSampler:
    """Statistics of this node. Network traffic counts from the sampler's creation."""

    def __init__(self) -> None:
        self._gpus: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._pynvml = pynvml
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        except Exception as error:  # not installed, or no driver: pynvml's errors share no base class
            log.debug("GPU statistics are not sampled: %s", error)
        psutil.cpu_percent()  # the first call only starts the measurement
        self._network = psutil.net_io_counters()

    def sample(self) -> Metrics:
        """Return the current statistics by MLflow's names."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGA,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGA,
            "disk_available_megabytes": disk.free / MEGA,
        }
        if network is not None and self._network is not None:  # a container may have no network interface
            metrics["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGA
            metrics["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGA
        for number, gpu in enumerate(self._gpus):
            gpu_memory = self._pynvml.nvmlDeviceGetMemoryInfo(gpu)
            metrics |= {
                f"gpu_{number}_utilization_percentage": float(self._pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
                f"gpu_{number}_memory_usage_megabytes": gpu_memory.used / MEGA,
                f"gpu_{number}_memory_usage_percentage": 100 * gpu_memory.used / gpu_memory.total,
                f"gpu_{number}_power_usage_watts": self._pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            }
        return metrics
