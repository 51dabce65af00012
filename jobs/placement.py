"""Run a function on ranks placed by Ray Train, whose controller, a process of its own, calls the two callbacks."""

import json
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import ray
import ray.train.torch
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from jobs import cluster as resources
from jobs.console import notify
from jobs.driver import NUM_PLACED, Mailbox
from pipeline.config.background import in_background
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig, RunConfig, StorageConfig
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
QUIET_SECONDS = 10.0  # before the first message about waiting ranks, and between two messages
REMEDY = "`mome doctor --config CONFIG` compares the two."
FAILED = "failed"


@dataclass(eq=False)
class PlacementCallback(WorkerGroupCallback):
    """Ray Train callback that reports the number of running ranks to the driver."""

    mail: Mailbox

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.mail.put(NUM_PLACED, len(worker_group.get_workers()))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self.mail.put(NUM_PLACED, 0)

    # The message of the shutdown may be lost, and a failed start has no shutdown.
    before_worker_group_start = before_worker_group_shutdown  # type: ignore[assignment]


@dataclass
class Placement:
    """The driver's view of where its ranks are, over all restarts of one start of a run."""

    cluster: ClusterConfig
    mail: Mailbox
    show: Callable[[str], None] = notify
    clock: Callable[[], float] = time.monotonic
    ranks: int = field(default=0, init=False)  # that run
    _were_placed: bool = field(default=False, init=False)  # lost nodes may come back
    _waiting_since: float | None = field(default=None, init=False)
    _last_message: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Prepare for ranks to be placed. Raises RunFailed if a local Ray can never place them."""
        self.mail.put(NUM_PLACED, 0)
        self.ranks, self._waiting_since, self._last_message = 0, self.clock(), None
        is_local, nodes = resources.address_of(self.cluster) is None, list(usable_nodes().values())
        if is_local and (missing := resources.missing_resources(self.cluster, nodes)):
            raise RunFailed(f"{missing}. {REMEDY}")

    def check(self) -> None:
        """Update `ranks` and report waiting ranks; call it every second. Raises RunFailed if they waited too long."""
        cluster, placed = self.cluster, self.mail.get(NUM_PLACED)
        if placed is None:
            return
        if ranks := int(placed):
            if self._last_message is not None and not self.ranks:
                self.show(f"{ranks} of {cluster.workers} workers placed")
            self.ranks, self._were_placed, self._waiting_since, self._last_message = ranks, True, None, None
            return
        self.ranks, now = 0, self.clock()
        if self._waiting_since is None:
            self._waiting_since = now
        nodes, waited = list(usable_nodes().values()), now - self._waiting_since
        missing = resources.missing_resources(cluster, nodes)
        if missing and waited > cluster.start_seconds and not self._were_placed:
            limits = None
            with suppress(Exception):  # an autoscaler may add enough nodes
                limits = ray_state.get_max_resources_from_cluster_config()
            fewest = resources.requested_resources(cluster, cluster.min_workers or cluster.workers)
            if limits is None or any(limits.get(kind, 0) < number for kind, number in fewest.items()):
                advice = f"{REMEDY} Set cluster.start_seconds higher where nodes take longer to join."
                raise RunFailed(f"{missing}; none came in {waited:.0f} s. {advice}")
        last = self._waiting_since if self._last_message is None else self._last_message
        if not (missing and self._last_message is None) and now - last < QUIET_SECONDS:
            return
        self._last_message = now
        free: dict[str, float] = {}
        with suppress(Exception):  # the head may not answer
            free = ray.available_resources()
        lacking, present = [], []  # descriptions of what the cluster is too small for, and of what it has
        for kind, number in resources.requested_resources(cluster, cluster.workers).items():
            existing = sum(node.get(kind, 0.0) for node in nodes)
            text = f"{resources.quantity(number, kind)} requested, {existing:g} in the cluster"
            lacking += [text] * (number > existing)
            present.append(f"{text}, {free.get(kind, 0.0):g} free")
        self.show(f"waiting: 0 of {cluster.workers} workers placed; {'; '.join(lacking or present)}")


@dataclass(eq=False)
class Restarts(UserCallback):
    """Record of all restarts since a driver started: failures by Ray Train's controller, others by the driver."""

    config: StorageConfig  # each call opens the storage again, because its secrets may have been rotated
    folder: str  # of the records of all drivers of the run
    driver: str  # begins the names of this driver's records

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record a failure of the worker group; called by Ray Train's controller."""
        try:
            causes = {rank: resources.root_cause(error) for rank, error in sorted(worker_exceptions.items())}
            # The errors of the other ranks are those of their connections to a rank that died.
            dead = {rank: cause for rank, cause in causes.items() if cause.startswith(tuple(resources.DEATHS.values()))}
            self.record(FAILED, "; ".join(f"rank {rank}: {cause}" for rank, cause in (dead or causes).items()))
        except Exception as error:  # a missing record must not prevent the restart
            log.warning("restart not recorded: %s", error)
        refresh_node_counts()  # the ranks must not be placed on a node that was lost

    def record(self, cause: str, message: str) -> None:
        """Record a restart (time in seconds since 1970) whose `cause` is failed, preempted or grown."""
        restart = {"time": time.time(), "cause": cause, "message": message[:400]}
        url = join(self.folder, f"{self.driver}-{time.time_ns():020d}.json")
        Storage(self.config).write(url, json.dumps(restart).encode())

    def messages(self, cause: str, storage: Storage | None = None) -> list[str]:
        """Return the messages of the restarts with this cause since the driver started, oldest first."""
        storage = storage or Storage(self.config)
        names = sorted(name for name in storage.list(self.folder) if name.startswith(self.driver))
        records = [json.loads(storage.read(join(self.folder, name))) for name in names]
        return [record["message"] for record in records if record["cause"] == cause]


def run_on_ranks(
    function: Callable[[str], Any], config: RunConfig, name: str, budget: Any = None,
    placement: Placement | None = None, check: Callable[[], None] = lambda: None, callbacks: Sequence[Any] = (),
) -> Any:  # fmt: skip
    """Run `function(config as JSON)` on every rank that Ray Train places; return rank 0's result.

    `budget` is Ray Train's FailureConfig (None: no retries). `check` is called every second while the ranks run, and
    may raise to end the run. Raises Ray Train's error when it gives up, and RunFailed if the ranks can never be placed.
    """
    train, cluster = cast(Any, ray.train), config.cluster  # Ray's annotations are those of Train v1
    placement = placement or Placement(cluster, Mailbox(secrets.token_hex(8)))
    placement.start()
    # Ray also counts nodes that are being drained, where it can place nothing, so they are subtracted here.
    refresh_node_counts()
    minimum, maximum = cluster.min_workers or cluster.workers, cluster.workers
    if minimum < maximum and ray_state.get_draining_nodes():
        maximum = min(maximum, max(minimum, available_ranks(cluster, occupied=False)))
    with tempfile.TemporaryDirectory(prefix="mome-ray-train-", ignore_cleanup_errors=True) as folder:
        trainer = train.torch.TorchTrainer(
            partial(function, config.model_dump_json()),
            torch_config=train.torch.TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=maximum if minimum == cluster.workers else (minimum, maximum),
                use_gpu=bool(cluster.gpus_per_worker),
                resources_per_worker=resources.rank_resources(cluster),
                placement_strategy=cluster.placement.upper(),
                # Ray's own growth restarts from the last checkpoint at any moment; ours (jobs.distributed) saves first.
                elastic_resize_monitor_interval_s=1e9,
            ),
            run_config=train.RunConfig(
                # Ray Train would resume a known name; our own checkpoints determine where a run resumes.
                name=f"{name}-{secrets.token_hex(4)}",
                storage_path=folder,
                callbacks=[*callbacks, PlacementCallback(placement.mail)],
                failure_config=budget,
            ),
        )
        result = in_background(trainer.fit, "Ray Train")  # this thread checks the ranks and handles signals
        try:
            while not wait([result], CHECK_SECONDS).done:
                placement.check()
                check()
        except BaseException:
            ray.shutdown()
            wait([result], CHECK_SECONDS)
            raise
        return result.result().return_value


def usable_nodes() -> dict[str, resources.Resources]:
    """Return the resources of each node that is alive and not being drained, by node id."""
    draining = ray_state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return {node["NodeID"]: node["Resources"] for node in nodes}


def available_ranks(cluster: ClusterConfig, occupied: bool = True) -> int:
    """Return how many ranks fit on the usable nodes: in their free resources, or in all of them if not `occupied`."""
    needed = resources.rank_resources(cluster)
    if cluster.loader_resource is None:
        needed["CPU"] += cluster.loader_actors * cluster.loader_cpus
    usable = usable_nodes()
    free = available_resources_per_node() if occupied else usable
    return sum(resources.ranks_on_node(free[node], needed) for node in usable if node in free)


def refresh_node_counts() -> None:
    """Make Ray Train recount the nodes' resources, which it otherwise does every 20 s."""
    with suppress(Exception):  # it does not exist before the first run, and an old count costs only time
        counter = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(counter.get_reserved_resources.remote("", recompute=True), timeout=5.0)
