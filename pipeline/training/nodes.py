"""How busy each node is: processor, memory, disk, network and GPUs, named as MLflow's own monitor names them.

A thread of each node's first rank looks every few seconds and leaves the figures on the ranks' board; rank 0's gathers
them there, for the journal. No rank waits for another, and no step for a look. MLflow's monitor would talk to the
server from the trainer itself (contract C6).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import psutil

from pipeline.training.collectives import Board, Collectives

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two looks, as MLflow's monitor
TOPIC = "nodes"
MEGA = 1e6

Figures = dict[str, float]


class NodeMonitor:
    """Between `start` and `close` it looks; `take` gives rank 0 what is new."""

    def __init__(self, collectives: Collectives, seconds: float = SECONDS, name: str | None = None):
        self._collectives, self._seconds = collectives, seconds
        self._name = name or socket.gethostname()
        self._lock = threading.Lock()
        self._new: Figures = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mome-nodes", daemon=True)

    def start(self) -> None:
        if self._collectives.local_rank == 0:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._seconds)

    def take(self) -> Figures:
        """Every node's figures as `system/<node>/…`, where there are newer ones than at the last call; on rank 0."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def _watch(self) -> None:
        try:
            board, look = self._collectives.board(), Look()
            while not self._closed.wait(self._seconds):
                self._tell(board, look())
        except (RuntimeError, OSError, psutil.Error) as error:  # the board's holder is gone, or figures are not given
            log.info("node %s is not watched any more: %s", self._name, error)

    def _tell(self, board: Board, figures: Figures) -> None:
        board.write(TOPIC, json.dumps({"node": self._name, "figures": figures}))
        if self._collectives.rank == 0:
            gathered = by_node({rank: json.loads(text) for rank, text in board.read(TOPIC).items()})
            with self._lock:
                self._new = gathered


def by_node(told: dict[int, dict[str, Any]]) -> Figures:
    """What ranks told of their nodes, as metrics; of nodes with one name, all but the first show their rank too."""
    found: Figures = {}
    names: set[str] = set()
    for rank, each in sorted(told.items()):
        name = each["node"] if each["node"] not in names else f"{each['node']}-{rank}"
        names.add(name)
        found |= {f"system/{name}/{key}": value for key, value in each["figures"].items()}
    return found


class Look:
    """A look at this node. Network figures count from the first one on."""

    def __init__(self) -> None:
        self._gpus = _gpus()
        psutil.cpu_percent()  # which tells of the time since it was last asked
        self._network = psutil.net_io_counters()

    def __call__(self) -> Figures:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGA,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGA,
            "disk_available_megabytes": disk.free / MEGA,
        }
        if network is not None and self._network is not None:  # a container may have no network at all
            found["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGA
            found["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGA
        for number, gpu in enumerate(self._gpus):
            found |= {f"gpu_{number}_{key}": value for key, value in gpu().items()}
        return found


def _gpus() -> list[Callable[[], Figures]]:
    """A look at each GPU of the node; none without NVIDIA's package nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception as error:  # not installed, or no driver: errors of its own, of no common kind
        log.debug("GPUs are not watched: %s", error)
        return []

    def look(handle: Any) -> Figures:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "memory_usage_megabytes": memory.used / MEGA,
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }

    return [lambda handle=handle: look(handle) for handle in handles]  # type: ignore[misc]
