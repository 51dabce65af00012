"""A run on Ray: Ray Train places the ranks and restarts them; checkpoints, data order and tracking are ours.

The driver's part. It hands the run to Ray Train and looks after what Ray leaves open: ranks that saved and stopped
because a machine goes or comes (`jobs.notice`) are placed anew, budgets are kept over all that, and an error which a
restart would only repeat (`jobs.rank`) is raised here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from jobs.cluster import connect, first_words, on_ranks
from jobs.console import notify, poll
from jobs.interrupts import Interrupts
from jobs.mailbox import Mailbox
from jobs.notice import PREEMPTED
from jobs.rank import FAILURE_FILE, PROGRESS_FILE, PROGRESS_SECONDS, error_from_json, run_rank
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.load import validate, with_absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import absolute_uri, configured_uri
from pipeline.tracking.mlflow_server import check_server
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import prepare
from pipeline.training.progress import Progress

log = logging.getLogger(__name__)

LOOK_PATIENCE_SECONDS = 5.0  # with a store that is away: the next look asks again

Show = Callable[[Progress], None]


def pretrain(config: RunConfig, show: Show, interrupts: Interrupts | None = None) -> bool:
    """Run every stage that is not finished; False when there was nothing left to do. `interrupts` hears signals.

    Raises MomeError with one message for whatever stopped the run for good, Stopped when the driver was told to end.
    """
    config = for_ranks(config)
    storage = Storage(config.storage)
    check_server(config)
    prepare(config, storage)
    if _unfinished(config, storage) is None:
        return False
    storage.delete(join(config.folder, FAILURE_FILE))
    storage.delete(join(config.folder, PROGRESS_FILE))
    connect(config.cluster)
    taken = Ownership.take(storage, config.folder)
    ownership = Ownership(storage, config.folder, taken.claim)  # whichever start of its ranks has the run
    attempt = _Attempt(config, ownership, str(taken.start), interrupts)
    with poll(_Shown(config, show).look, PROGRESS_SECONDS):
        try:
            _train(config, storage, attempt)
        finally:
            attempt.tell_alerts()
    _raise_failure(config, storage, ownership)
    unfinished = _unfinished(config, storage)
    if unfinished is not None:
        raise RunFailed(
            f"the ranks ended without finishing stage {unfinished} in {config.folder}; if this machine and the "
            "cluster's nodes do not share that folder, give an `output` that all of them see"
        )
    return True


def for_ranks(config: RunConfig) -> RunConfig:
    """The config as every rank must read it, whatever its working folder: local paths and the MLflow file absolute."""
    values = with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)
    values["tracking"] = {**values.get("tracking", {}), "uri": absolute_uri(configured_uri(config))}
    return validate(values, config.name)


def _unfinished(config: RunConfig, storage: Storage) -> str | None:
    """The first stage that has not handed over its weights."""
    names = [stage.name for stage in config.stages]
    return next((n for i, n in enumerate(names) if not is_committed(storage, stage_url(config, i))), None)


class _Attempt:
    """One start of the run, as its driver sees it while ranks are placed and run, however often."""

    def __init__(self, config: RunConfig, ownership: Ownership, start: str, interrupts: Interrupts | None):
        from jobs.placement import Placement

        self.config, self.ownership = config, ownership
        self.placement = Placement(config.cluster, start)
        self._start = start  # of this driver: its restarts share its claim, and not its messages
        self._mail, self._interrupts = Mailbox(start), interrupts
        self._alerts: dict[str, str] = {}  # those that stand

    def fit(self, restarts: Any, failures_left: int) -> str | None:
        """One run of Ray Train; returns why its ranks saved and stopped, if they did."""
        import ray.train

        train: Any = ray.train  # its types are those of the version before

        most = self.config.cluster.max_preemptions
        budgets = train.FailureConfig(max_failures=failures_left, max_preemption_failures=-1 if most is None else most)
        with self._interrupts.deferred() if self._interrupts else nullcontext():
            stopped: str | None = on_ranks(
                run_rank,
                self.config,
                self.config.name,
                given={"claim": self.ownership.claim, "start": self._start},
                placement=self.placement,
                look=self._look,
                callbacks=[restarts],
                failure_config=budgets,
            )
        return stopped

    def tell_alerts(self) -> None:
        """At the end: what the run should still be looked at for."""
        self._show_messages()
        for text in self._alerts.values():
            notify(f"alert not over: {text}", "yellow")
        self._mail.clear()

    def _look(self) -> None:
        self._show_messages()
        if self._interrupts is not None:
            self._interrupts.look(self._mail, self.placement.ranks)

    def _show_messages(self) -> None:
        """Warnings of the first rank, alerts among them."""
        for message in self._mail.take():
            notify(f"{message['level']} {message['text']}", "yellow")
            if message.get("over"):
                self._alerts.pop(message["alert"], None)
            elif "alert" in message:
                self._alerts[message["alert"]] = message["text"]


def _train(config: RunConfig, storage: Storage, attempt: _Attempt) -> None:
    """Ray Train's runs, one after the other: each ends when the ranks are done, cannot go on, or saved and stopped.

    Raises RunFailed when a budget is spent.
    """
    from jobs.restarts import FAILED, Restarts

    cluster = config.cluster
    restarts = Restarts(config)
    while True:
        left = cluster.max_failures - restarts.count(FAILED)
        try:
            stopped = attempt.fit(restarts, left)
        except MomeError:
            raise
        except Exception as error:
            _raise_failure(config, storage, attempt.ownership)
            if left > 0 and _is_of_controller(error):
                restarts.record(FAILED, first_words(error))
                log.warning("Ray Train's controller failed (%s); placing the ranks anew", first_words(error))
                continue
            raise RunFailed(
                f"the run stopped after {restarts.count(FAILED)} failure(s), of which cluster.max_failures excuses "
                f"{cluster.max_failures}: {first_words(error)}. Run the same command to go on from the last checkpoint."
            ) from error
        if stopped is None:
            return
        restarts.record(stopped, f"the ranks saved and stopped: {stopped}")
        log.warning("the ranks saved and stopped (%s); placing them anew", stopped)
        if cluster.max_preemptions is not None and restarts.count(PREEMPTED) > cluster.max_preemptions:
            raise RunFailed(
                f"the run stopped after {cluster.max_preemptions} preemption(s). It is saved: run the same command to "
                "go on from there; cluster.max_preemptions sets the budget."
            )


def _is_of_controller(error: Exception) -> bool:
    """Whether Ray Train gave up over its own process or its start of the ranks, which it never tries again itself."""
    import ray
    import ray.train

    train: Any = ray.train
    return isinstance(error, train.ControllerError | ray.exceptions.RayActorError)


def _raise_failure(config: RunConfig, storage: Storage, ownership: Ownership) -> None:
    """What ended the ranks for good, if anything did."""
    ownership.check()
    url = join(config.folder, FAILURE_FILE)
    if storage.exists(url):
        raise error_from_json(json.loads(storage.read(url)))


class _Shown:
    """The progress file of a run as the driver shows it, wherever its ranks are."""

    def __init__(self, config: RunConfig, show: Show):
        self._url = join(config.folder, PROGRESS_FILE)
        deadline = min(LOOK_PATIENCE_SECONDS, config.storage.retry_timeout_seconds)
        self._storage = Storage(config.storage.model_copy(update={"retry_timeout_seconds": deadline}))
        self._show = show
        self._seen: bytes = b""

    def look(self) -> None:
        if not self._storage.exists(self._url):
            return
        data = self._storage.read(self._url)
        if data != self._seen:
            self._seen = data
            self._show(Progress(**json.loads(data)))
