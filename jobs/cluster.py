"""The Ray cluster a run trains on: joining it, what a rank takes of it, and how many ranks it has room for."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.dashboard import token_file
from jobs.resources import resources_of_rank, room_on
from pipeline.config.background import in_background
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig

if TYPE_CHECKING:
    from jobs.placement import Placement

log = logging.getLogger(__name__)

KNOCK_SECONDS = 5.0
HEAD_SECONDS = 15.0  # that a head may take to say that it is alive
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
NO_PROXY = (("grpc.enable_http_proxy", 0),)
LOOK_SECONDS = 1.0
ADVICE = ("Refer to the documentation", "Consider provisioning")
HEALTH_SECONDS = 100.0  # a rank that answers nothing for as long is lost; Ray would wait ten minutes
COUNT_SECONDS = 5.0
NEVER_SECONDS = 1e9


def connect(cluster: ClusterConfig) -> None:
    """Join the given cluster, or start a local one. Raises ConfigError without Ray, RunFailed when nobody answers."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed here: pip install 'mome[ray]', or train without it: "
            "torchrun --nproc-per-node N -m pipeline.training CONFIG"
        ) from error

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Train reads these in the driver and hands them to its controller and ranks.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_seconds)
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HEALTH_SECONDS))
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _own_signal_handlers():
        if address := address_of(cluster):
            _join(*address, quiet)
        else:
            _start(cluster, quiet)


def address_of(cluster: ClusterConfig) -> tuple[str, str] | None:
    """Return the address of the cluster to join and what names it; None for a Ray of this machine's own."""
    named, variable = cluster.address, os.environ.get("RAY_ADDRESS")
    if variable and named in (None, "auto"):  # as Ray has it
        return None if variable == "local" else (variable, "RAY_ADDRESS")
    return None if named in (None, "local") else (named, "cluster.address")


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Within `with` and after it, the handlers of SIGTERM and SIGINT stay. Ray sets its own for good: one that ends
    this process with status 15, and one that prints a C++ stack."""
    import ray._private.utils as of_ray

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sets_handler, of_ray.set_sigterm_handler = of_ray.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        of_ray.set_sigterm_handler = sets_handler
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _join(address: str, name: str, options: dict[str, Any]) -> None:
    """Raises RunFailed, within seconds where nobody or somebody else answers at the address."""
    import ray

    try:
        if address != "auto":
            _find_head(address)
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises what it likes
        raise RunFailed(
            f"{name} {address}: no Ray cluster answers ({first_words(error)}). Start one (ray start --head), correct "
            "the address (host:6379), or leave it out to run on this machine."
        ) from error


def _find_head(address: str) -> None:
    """Find out in seconds whether a Ray head answers at host:port; Ray itself would wait for minutes.

    Raises OSError or ValueError, saying what is there.
    """
    import grpc

    if "://" in address:
        told = "ray:// clients cannot place ranks" if address.startswith("ray://") else "it is no host:port"
        raise ValueError(told)
    host, port = host_and_port(address)
    socket.create_connection((host, port), timeout=KNOCK_SECONDS).close()
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", options=NO_PROXY) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=HEAD_SECONDS)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise OSError(f"what listens at port {port} is no Ray head{_whose(port)}") from error
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise OSError(f"port {port} is another service's{_whose(port)}") from error


def _whose(port: int) -> str:
    found = {8265: "the dashboard's, for mome submit", 10001: "that of ray:// clients"}.get(port)
    return f"; this port is {found}" if found else ""


def host_and_port(address: str) -> tuple[str, int]:
    """Return both of `host:port`, an IPv6 host without its brackets. Raises ValueError."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if found is None or int(found[3]) > 65535:
        raise ValueError("it is no host:port, with an IPv6 host as in [::1]:6379")
    return found[1] or found[2], int(found[3])


def _start(cluster: ClusterConfig, options: dict[str, Any]) -> None:
    """Start a Ray on this machine. Raises RunFailed if it does not."""
    import ray

    each = cluster.cpus_per_worker + cluster.loader_actors * cluster.loader_cpus
    needed = int(cluster.workers * each) + 1
    keep_token_private()
    try:
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **options)
    except Exception as error:  # Ray raises what it likes, a bare Exception among others
        ray.shutdown()
        if "AF_UNIX" in str(error):
            remedy = (
                f"The folder of temporary files, {tempfile.gettempdir()}, has too long a name for sockets: set TMPDIR "
                "or RAY_TMPDIR to a short one, such as /tmp"
            )
        else:
            remedy = (
                "Where the machine is busy, try again; `mome doctor` looks at its disk, memory and limits; "
                "`torchrun --nproc-per-node N -m pipeline.training CONFIG` needs no Ray"
            )
        raise RunFailed(f"Ray did not start on this machine ({first_words(error)}). {remedy}.") from error


def keep_token_private() -> None:
    """Let nobody else read the token that opens this user's Ray: Ray itself writes it for everybody to read.

    Where the home cannot be written, the token lives in the environment of this process and its children.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    file = token_file()
    try:
        if file is None:
            raise FileNotFoundError
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as new:
                new.write(secrets.token_hex(32))
        except FileExistsError:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                file.chmod(0o600)
    except OSError:
        if file is None or not os.access(file, os.R_OK):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def scaling_of(cluster: ClusterConfig) -> Any:
    """Ray Train's ScalingConfig: as many ranks as were asked for, or what there is room for now, down to the fewest.

    Ray counts what nodes have: those too that are about to be taken away, where it can place nothing. They are left
    out here. Its own growth, a restart from the last checkpoint at any moment, is off: ranks save first, see
    `jobs.notice`.
    """
    import ray.train

    count_anew()
    fewest, most = cluster.min_workers or cluster.workers, cluster.workers
    if fewest < most and leaving_nodes():
        most = min(most, max(fewest, room(cluster, occupied=False)))
    train: Any = ray.train  # its types are those of the version before
    return train.ScalingConfig(
        num_workers=most if fewest == cluster.workers else (fewest, most),
        use_gpu=bool(cluster.gpus_per_worker),
        resources_per_worker=resources_of_rank(cluster),
        placement_strategy=cluster.placement.upper(),
        elastic_resize_monitor_interval_s=NEVER_SECONDS,
    )


def on_ranks(
    function: Callable[[dict[str, str]], Any],
    config: RunConfig,
    name: str,
    given: Mapping[str, str] | None = None,
    placement: Placement | None = None,
    look: Callable[[], None] = lambda: None,
    callbacks: Sequence[Any] = (),
    **run: Any,
) -> Any:
    """`function({"config": json, **given})` on every rank that Ray Train places; what rank 0 returned.

    `look` is called every second meanwhile, and may raise to end it all. `run`: more of Ray Train's RunConfig. Raises
    what Ray Train raises when it gives up, and RunFailed where ranks can never be placed.
    """
    import ray.train
    import ray.train.torch

    from jobs.placement import Placement

    train: Any = ray.train  # its types are those of the version before

    placement = placement or Placement(config.cluster, secrets.token_hex(8))
    placement.begin()
    trainer = train.torch.TorchTrainer(
        function,
        train_loop_config={"config": config.model_dump_json(), **(given or {})},
        torch_config=train.torch.TorchConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        scaling_config=scaling_of(config.cluster),
        run_config=train.RunConfig(
            # Ray Train would resume a name it knows; where a run stands is for our checkpoints to say.
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=own_folder("mome-ray-train"),
            callbacks=[*callbacks, placement.callback],
            **run,
        ),
    )

    def look_at_both() -> None:
        placement.look()
        look()

    return _while_looking(trainer.fit, look_at_both).return_value


def _while_looking(work: Callable[[], Any], look: Callable[[], None]) -> Any:
    """`work()` in a thread of its own, while this one calls `look` and hears signals. If that raises, Ray is left."""
    import ray

    outcome = in_background(work, "Ray Train")
    try:
        while not wait([outcome], LOOK_SECONDS).done:
            look()
    except BaseException:
        ray.shutdown()
        wait([outcome], LOOK_SECONDS)
        raise
    return outcome.result()


def own_folder(name: str) -> str:
    """Return a folder for temporary files that is this user's alone: `name` with the user's number, or a new one where
    somebody else has that."""
    folder = os.path.join(tempfile.gettempdir(), f"{name}-{os.getuid()}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return tempfile.mkdtemp(prefix=f"{name}-")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(folder, 0o700)
    return folder


def staying_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is there and not about to be taken away."""
    import ray

    leaving = leaving_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def room(cluster: ClusterConfig, occupied: bool = True) -> int:
    """How many ranks fit on the nodes that stay: beside all that runs there, or (not `occupied`) if nothing did."""
    import ray
    from ray._private.state import available_resources_per_node

    needed = resources_of_rank(cluster)
    if cluster.loader_resource is None:
        needed["CPU"] += cluster.loader_actors * cluster.loader_cpus
    leaving = leaving_nodes()
    staying = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving}
    free = available_resources_per_node() if occupied else staying
    fits = [room_on(free[node], needed) for node in staying if node in free]
    return sum(fits)


def count_anew() -> None:
    """Have Ray Train count now what the nodes have; by itself it does so every 20 s, and trusts the last count."""
    import ray

    try:
        counter = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(counter.get_reserved_resources.remote("", recompute=True), timeout=COUNT_SECONDS)
    except Exception as error:  # there is none before the first run; and an old count costs only time
        log.debug("nodes not counted anew: %s", error)


def leaving_nodes() -> set[str]:
    """Nodes that will be taken away: their ids. (Ray tells this nowhere else than in its private state.)"""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def first_words(error: BaseException) -> str:
    """The line that says something of a chain of Ray's wrappers: the last that is not its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(ADVICE)]
    return redact(lines[-1]) if lines else type(error).__name__
