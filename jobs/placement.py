"""Placement and restarts of a run's ranks: why ranks wait, whether they can ever fit, and a record of every restart.

Ray Train calls the two callbacks in its controller, a process of its own.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from jobs.cluster import address_of, refresh_node_counts, root_cause, usable_nodes
from jobs.console import notify
from jobs.mailbox import Mailbox
from jobs.resources import missing_resources, plural, requested_resources, total_resources
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0  # before the first message about waiting ranks, and between two messages
REMEDY = "`mome doctor --config CONFIG` compares the two."
RESTARTS_FOLDER = "restarts"
FAILED = "failed"
MAX_MESSAGE = 400  # characters of an error that are recorded

Resources = Mapping[str, float]


class PlacementCallback(WorkerGroupCallback):
    """Ray Train callback that reports the number of running ranks to the driver."""

    def __init__(self, start: str):
        self._start = start

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        Mailbox(self._start).set_num_placed(0)

    def after_worker_group_start(self, worker_group: Any) -> None:
        Mailbox(self._start).set_num_placed(len(worker_group.get_workers()))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        Mailbox(self._start).set_num_placed(0)


class Placement:
    """The driver's view of where its ranks are, over all restarts of one start of a run."""

    def __init__(self, cluster: ClusterConfig, start: str, clock: Callable[[], float] = time.monotonic):
        self.callback = PlacementCallback(start)
        self._cluster, self._mail, self._clock = cluster, Mailbox(start), clock
        self._is_local = address_of(cluster) is None
        self._were_placed = False  # lost nodes may come back
        self._waiting_since: float | None = None
        self._last_message: float | None = None
        self.ranks = 0

    def start(self) -> None:
        """Prepare for ranks to be placed. Raises RunFailed if a local Ray can never place them."""
        self._mail.set_num_placed(0)
        self.ranks, self._waiting_since, self._last_message = 0, self._clock(), None
        if self._is_local and (missing := missing_resources(self._cluster, usable_nodes())):
            raise RunFailed(f"{missing[0]}. {REMEDY}")

    def check(self) -> None:
        """Update `ranks` and report waiting ranks; call it every second. Raises RunFailed if they waited too long."""
        ranks = self._mail.num_placed()
        if ranks is None:
            return
        if ranks:
            if self._last_message is not None and not self.ranks:
                notify(f"{ranks} of {self._cluster.workers} workers placed")
            self.ranks, self._were_placed, self._waiting_since, self._last_message = ranks, True, None, None
            return
        self.ranks = 0
        if self._waiting_since is None:
            self._waiting_since = self._clock()
        nodes, waited = usable_nodes(), self._clock() - self._waiting_since
        missing = missing_resources(self._cluster, nodes)
        if missing and waited > self._cluster.start_seconds and not self._were_placed and not _may_grow(self._cluster):
            raise RunFailed(
                f"{missing[0]}; none came in {waited:.0f} s. {REMEDY} Set cluster.start_seconds higher where nodes "
                "take longer to join."
            )
        last = self._waiting_since if self._last_message is None else self._last_message
        if (missing and self._last_message is None) or self._clock() - last >= QUIET_SECONDS:
            self._last_message = self._clock()
            notify(waiting_message(self._cluster, nodes, _free_resources()))


def waiting_message(cluster: ClusterConfig, nodes: Iterable[Resources], free: Resources) -> str:
    """Return the message of a run that waits for its ranks: requested, existing and free resources."""
    requested, existing = requested_resources(cluster, cluster.workers), total_resources(nodes)
    missing = {kind: number for kind, number in requested.items() if number > existing.get(kind, 0.0)}
    parts = [
        f"{number:g} {plural(kind, number)} requested, {existing.get(kind, 0.0):g} in the cluster"
        + (f", {free.get(kind, 0.0):g} free" if existing.get(kind, 0.0) >= number else "")
        for kind, number in (missing or requested).items()
    ]
    return f"waiting: 0 of {cluster.workers} workers placed; {'; '.join(parts)}"


def _may_grow(cluster: ClusterConfig) -> bool:
    """Return whether an autoscaler can add enough nodes."""
    limits = _autoscaler_limits()
    requested = requested_resources(cluster, cluster.min_workers or cluster.workers)
    return limits is not None and all(limits.get(kind, 0) >= number for kind, number in requested.items())


def _autoscaler_limits() -> Resources | None:
    from ray._private.state import state

    try:
        limits: Resources | None = state.get_max_resources_from_cluster_config()
    except Exception as error:
        log.debug("the autoscaler's limits are not known: %s", error)
        return None
    return limits


def _free_resources() -> dict[str, float]:
    import ray

    try:
        return dict(ray.available_resources())
    except Exception as error:
        log.debug("free resources not known: %s", error)
        return {}


@dataclass(frozen=True)
class Restart:
    """A restart of all ranks from a checkpoint."""

    time: float  # seconds since 1970
    cause: str  # failed, preempted or grown
    message: str


class Restarts(UserCallback):
    """Record of the restarts since this driver started, in the run's folder.

    Ray Train's controller records failures; the driver records ranks that saved and stopped.
    """

    def __init__(self, config: RunConfig):
        self._config = config.model_dump_json()
        self._url = join(config.folder, RESTARTS_FOLDER)
        self._session = f"{int(time.time()):010d}-{secrets.token_hex(2)}"

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record a failure of the worker group; called by Ray Train's controller."""
        try:
            errors = sorted(worker_exceptions.items())
            self.record(FAILED, "; ".join(f"rank {rank}: {root_cause(error)}" for rank, error in errors))
        except Exception as error:  # a missing record must not prevent the restart
            log.warning("restart not recorded: %s", error)
        refresh_node_counts()  # the ranks must not be placed on a node that was lost

    def record(self, cause: str, message: str) -> None:
        data = json.dumps(asdict(Restart(time.time(), cause, message[:MAX_MESSAGE]))).encode()
        self._storage().write(join(self._url, f"{self._session}-{time.time_ns():020d}.json"), data)

    def list(self) -> list[Restart]:
        """Return the restarts since this driver started, oldest first."""
        storage = self._storage()
        names = sorted(name for name in storage.list(self._url) if name.startswith(self._session))
        return [Restart(**json.loads(storage.read(join(self._url, name)))) for name in names]

    def count(self, cause: str) -> int:
        return sum(restart.cause == cause for restart in self.list())

    def _storage(self) -> Storage:
        return Storage(RunConfig.model_validate_json(self._config).storage)
