"""Placing a run's ranks: what they ask for is compared with what the cluster has, and whoever waits is told why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from jobs.cluster import address_of, staying_nodes
from jobs.console import notify
from jobs.mailbox import Mailbox
from jobs.resources import lacking, offered, plural, requested
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0  # that placing may take before it is spoken of, and between two lines about it
REMEDY = "`mome doctor --config CONFIG` compares the two."

Resources = Mapping[str, float]


class Placed(WorkerGroupCallback):
    """Tells the driver, from Ray Train's controller, whether the ranks run."""

    def __init__(self, start: str):
        self._start = start

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        Mailbox(self._start).say_placed(0)

    def after_worker_group_start(self, worker_group: Any) -> None:
        Mailbox(self._start).say_placed(len(worker_group.get_workers()))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        Mailbox(self._start).say_placed(0)


class Placement:
    """The driver's view of its ranks' places, over all that is placed of one start of a run."""

    def __init__(self, cluster: ClusterConfig, start: str, clock: Callable[[], float] = time.monotonic):
        self.callback = Placed(start)
        self._cluster, self._mail, self._clock = cluster, Mailbox(start), clock
        self._local = address_of(cluster) is None
        self._were_placed = False  # ever: nodes that were there may come back
        self._since: float | None = None
        self._said: float | None = None
        self.ranks = 0

    def begin(self) -> None:
        """Before ranks are placed. Raises RunFailed where there will never be room for them."""
        self._mail.say_placed(0)
        self.ranks, self._since, self._said = 0, self._clock(), None
        if self._local and (lacks := lacking(self._cluster, staying_nodes())):
            raise RunFailed(f"{lacks[0]}. {REMEDY}")

    def look(self) -> None:
        """Every second or so until the ranks end. Raises RunFailed when they have waited in vain."""
        ranks = self._mail.placed()
        if ranks is None:
            return
        if ranks:
            if self._said is not None and not self.ranks:
                notify(f"{ranks} of {self._cluster.workers} workers placed")
            self.ranks, self._were_placed, self._since, self._said = ranks, True, None, None
            return
        self.ranks = 0
        if self._since is None:
            self._since = self._clock()
        self._wait(staying_nodes(), self._clock() - self._since)

    def _wait(self, nodes: Sequence[Resources], waited: float) -> None:
        lacks = lacking(self._cluster, nodes)
        if lacks and waited > self._cluster.start_seconds and not self._were_placed and not _may_grow(self._cluster):
            raise RunFailed(
                f"{lacks[0]}; none came in {waited:.0f} s. {REMEDY} Set cluster.start_seconds higher where nodes "
                "take longer to join."
            )
        last = self._since if self._said is None else self._said
        if (lacks and self._said is None) or self._clock() - (last or 0.0) >= QUIET_SECONDS:
            self._said = self._clock()
            notify(waiting_line(self._cluster, nodes, _free()))


def waiting_line(cluster: ClusterConfig, nodes: Iterable[Resources], free: Resources) -> str:
    """Return what a run that waits for its ranks says: what they ask for, and how much of it there is."""
    asked, has = requested(cluster, cluster.workers), offered(nodes)
    short = {kind: number for kind, number in asked.items() if number > has.get(kind, 0.0)}
    told = [
        f"{number:g} {plural(kind, number)} requested, {has.get(kind, 0.0):g} in the cluster"
        + (f", {free.get(kind, 0.0):g} free" if has.get(kind, 0.0) >= number else "")
        for kind, number in (short or asked).items()
    ]
    return f"waiting: 0 of {cluster.workers} workers placed; {'; '.join(told)}"


def _may_grow(cluster: ClusterConfig) -> bool:
    """Whether an autoscaler can bring enough nodes."""
    most, asked = _most(), requested(cluster, cluster.min_workers or cluster.workers)
    return most is not None and all(most.get(kind, 0) >= number for kind, number in asked.items())


def _most() -> Resources | None:
    """Return what the cluster's autoscaler may bring it to; None without one."""
    from ray._private.state import state

    try:
        most: Resources | None = state.get_max_resources_from_cluster_config()
    except Exception as error:
        log.debug("the autoscaler's limits are not known: %s", error)
        return None
    return most


def _free() -> dict[str, float]:
    import ray

    try:
        return dict(ray.available_resources())
    except Exception as error:
        log.debug("free resources not known: %s", error)
        return {}
