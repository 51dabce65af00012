"""Why a healthy group of ranks should save and stop: a node of theirs is about to be taken away, more would fit, or the
driver was told to end.

Each rank asks its own `Notice` at every step; the training loop makes the ranks agree. Ray's public question,
`ray.train.get_preemption_info()`, is a barrier among the ranks, too dear for every step; what it would share lies in
each rank's own context already, where Ray's watcher puts it.
"""

from __future__ import annotations

import logging
import threading
import time

from jobs.cluster import room
from jobs.mailbox import Mailbox
from pipeline.config.schema import ClusterConfig

log = logging.getLogger(__name__)

PREEMPTED, GROWN, STOPPED = "preempted", "grown", "stopped"
LOOK_SECONDS = 1.0


class Notice:
    """Asked whether to stop, of one rank. `reason` is why, once it said so."""

    def __init__(self, cluster: ClusterConfig, rank: int, world_size: int, mail: Mailbox):
        self.reason: str | None = STOPPED if rank == 0 and mail.asked_to_stop() else None
        self._cluster, self._mail = cluster, mail
        self._wanted = cluster.workers - world_size
        self._stop = threading.Event()
        if rank == 0 and self.reason is None:
            threading.Thread(target=self._watch, name="notice", daemon=True).start()

    def __call__(self) -> bool:
        if self.reason is None and _is_leaving():
            self.reason = PREEMPTED
        return self.reason is not None

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        """What the driver was told, and whether more ranks would fit."""
        since: float | None = None
        while not self._stop.wait(LOOK_SECONDS):
            if self._mail.asked_to_stop():
                self.reason = STOPPED
                return
            fits = self._fitting() if self._wanted > 0 else 0
            since = (since or time.monotonic()) if fits > 0 else None
            if since and time.monotonic() - since >= self._cluster.grow_seconds:
                log.warning("there is room for %d more rank(s): saving, to restart with them", min(fits, self._wanted))
                self.reason = GROWN
                return

    def _fitting(self) -> int:
        try:
            return room(self._cluster)
        except Exception as error:  # the head may be away for a while: it is asked again
            log.warning("cannot tell whether more ranks would fit: %s", error)
            return 0


def _is_leaving() -> bool:
    """Whether Ray's watcher has told this rank that a node of the group will be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
