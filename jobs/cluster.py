"""The Ray cluster of a run: join or start it, and compare its nodes with what ranks request."""

import logging
import os
import re
import secrets
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.console import notify
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import validate, with_absolute_paths
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.tracking.locations import absolute_uri, configured_uri

TOKEN_FILE = "~/.ray/auth_token"  # to `os.path.expanduser`, which leaves it relative for a user without a home
HEAD_SECONDS = 15.0  # limit for a head to answer a health check
HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]+)):(\d{1,5})")
OTHER_PORTS = {8265: "the port of the dashboard, for mome submit", 10001: "the port of ray:// clients"}
ADVICE = ("Refer to the documentation", "Consider provisioning")
LOADER_AMOUNT = 0.001  # of `cluster.loader_resource` per loader actor; CPUs limit the number of actors per node
DEATHS = {  # of a rank, by the phrase in Ray's error
    "its node has died": "its node was lost",
    "worker process has died": "its process was killed, by a signal or for lack of memory, or crashed",
}
KEYS = {"CPU": "cluster.cpus_per_worker", "GPU": "cluster.gpus_per_worker"}

ALONE = "torchrun --nproc-per-node N -m pipeline.training CONFIG"

Resources = Mapping[str, float]


def check_ray() -> None:
    """Raise ConfigError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(f"Ray is not installed here: pip install 'mome[ray]', or train without it: {ALONE}")


def connect(cluster: ClusterConfig) -> None:
    """Join the configured cluster, or start a local one with room for the ranks. Raises ConfigError, RunFailed."""
    check_ray()
    import ray
    import ray._private.utils as ray_utils
    import ray._private.worker as ray_worker

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Train reads these in the driver and passes them to its controller and ranks.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_seconds)
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "100.0")  # of silence; the default is 600
    if ray.is_initialized():
        return
    address, origin = address_of(cluster) or (None, "")
    # Ray would replace this process's handlers for good, by ones that end it with status 15 or print a C++ stack.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    set_handler, ray_utils.set_sigterm_handler = ray_utils.set_sigterm_handler, lambda _: None
    ray_worker.print_to_stdstream = show_ray_message
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            if address != "auto":
                _find_head(address)
            ray.init(address=address, **quiet)
        else:
            keep_token_private()
            ray.init("local", num_cpus=local_cpus(cluster), include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises exceptions of many types, a bare Exception among them
        if address is not None:
            remedy = "Start one (ray start --head), correct the address (host:6379), or leave it out to run here"
            raise RunFailed(f"{origin} {address}: no Ray cluster answers ({root_cause(error)}). {remedy}.") from error
        ray.shutdown()
        remedy = f"If the machine is busy, try again; `mome doctor` checks disk, memory, limits; `{ALONE}` needs no Ray"
        if "AF_UNIX" in str(error):
            long = f"The folder of temporary files, {tempfile.gettempdir()}, has a path too long for sockets"
            remedy = f"{long}: set TMPDIR or RAY_TMPDIR to a short one, such as /tmp"
        raise RunFailed(f"Ray did not start on this machine ({root_cause(error)}). {remedy}.") from error
    finally:
        ray_utils.set_sigterm_handler = set_handler
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def show_ray_message(data: Any, ignore_prefix: bool) -> None:
    """Print a message of Ray's own processes on standard error, where Ray would print it on standard output.

    That a process died is left out: the run's driver prints which rank it was, and what follows.
    """
    for line in data["lines"]:
        if not line.startswith("A worker died or was killed"):
            notify(f"Ray: {line.strip()}", "yellow")


def local_cpus(cluster: ClusterConfig) -> int:
    """Return the number of CPUs of a local Ray: those of this machine, or more if ranks and loaders reserve more."""
    needed = int(cluster.workers * (cluster.cpus_per_worker + cluster.loader_actors * cluster.loader_cpus))
    return max(os.cpu_count() or 1, needed + 1)


def address_of(cluster: ClusterConfig) -> tuple[str, str] | None:
    """Return the address of the cluster to join and the key or variable that sets it; None for a local Ray."""
    named, variable = cluster.address, os.environ.get("RAY_ADDRESS")
    if variable and named in (None, "auto"):  # as Ray does
        return None if variable == "local" else (variable, "RAY_ADDRESS")
    return None if named in (None, "local") else (named, "cluster.address")


def _find_head(address: str) -> None:
    """Check within seconds that a Ray head answers at host:port; Ray waits for minutes. Raises OSError, ValueError."""
    import grpc

    if "://" in address:
        raise ValueError("ray:// clients cannot place ranks" if address.startswith("ray://") else "expected host:port")
    match = HOST_AND_PORT.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise ValueError("expected host:port, with an IPv6 host as in [::1]:6379")
    port = int(match[3])
    socket.create_connection((match[1] or match[2], port), timeout=5.0).close()
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=HEAD_SECONDS)
        except grpc.RpcError as error:
            codes, hint = grpc.StatusCode, f"; it is {OTHER_PORTS[port]}" if port in OTHER_PORTS else ""
            if error.code() in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.UNIMPLEMENTED):
                raise OSError(f"the process at port {port} is no Ray head{hint}") from error


def keep_token_private() -> None:
    """Create Ray's token, which Ray writes world-readable, for this user only; in the environment without a home."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    file = Path(os.path.expanduser(TOKEN_FILE))
    try:
        if not file.is_absolute():
            raise FileNotFoundError
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as new:
                new.write(secrets.token_hex(32))
        except FileExistsError:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                file.chmod(0o600)
    except OSError:
        if not os.access(file, os.R_OK):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def for_ranks(config: RunConfig, **cluster: object) -> RunConfig:
    """Return the config with absolute paths and MLflow file, and changed keys of its cluster. Raises ConfigError."""
    values = with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)
    values["tracking"] = {**values.get("tracking", {}), "uri": absolute_uri(configured_uri(config))}
    if cluster:
        values["cluster"] = {**values.get("cluster", {}), **cluster}
    return validate(values, config.name)


def root_cause(error: BaseException) -> str:
    """Return the innermost message of an error of Ray: what died and where, else its last line that is no advice."""
    for phrase, cause in DEATHS.items():
        if phrase in str(error):
            details = dict(re.findall(r"^\s*(pid|ip): (\S+)$", str(error), re.MULTILINE))
            where = ", ".join(f"{name} {value}" for name, value in details.items())
            return f"{cause} ({where})" if where else cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(ADVICE)]
    return redact(lines[-1]) if lines else type(error).__name__


def rank_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Return what Ray reserves for each rank on one node."""
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def requested_resources(cluster: ClusterConfig, ranks: int) -> dict[str, float]:
    """Return what `ranks` ranks and their loader actors request in total."""
    total = {kind: ranks * amount for kind, amount in rank_resources(cluster).items()}
    if actors := ranks * cluster.loader_actors:
        total["CPU"] += actors * cluster.loader_cpus
        if cluster.loader_resource is not None:
            total[cluster.loader_resource] = actors * LOADER_AMOUNT
    return total


def missing_resources(cluster: ClusterConfig, nodes: Sequence[Resources]) -> str | None:
    """Return what empty nodes lack for the minimum number of ranks, and which keys change it; None if they fit."""
    ranks, loader = cluster.min_workers or cluster.workers, cluster.loader_resource
    fewer = "cluster.min_workers" if cluster.min_workers else "cluster.workers"
    for kind, number in requested_resources(cluster, ranks).items():
        existing = sum(node.get(kind, 0.0) for node in nodes)
        if number <= existing:
            continue
        needs, has = f"{ranks} {'rank needs' if ranks == 1 else 'ranks need'}", f"this cluster has {existing:g}"
        if kind == loader:
            offer = f"Start nodes that offer it (ray start --resources='{{\"{kind}\": 1}}')"
            needs += f" {number:g} of '{kind}', which cluster.loader_resource names"
            return f"{needs}; {has}. {offer}, or leave cluster.loader_resource out"
        loaders = ", cluster.loader_actors" if cluster.loader_actors else ""
        cpu = f"{KEYS[kind]}{loaders} or {fewer} lower"
        remedy = f"cluster.gpus_per_worker=0 to train on CPU, set {fewer} lower" if kind == "GPU" else cpu
        return f"{needs} {quantity(number, kind)}; {has}. Set {remedy}, or use a larger cluster"
    per_rank = rank_resources(cluster)
    room = sum(ranks_on_node(node, per_rank) for node in nodes)
    if room < ranks:
        needs = " and ".join(quantity(amount, kind) for kind, amount in per_rank.items())
        largest = ", ".join(f"{max(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in per_rank)
        remedy = f"Set {' or '.join(KEYS[kind] for kind in per_rank)} or cluster.workers lower, or use larger nodes"
        exists = f"there is room for {room} (most on a node: {largest})"
        return f"each of {ranks} ranks needs {needs} on one node; {exists}. {remedy}"
    # Loader actors are placed one by one, on any node with a free CPU and the named resource.
    actors = ranks * cluster.loader_actors if loader is not None else 0
    cpus = sum(node.get("CPU", 0.0) for node in nodes if node.get(loader or "", 0.0) >= LOADER_AMOUNT)
    if cpus >= actors * cluster.loader_cpus:
        return None
    needs = f"{actors} loader actors need {actors * cluster.loader_cpus:g} CPUs on nodes that offer '{loader}'"
    return f"{needs}; those have {cpus:g}. Set cluster.loader_actors or cluster.loader_cpus lower, or add such nodes"


def ranks_on_node(node: Resources, per_rank: Resources) -> int:
    """Return how many ranks fit on a node. Two GPUs have no room for three ranks of 0.6: a fraction is of one GPU."""
    existing = {kind: node.get(kind, 0.0) + 1e-9 for kind in per_rank}
    return min(
        int(existing[kind]) * int(1 / amount + 1e-9) if kind == "GPU" and amount < 1 else int(existing[kind] / amount)
        for kind, amount in per_rank.items()
    )


def quantity(number: float, kind: str) -> str:
    """Return "1 CPU" or "2 CPUs"; resources other than CPU and GPU have no plural."""
    return f"{number:g} {kind}{'s' if number != 1 and kind in KEYS else ''}"
