"""Several Ray nodes on one machine, each a raylet in a session of its own.

Every node has its own address, ports and processes. Losing a node sends SIGKILL to all its processes at once. Only
processes started here are ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.train_process import ROOT, is_rank, send_signal

SECONDS = 600  # timeout of every wait on a loaded machine
ATTEMPTS = 5
MEMORY = 80 * 2**20  # bytes of each node's object store: the least that Ray takes
# Ray notices a lost node in seconds instead of half a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}


def free_ports(count: int) -> list[int]:
    """Return different ports on which no process listens."""
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and its living descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True)
class Host:
    """The address of a node, the prefix of its command, and additional environment variables."""

    address: str
    prefix: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Node:
    """One raylet with its workers; the head also has the cluster's state and dashboard."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    address: str
    process: subprocess.Popen[bytes] | None = None
    known: dict[int, psutil.Process] = field(default_factory=dict)
    attempts: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def restart_if_ended(self) -> None:
        """Start the node again if it ended: a loaded machine may exceed the half minute that `ray start` allows."""
        if self.process is not None and self.process.poll() is not None:
            self.attempts += 1
            assert self.attempts < ATTEMPTS, self.log.read_text(encoding="utf-8")[-3000:]
            self.lose()
            self.start()

    def processes(self) -> list[psutil.Process]:
        """Return the node's processes, including workers that outlive their raylet for a while."""
        if self.process is not None:
            self.known |= {process.pid: process for process in tree(self.process.pid)}
        self.known = {pid: process for pid, process in self.known.items() if process.is_running()}
        return list(self.known.values())

    def lose(self) -> None:
        """Send SIGKILL to all the node's processes."""
        doomed = self.processes()
        send_signal(doomed, signal.SIGSTOP)  # so that none starts another process
        send_signal([*doomed, *self.processes()], signal.SIGKILL)
        psutil.wait_procs(doomed, timeout=20)
        if self.process is not None:
            self.process.wait(timeout=20)
            self.process = None

    def ranks(self) -> list[psutil.Process]:
        """Return the training workers on this node."""
        return [process for process in self.processes() if is_rank(process)]


class Cluster:
    """A head and nodes that join it; the CPUs of a node limit its ranks."""

    def __init__(
        self,
        folder: Path,
        cpus: list[int],
        environment: dict[str, str] | None = None,
        dashboard: bool = False,
        hosts: list[Host] | None = None,
    ):
        """Start the head and nodes on `hosts` (the head's first; default: loopback addresses)."""
        self.folder = folder
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, **HEALTH, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        self.environment |= {"RAY_memory_monitor_refresh_ms": "0"}  # a full machine must not look like a fault of ours
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "", "PYTHONPATH": path}
        self.environment |= environment or {}
        # Not 127.0.0.1, which Ray replaces by the machine's own. Each test process of pytest-xdist has its own network.
        subnet = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self.hosts = hosts or [Host(f"127.0.{subnet}.{number + 2}") for number in range(len(cpus))]
        self.port, self.dashboard_port, client = free_ports(3)
        head = ["--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"]
        head += [f"--dashboard-port={self.dashboard_port}", f"--include-dashboard={str(dashboard).lower()}"]
        self._listening = [self.address, *([self.dashboard.removeprefix("http://")] if dashboard else [])]
        self.head = self._node(0, cpus[0], head)
        self.others = [self._node(i, count, [f"--address={self.address}"]) for i, count in enumerate(cpus[1:], start=1)]

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def nodes(self) -> list[Node]:
        return [self.head, *self.others]

    def _node(self, number: int, cpus: int, options: list[str]) -> Node:
        agent, grpc, runtime, metrics = free_ports(4)
        host = self.hosts[number]
        command = [*host.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", f"--object-store-memory={MEMORY}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}"]
        # One per node, because a node that unpacks a job's code clears the target folder.
        command += [f"--temp-dir={self.folder / str(number)}", "--disable-usage-stats", "--include-log-monitor=false"]
        environment = {**self.environment, **dict(host.environment)}
        return Node(command, environment, self.folder / f"node{number}.log", host.address)

    def start(self) -> None:
        self.head.start()
        self._wait_for_head()
        self.wait_for_nodes(1)  # a node that joins before the head has registered exits
        for node in self.others:
            node.start()
        self.wait_for_nodes(len(self.nodes))

    def _wait_for_head(self) -> None:
        end = time.monotonic() + SECONDS
        for address in self._listening:
            while True:
                try:
                    host, _, port = address.partition(":")
                    socket.create_connection((host, int(port)), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < end, self.log_text()
                    self.head.restart_if_ended()
                    time.sleep(0.1)

    def alive(self) -> dict[str, str]:
        """Return address -> id of every node that the head considers alive."""
        if self.environment["RAY_AUTH_MODE"] == "token":
            # In another process, because Ray reads its authentication once, on import.
            script = (
                "import json; from ray._raylet import GcsClient; "
                f"nodes = GcsClient(address={self.address!r}).get_all_node_info(timeout=20).values(); "
                "print(json.dumps({n.node_manager_address: n.node_id.hex() for n in nodes if n.state == 0}))"
            )
            command = [sys.executable, "-c", script]
            environment: Any = {"cwd": ROOT, "env": self.environment, "timeout": SECONDS}
            done = subprocess.run(command, capture_output=True, text=True, check=False, **environment)
            return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        try:
            nodes = self._state().get_all_node_info(timeout=5).values()
        except Exception:  # the head is lost, or has not started yet
            return {}
        return {node.node_manager_address: node.node_id.hex() for node in nodes if node.state == 0}

    def _state(self) -> Any:
        from ray._raylet import GcsClient

        return GcsClient(address=self.address)

    def wait_for_nodes(self, count: int) -> None:
        end = time.monotonic() + SECONDS
        while len(self.alive()) != count:
            assert time.monotonic() < end, self.log_text()
            for node in self.nodes:
                node.restart_if_ended()
            time.sleep(0.2)

    def announce_preemption(self, node: Node, seconds: int) -> None:
        """Announce, as a cloud's autoscaler does, that a node will be preempted in `seconds`."""
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, refusal = self._state().drain_node(self.alive()[node.address], reason, "a test", deadline)
        assert accepted, refusal

    def sessions(self) -> list[Path]:
        """Return the folders of the nodes' sessions (logs, code of jobs), without the link `session_latest`."""
        return sorted(self.folder.glob("*/session_2*"))

    def log_text(self) -> str:
        return "\n".join(node.log.read_text(encoding="utf-8")[-2000:] for node in self.nodes if node.log.exists())

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.lose()


@contextmanager
def raylets(
    cpus: list[int],
    environment: dict[str, str] | None = None,
    dashboard: bool = False,
    hosts: list[Host] | None = None,
) -> Iterator[Cluster]:
    """Run a cluster in a temporary folder with a short name, because sockets are created in it."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    cluster = Cluster(folder, cpus, environment, dashboard, hosts)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    """Send SIGTERM to `ray start --block` when the test process ends (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
