"""A run on Ray: Ray Train places the ranks and restarts them; checkpoints, data order and tracking are ours.

The driver's part. It hands the run to Ray Train and handles what Ray leaves open: ranks that saved and stopped because
a node leaves or joins are placed again, failure budgets hold over all of these restarts, and an error that a restart
would only repeat (`jobs.rank`) is raised here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from jobs.cluster import connect, root_cause, run_on_ranks
from jobs.console import notify, poll
from jobs.interrupts import Interrupts
from jobs.mailbox import Mailbox
from jobs.rank import FAILURE_FILE, PREEMPTED, PROGRESS_FILE, PROGRESS_SECONDS, error_from_json, run_rank
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

PROGRESS_RETRY_SECONDS = 5.0  # per read of the progress file; the next poll tries again

Show = Callable[[Progress], None]


def pretrain(config: RunConfig, show: Show, interrupts: Interrupts | None = None) -> bool:
    """Run every unfinished stage; return False if all were finished. `interrupts` handles signals.

    Raises MomeError with one message for what ended the run, Stopped when a signal ended the driver.
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
    ownership = Ownership(storage, config.folder, taken.claim)  # without the rank start, which restarts change
    attempt = _Attempt(config, ownership, str(taken.start), interrupts)
    with poll(_ProgressReader(config, show).update, PROGRESS_SECONDS):
        try:
            _train(config, storage, attempt)
        finally:
            attempt.report_alerts()
    _raise_failure(config, storage, ownership)
    unfinished = _unfinished(config, storage)
    if unfinished is not None:
        raise RunFailed(
            f"the ranks ended without finishing stage {unfinished} in {config.folder}; if this machine and the "
            "cluster's nodes do not share that folder, give an `output` that all of them see"
        )
    return True


def for_ranks(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths and MLflow file, for ranks in any working folder."""
    values = with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)
    values["tracking"] = {**values.get("tracking", {}), "uri": absolute_uri(configured_uri(config))}
    return validate(values, config.name)


def _unfinished(config: RunConfig, storage: Storage) -> str | None:
    """Return the first stage without final weights; None if all are finished."""
    names = [stage.name for stage in config.stages]
    return next((n for i, n in enumerate(names) if not is_committed(storage, stage_url(config, i))), None)


class _Attempt:
    """One start of the run, over all restarts of its ranks."""

    def __init__(self, config: RunConfig, ownership: Ownership, start: str, interrupts: Interrupts | None):
        from jobs.placement import Placement

        self.config, self.ownership = config, ownership
        self.placement = Placement(config.cluster, start)
        self._start = start  # identifies the messages of this driver and its ranks
        self._mail, self._interrupts = Mailbox(start), interrupts
        self._alerts: dict[str, str] = {}  # alerts that are not over

    def fit(self, restarts: Any, failures_left: int) -> str | None:
        """Run Ray Train once; return why its ranks saved and stopped, or None if they finished."""
        import ray.train

        train: Any = ray.train  # Ray's annotations are those of Train v1

        limit = self.config.cluster.max_preemptions
        budgets = train.FailureConfig(
            max_failures=failures_left, max_preemption_failures=-1 if limit is None else limit
        )
        with self._interrupts.deferred() if self._interrupts else nullcontext():
            stopped: str | None = run_on_ranks(
                run_rank,
                self.config,
                self.config.name,
                arguments={"claim": self.ownership.claim, "start": self._start},
                placement=self.placement,
                check=self._check,
                callbacks=[restarts],
                failure_config=budgets,
            )
        return stopped

    def report_alerts(self) -> None:
        """Print the alerts that were not over at the end of the run."""
        self._show_messages()
        for text in self._alerts.values():
            notify(f"alert not over: {text}", "yellow")
        self._mail.clear()

    def _check(self) -> None:
        self._show_messages()
        if self._interrupts is not None:
            self._interrupts.check(self._mail, self.placement.ranks)

    def _show_messages(self) -> None:
        """Print the warnings and alerts of rank 0."""
        for message in self._mail.receive():
            notify(f"{message['level']} {message['text']}", "yellow")
            if message.get("over"):
                self._alerts.pop(message["alert"], None)
            elif "alert" in message:
                self._alerts[message["alert"]] = message["text"]


def _train(config: RunConfig, storage: Storage, attempt: _Attempt) -> None:
    """Run Ray Train until the stages are finished: again after preemption, growth or a failure of its controller.

    Raises RunFailed when a failure budget is exhausted.
    """
    from jobs.placement import FAILED, Restarts

    cluster = config.cluster
    restarts = Restarts(config)
    while True:
        failures_left = cluster.max_failures - restarts.count(FAILED)
        try:
            stopped = attempt.fit(restarts, failures_left)
        except MomeError:
            raise
        except Exception as error:
            _raise_failure(config, storage, attempt.ownership)
            if failures_left > 0 and _is_of_controller(error):
                restarts.record(FAILED, root_cause(error))
                log.warning("Ray Train's controller failed (%s); restarting the ranks", root_cause(error))
                continue
            raise RunFailed(
                f"the run stopped after {restarts.count(FAILED)} failure(s) (cluster.max_failures: "
                f"{cluster.max_failures}): {root_cause(error)}. Re-run the same command to resume."
            ) from error
        if stopped is None:
            return
        restarts.record(stopped, f"the ranks saved and stopped: {stopped}")
        log.warning("the ranks saved and stopped (%s); restarting them", stopped)
        if cluster.max_preemptions is not None and restarts.count(PREEMPTED) > cluster.max_preemptions:
            raise RunFailed(
                f"the run stopped after {cluster.max_preemptions} preemption(s). It is saved: re-run the same command "
                "to resume; cluster.max_preemptions sets the budget."
            )


def _is_of_controller(error: Exception) -> bool:
    """Return whether Ray Train's controller or the start of its ranks failed, which it never retries itself."""
    import ray
    import ray.train

    train: Any = ray.train
    return isinstance(error, train.ControllerError | ray.exceptions.RayActorError)


def _raise_failure(config: RunConfig, storage: Storage, ownership: Ownership) -> None:
    """Raise the error that the ranks recorded as permanent, if any."""
    ownership.check()
    url = join(config.folder, FAILURE_FILE)
    if storage.exists(url):
        raise error_from_json(json.loads(storage.read(url)))


class _ProgressReader:
    """Reader of a run's progress file, which the driver displays wherever the ranks are."""

    def __init__(self, config: RunConfig, show: Show):
        self._url = join(config.folder, PROGRESS_FILE)
        deadline = min(PROGRESS_RETRY_SECONDS, config.storage.retry_timeout_seconds)
        self._storage = Storage(config.storage.model_copy(update={"retry_timeout_seconds": deadline}))
        self._show = show
        self._last: bytes = b""

    def update(self) -> None:
        if not self._storage.exists(self._url):
            return
        data = self._storage.read(self._url)
        if data != self._last:
            self._last = data
            self._show(Progress(**json.loads(data)))
