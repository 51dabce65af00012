"""Several Ray nodes on one machine, each a raylet in a session of its own, and a network whose link can be cut.

Every node has its own address, ports and processes. Losing a node sends SIGKILL to all its processes at once. Only
processes started here are ended.
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.support.ranks import free_ports
from tests.support.train_process import ROOT, SECONDS, is_rank, send_signal

ATTEMPTS = 5
MEMORY = 80 * 2**20  # bytes of each node's object store: the least that Ray takes
ENVIRONMENT = {
    # Ray notices a lost node in seconds instead of half a minute.
    "RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "5",
    "RAY_memory_monitor_refresh_ms": "0",  # a full machine must not look like a fault of ours
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Host(NamedTuple):
    """The address of a node, the prefix of its command, and additional environment variables."""

    address: str
    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}


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
        """Start the node; `ray start --block` receives SIGTERM when this process ends (prctl's PR_SET_PDEATHSIG)."""
        options: dict[str, Any] = {"cwd": ROOT, "env": self.environment, "start_new_session": True}
        options["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, **options)

    def processes(self) -> list[psutil.Process]:
        """Return the node's processes, including workers that outlive their raylet for a while."""
        if self.process is not None:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(self.process.pid)
                self.known |= {process.pid: process for process in (root, *root.children(recursive=True))}
        self.known = {pid: process for pid, process in self.known.items() if process.is_running()}
        return list(self.known.values())

    def ranks(self) -> list[psutil.Process]:
        """Return the training workers on this node."""
        return [process for process in self.processes() if is_rank(process)]

    def lose(self) -> None:
        """Send SIGKILL to all the node's processes."""
        doomed = self.processes()
        send_signal(doomed, signal.SIGSTOP)  # so that none starts another process
        send_signal([*doomed, *self.processes()], signal.SIGKILL)
        psutil.wait_procs(doomed, timeout=20)
        if self.process is not None:
            self.process.wait(timeout=20)
            self.process = None


class Cluster:
    """A head and nodes that join it; the CPUs of a node limit its ranks."""

    def __init__(self, folder: Path, cpus: list[int], environment: dict[str, str], dashboard: bool, hosts: list[Host]):
        self.folder = folder
        self.environment = {**os.environ, **ENVIRONMENT, **environment}
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Not 127.0.0.1, which Ray replaces by the machine's own. Each test process of pytest-xdist has its own network.
        subnet = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        hosts = hosts or [Host(f"127.0.{subnet}.{number + 2}") for number in range(len(cpus))]
        port, dashboard_port, client = free_ports(3)
        self.address, self.dashboard = f"{hosts[0].address}:{port}", f"http://127.0.0.1:{dashboard_port}"
        # Overrides of a run with a rank on each of two nodes, which can continue with one.
        self.elastic = [f"cluster.address='{self.address}'", "cluster.workers=2", "cluster.min_workers=1"]
        self.elastic += ["cluster.placement=spread", "cluster.start_seconds=20", "cluster.grow_seconds=1"]
        self._listening = [(hosts[0].address, port), *[("127.0.0.1", dashboard_port)] * dashboard]
        joining = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"]
        joining += [f"--dashboard-port={dashboard_port}", f"--include-dashboard={str(dashboard).lower()}"]
        self.nodes: list[Node] = []
        for number, (host, count) in enumerate(zip(hosts, cpus, strict=False)):
            agent, grpc, runtime, metrics = free_ports(4)
            command = [*host.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *joining]
            command += [f"--node-ip-address={host.address}", f"--num-cpus={count}", f"--object-store-memory={MEMORY}"]
            command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
            command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}"]
            # One per node, because a node that unpacks a job's code clears the target folder.
            command += [f"--temp-dir={folder / str(number)}", "--disable-usage-stats", "--include-log-monitor=false"]
            own = {**self.environment, **host.environment}
            self.nodes.append(Node(command, own, folder / f"node{number}.log", host.address))
            joining = [f"--address={self.address}"]
        self.head, *self.others = self.nodes

    def start(self) -> None:
        self.head.start()
        self._wait(self._is_listening)
        self.wait_for_nodes(1)  # a node that joins before the head has registered exits
        for node in self.others:
            node.start()
        self.wait_for_nodes(len(self.nodes))

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.lose()

    def wait_for_nodes(self, count: int) -> None:
        self._wait(lambda: len(self.alive()) == count)

    def _is_listening(self) -> bool:
        with suppress(OSError):
            for address in self._listening:
                socket.create_connection(address, timeout=1).close()
            return True
        return False

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait, and start nodes again: a loaded machine may exceed the half minute that `ray start` allows."""
        end = time.monotonic() + SECONDS
        while not condition():
            logs = [node.log.read_text(encoding="utf-8")[-3000:] for node in self.nodes if node.log.exists()]
            assert time.monotonic() < end, "\n".join(logs)
            for node in self.nodes:
                if node.process is not None and node.process.poll() is not None:
                    node.attempts += 1
                    assert node.attempts < ATTEMPTS, "\n".join(logs)
                    node.lose()
                    node.start()
            time.sleep(0.2)

    def alive(self) -> dict[str, str]:
        """Return address -> id of every node that the head considers alive."""
        if self.environment["RAY_AUTH_MODE"] == "token":
            # In another process, because Ray reads its authentication once, on import.
            script = (
                "import json; from ray._raylet import GcsClient; "
                f"nodes = GcsClient(address={self.address!r}).get_all_node_info(timeout=20).values(); "
                "print(json.dumps({n.node_manager_address: n.node_id.hex() for n in nodes if n.state == 0}))"
            )
            options: Any = {"cwd": ROOT, "env": self.environment, "timeout": SECONDS, "check": False}
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **options)
            return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        from ray._raylet import GcsClient

        with suppress(Exception):  # the head is lost, or has not started yet
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
            return {node.node_manager_address: node.node_id.hex() for node in nodes if node.state == 0}
        return {}

    def announce_preemption(self, node: Node, seconds: int) -> None:
        """Announce, as a cloud's autoscaler does, that a node will be preempted in `seconds`."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        client, identity = GcsClient(address=self.address), self.alive()[node.address]
        accepted, refusal = client.drain_node(identity, reason, "a test", deadline)
        assert accepted, refusal

    def sessions(self) -> list[Path]:
        """Return the folders of the nodes' sessions (logs, code of jobs), without the link `session_latest`."""
        return sorted(self.folder.glob("*/session_2*"))

    def ranks(self) -> list[psutil.Process]:
        return [rank for node in self.nodes for rank in node.ranks()]


@contextmanager
def raylets(
    cpus: list[int], environment: dict[str, str] | None = None, dashboard: bool = False, hosts: list[Host] | None = None
) -> Iterator[Cluster]:
    """Run a Cluster on `hosts` (the head's first; default: loopback addresses), with short paths for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    cluster = Cluster(folder, cpus, environment or {}, dashboard, hosts or [])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def network() -> Iterator[tuple[list[Host], Callable[[], object]] | None]:
    """Yield the hosts of this process's own network and of a network namespace, and a function that cuts their link.

    Cutting drops all packets without closing connections. Yield None without the right to create namespaces (root, or
    CAP_SYS_ADMIN and CAP_NET_ADMIN).
    """
    tag = f"m{os.getpid() % 100000}"
    bridge, space, inside, outside = (f"{tag}{kind}" for kind in "bnev")
    subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
    # Gloo would choose the interface by host name, which is the same in every namespace.
    hosts = [Host(f"{subnet}.1", (), {"GLOO_SOCKET_IFNAME": bridge})]
    hosts.append(Host(f"{subnet}.2", ("ip", "netns", "exec", space), {"GLOO_SOCKET_IFNAME": inside}))

    def ip(*commands: str, check: bool = True) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=check, capture_output=True)

    try:
        try:
            ip(f"link add {bridge} type bridge", f"addr add {subnet}.1/24 dev {bridge}", f"link set {bridge} up")
            ip(f"netns add {space}", f"link add {outside} type veth peer name {inside}")
            ip(f"link set {inside} netns {space}", f"link set {outside} master {bridge} up")
            ip(f"-n {space} addr add {subnet}.2/24 dev {inside}")
            ip(f"-n {space} link set {inside} up", f"-n {space} link set lo up")
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        yield hosts, lambda: ip(f"link set {outside} down")
    finally:
        with suppress(FileNotFoundError):
            ip(f"netns del {space}", f"link del {outside}", f"link del {bridge}", check=False)
