"""Several Ray nodes on one machine, each a raylet in a session of its own, and a network whose links can be cut.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


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
        """Start the node; `ray start --block` receives SIGTERM when this process ends (prctl's PR_SET_PDEATHSIG)."""
        options: dict[str, Any] = {"cwd": ROOT, "env": self.environment, "start_new_session": True}
        options["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, **options)

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
        hosts = hosts or [Host(f"127.0.{subnet}.{number + 2}") for number in range(len(cpus))]
        port, self.dashboard_port, client = free_ports(3)
        self.address, self.dashboard = f"{hosts[0].address}:{port}", f"http://127.0.0.1:{self.dashboard_port}"
        self._listening = [self.address, *[self.dashboard.removeprefix("http://")] * dashboard]
        joining = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"]
        joining += [f"--dashboard-port={self.dashboard_port}", f"--include-dashboard={str(dashboard).lower()}"]
        self.nodes: list[Node] = []
        for number, (host, count) in enumerate(zip(hosts, cpus, strict=False)):
            agent, grpc, runtime, metrics = free_ports(4)
            command = [*host.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *joining]
            command += [f"--node-ip-address={host.address}", f"--num-cpus={count}", f"--object-store-memory={MEMORY}"]
            command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
            command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}"]
            # One per node, because a node that unpacks a job's code clears the target folder.
            command += [f"--temp-dir={folder / str(number)}", "--disable-usage-stats", "--include-log-monitor=false"]
            own = {**self.environment, **dict(host.environment)}
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

    def _is_listening(self) -> bool:
        for address in self._listening:
            host, _, port = address.partition(":")
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((host, int(port))):
                    return False
        return True

    def wait_for_nodes(self, count: int) -> None:
        self._wait(lambda: len(self.alive()) == count)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait, and start nodes again: a loaded machine may exceed the half minute that `ray start` allows."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, self.log_text()
            for node in self.nodes:
                if node.process is not None and node.process.poll() is not None:
                    node.attempts += 1
                    assert node.attempts < ATTEMPTS, node.log.read_text(encoding="utf-8")[-3000:]
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
        with suppress(Exception):  # the head is lost, or has not started yet
            nodes = self._state().get_all_node_info(timeout=5).values()
            return {node.node_manager_address: node.node_id.hex() for node in nodes if node.state == 0}
        return {}

    def _state(self) -> Any:
        from ray._raylet import GcsClient

        return GcsClient(address=self.address)

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
def raylets(cpus: list[int], environment: dict[str, str] | None = None, **options: Any) -> Iterator[Cluster]:
    """Run a Cluster in a temporary folder with a short name, because sockets are created in it."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    cluster = Cluster(folder, cpus, environment, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


# ---- a network


class Network:
    """Network of `count` machines: the first is this process's own network, the others are network namespaces.

    Needs the right to create namespaces (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN) and `ip`.
    """

    def __init__(self, count: int):
        self._tag, self._others = f"m{os.getpid() % 100000}", range(1, count)
        subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        # Gloo would choose the interface by host name, which is the same in every namespace.
        own = Host(f"{subnet}.1", (), (("GLOO_SOCKET_IFNAME", f"{self._tag}b"),))
        self.hosts = [own] + [
            Host(
                f"{subnet}.{number + 1}",
                ("ip", "netns", "exec", f"{self._tag}n{number}"),
                (("GLOO_SOCKET_IFNAME", f"{self._tag}e{number}"),),
            )
            for number in self._others
        ]

    def build(self) -> None:
        """Join the namespaces by a bridge. Raises OSError or CalledProcessError where they are not permitted."""
        bridge = f"{self._tag}b"
        commands = [f"link add {bridge} type bridge", f"addr add {self.hosts[0].address}/24 dev {bridge}"]
        commands.append(f"link set {bridge} up")
        for number in self._others:
            space, inside, outside = (f"{self._tag}{kind}{number}" for kind in "nev")
            commands += [
                f"netns add {space}",
                f"link add {outside} type veth peer name {inside}",
                f"link set {inside} netns {space}",
                f"link set {outside} master {bridge} up",
                f"-n {space} addr add {self.hosts[number].address}/24 dev {inside}",
                f"-n {space} link set {inside} up",
                f"-n {space} link set lo up",
            ]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    def cut(self, number: int) -> None:
        """Drop all packets of a machine without closing its connections."""
        subprocess.run(["ip", "link", "set", f"{self._tag}v{number}", "down"], check=True, capture_output=True)

    def remove(self) -> None:
        names = [
            f"{kind} del {self._tag}{end}{n}" for n in self._others for kind, end in (("netns", "n"), ("link", "v"))
        ]
        for command in [*names, f"link del {self._tag}b"]:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", *command.split()], check=False, capture_output=True)


@contextmanager
def network(count: int) -> Iterator[Network | None]:
    """Build the network and yield it; yield None where namespaces are not permitted."""
    machines = Network(count)
    try:
        try:
            machines.build()
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        yield machines
    finally:
        machines.remove()
