"""The Ray cluster a run trains on: joining it, what a rank takes of it, and how many ranks it has room for."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.schema import ClusterConfig, RunConfig

log = logging.getLogger(__name__)

KNOCK_SECONDS = 5.0
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
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RaySystemError) as error:
            raise RunFailed(
                f"cluster.address {address}: no Ray cluster answers ({error}). Start one (ray start --head), "
                "correct the address, or leave it out to run on this machine."
            ) from error
        return
    each = cluster.cpus_per_worker + cluster.loader_actors * cluster.loader_cpus
    needed = int(cluster.workers * each) + 1
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens at host:port; Ray itself would wait for minutes. Raises OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def resources_of_rank(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for each rank."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


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
    **run: Any,
) -> Any:
    """`function({"config": json, **given})` on every rank that Ray Train places; what rank 0 returned.

    `run`: more of Ray Train's RunConfig. Raises what Ray Train raises when it gives up.
    """
    import ray.train
    import ray.train.torch

    train: Any = ray.train  # its types are those of the version before

    trainer = train.torch.TorchTrainer(
        function,
        train_loop_config={"config": config.model_dump_json(), **(given or {})},
        torch_config=train.torch.TorchConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        scaling_config=scaling_of(config.cluster),
        run_config=train.RunConfig(
            # Ray Train would resume a name it knows; where a run stands is for our checkpoints to say.
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=os.path.join(tempfile.gettempdir(), "mome-ray-train"),
            **run,
        ),
    )
    return trainer.fit().return_value


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
    fits = [
        min(int(free[node].get(resource, 0.0) // amount) for resource, amount in needed.items())
        for node in staying
        if node in free
    ]
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
