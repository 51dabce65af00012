"""This process's share in a run: what it is doing now, and who must know: the time account, the watchdog, the launcher.

A run is many sessions, one of each process that was ever started for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from pipeline.config.errors import Superseded
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.storage import Storage
from pipeline.training.accounting import Account, Kind, Ledger, Seconds
from pipeline.training.collectives import Collectives
from pipeline.training.nodes import NodeMonitor
from pipeline.training.preemption import Notice
from pipeline.training.watchdog import Allowances, Watchdog


class Session:
    """Between `with` and its end, signals give notice, the rank and its node are watched and the account is kept."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        collectives: Collectives,
        preempted: Callable[[], bool] | None = None,
        elapsed: float = 0.0,
    ):
        """`elapsed`: seconds since the session began, before there were collectives."""
        self._config = config
        self.notice = Notice(preempted)
        self._ledger = Ledger(storage, config.folder, writes=collectives.rank == 0, elapsed=elapsed)
        self._watchdog = Watchdog(collectives, storage, config.folder, _allowances(config))
        self.nodes = NodeMonitor(collectives)
        self._begun = False  # whether a stage was
        self._at_work = False  # whether this stage has done a step in this process
        self._settled = False  # whether the account knows what the run goes on from

    @property
    def account(self) -> Account:
        return self._ledger.account

    def begin_stage(self, step: int, again: bool) -> None:
        """Engine and loader are built. `again`: for a stage that went back to its last checkpoint."""
        if self._begun:  # the first stage belongs to the start or restart of the process
            self.account.enter("restart" if again else "startup")
            self._settled = not again
        self._begun, self._at_work = True, False
        self._watchdog.enter("startup", step)

    def goes_on_from(self, seconds: Seconds | None) -> None:
        """`seconds`: the account in the checkpoint or hand-over that the stage begins with, if any."""
        if not self._settled:
            self.account.goes_on_from(seconds)
        self._settled = True

    def enter(self, kind: Kind, step: int) -> None:
        """The rank begins something else; `step` is the global one. A stage starts until its first step begins."""
        self._watchdog.enter(kind, step, None if self._at_work else self._config.guards.start_seconds)
        if self._at_work or kind == "training":
            self.account.enter(kind)

    def stepped(self) -> None:
        """A step is done: from now on the usual allowances hold."""
        self._at_work = True

    @contextmanager
    def during(self, kind: Kind, step: int) -> Iterator[None]:
        """Something within a step."""
        self.enter(kind, step)
        try:
            yield
        finally:
            self.enter("training", step)

    def __enter__(self) -> Session:
        self.notice.__enter__()
        self._ledger.start()
        self._watchdog.start()
        self.nodes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nodes.close()
        self._watchdog.close()
        self._ledger.close(ended=error is None, last_word=not isinstance(error, Superseded))
        self.notice.__exit__(kind, error, trace)


def _allowances(config: RunConfig) -> Allowances:
    """Data may be waited for as long as its store may be away."""
    guards = config.guards
    used = {name for stage in config.stages for name in stage.sources}
    away = 0.0 if all(is_local(config.sources[name].shards) for name in used) else config.storage.deadline_seconds
    return {
        "startup": guards.start_seconds,
        "training": guards.hang_seconds,
        "data_wait": guards.hang_seconds + away,
        "checkpoint": guards.save_seconds,
        "evaluation": guards.evaluate_seconds,
    }
