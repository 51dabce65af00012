"""A run on Ray: Ray Train places the ranks and restarts them; checkpoints, data order and tracking are ours.

The driver's part. It hands the run to Ray Train and looks after what Ray leaves open: ranks that saved and stopped
because a machine goes or comes (`jobs.notice`) are placed anew, budgets are kept over all that, and an error which a
restart would only repeat (`jobs.rank`) is raised here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from jobs.cluster import connect, on_ranks
from jobs.console import repeatedly
from jobs.notice import PREEMPTED
from jobs.rank import FAILURE_FILE, PROGRESS_FILE, PROGRESS_SECONDS, as_error, run_rank
from pipeline.config.errors import RunFailed
from pipeline.config.load import validate
from pipeline.config.paths import with_absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.tracking.places import absolute_uri, named_uri
from pipeline.tracking.server import check_server
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import prepare
from pipeline.training.progress import Progress

log = logging.getLogger(__name__)

Show = Callable[[Progress], None]


def pretrain(config: RunConfig, show: Show) -> bool:
    """Run every stage that is not finished; False when there was nothing left to do.

    Raises MomeError with one message for whatever stopped the run for good.
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
    ownership = Ownership.take(storage, config.folder)
    with repeatedly(_Shown(config, storage, show).look, PROGRESS_SECONDS):
        _train(config, storage, ownership)
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
    values["tracking"] = {**values.get("tracking", {}), "uri": absolute_uri(named_uri(config))}
    return validate(values, config.name)


def _unfinished(config: RunConfig, storage: Storage) -> str | None:
    """The first stage that has not handed over its weights."""
    names = [stage.name for stage in config.stages]
    return next((n for i, n in enumerate(names) if not is_committed(storage, stage_url(config, i))), None)


def _train(config: RunConfig, storage: Storage, ownership: Ownership) -> None:
    """Ray Train's runs, one after the other: each ends when the ranks are done, cannot go on, or saved and stopped.

    Raises RunFailed when a budget is spent.
    """
    from jobs.restarts import FAILED, Restarts, first_words

    cluster = config.cluster
    restarts = Restarts(config)
    while True:
        left = cluster.max_failures - restarts.count(FAILED)
        try:
            stopped = _fit(config, restarts, left, ownership.claim)
        except Exception as error:
            _raise_failure(config, storage, ownership)
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


def _fit(config: RunConfig, restarts: Any, failures_left: int, claim: str) -> str | None:
    """One run of Ray Train; returns why its ranks saved and stopped, if they did."""
    import ray.train

    train: Any = ray.train  # its types are those of the version before

    most = config.cluster.max_preemptions
    budgets = train.FailureConfig(max_failures=failures_left, max_preemption_failures=-1 if most is None else most)
    stopped: str | None = on_ranks(
        run_rank, config, config.name, given={"claim": claim}, failure_config=budgets, callbacks=[restarts]
    )
    return stopped


def _raise_failure(config: RunConfig, storage: Storage, ownership: Ownership) -> None:
    """What ended the ranks for good, if anything did."""
    ownership.check()
    url = join(config.folder, FAILURE_FILE)
    if storage.exists(url):
        raise as_error(json.loads(storage.read(url)))


class _Shown:
    """The progress file of a run as the driver shows it, wherever its ranks are."""

    def __init__(self, config: RunConfig, storage: Storage, show: Show):
        self._url = join(config.folder, PROGRESS_FILE)
        self._storage, self._show = storage, show
        self._seen: bytes = b""

    def look(self) -> None:
        if not self._storage.exists(self._url):
            return
        data = self._storage.read(self._url)
        if data != self._seen:
            self._seen = data
            self._show(Progress(**json.loads(data)))
