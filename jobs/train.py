"""`mome train` and `mome demo`: train the stages of a run on Ray, evaluate the last one, and write the run's report.

Ray Train places and restarts the ranks. The driver places ranks again that stopped because a node leaves or joins,
keeps failure budgets over all restarts, and raises errors that a restart would only repeat (`jobs.distributed`).
"""

from __future__ import annotations

import json
import logging
import secrets
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs import distributed
from jobs.cluster import address_of, check_ray, connect, for_ranks, root_cause
from jobs.configs import Caller
from jobs.console import RunDisplay, notify, poll
from jobs.describe_run import as_text, describe_placement, describe_run, saved_steps
from jobs.driver import Interrupts, Mailbox
from jobs.evaluate import evaluate_checkpoint, stored_evaluation
from jobs.report import reported
from pipeline.config.errors import MomeError, RunFailed, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.evaluation.ranks import SINGLE_PROCESS
from pipeline.tracking.mlflow_server import check_server
from pipeline.training.callbacks import Progress
from pipeline.training.checkpoint.committed import is_committed
from pipeline.training.checkpoint.weights import stage_url
from pipeline.training.goodput import add_time
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import prepare

if TYPE_CHECKING:
    from jobs.placement import Restarts  # which imports Ray

log = logging.getLogger(__name__)


def run_and_evaluate(
    config: RunConfig, display: RunDisplay, remedy: str = "change `name` to start another run"
) -> dict[str, Any]:
    """Train every unfinished stage, then evaluate; return the result. `remedy` is printed if all were finished."""
    interrupts = Interrupts(config)
    with reported(config, display), interrupts.handled():
        is_trained = pretrain(config, display, interrupts)
        if not is_trained:
            notify(f"{config.folder}: every stage is finished already; {remedy}")
        if config.evaluation.source is None:
            return {"checkpoint": config.folder}
        if not is_trained and (known := stored_evaluation(config)) is not None:
            notify(f"evaluated already; `mome evaluate {shlex.quote(config.folder)}` evaluates again")
            return known
        workers = config.cluster.workers if config.cluster.gpus_per_worker else None  # on Ray if the ranks have GPUs
        # Not the ranks that a launcher's environment names: Ray's ranks have ended, and this is the driver.
        ranks, caller = SINGLE_PROCESS, Caller.of(config)
        with add_time(Storage(config.storage), config.folder, "evaluation"):
            result = evaluate_checkpoint(
                config.folder, track=True, workers=workers, caller=caller, ranks=ranks, progress=display.phase
            )
        assert result is not None
        return result


def pretrain(config: RunConfig, display: RunDisplay, interrupts: Interrupts) -> bool:
    """Run every unfinished stage; return False if all were finished. Raises MomeError, and Stopped after a signal."""
    check_ray()
    config = for_ranks(config)
    storage = Storage(config.storage)
    display.phase("checking MLflow, indexing shards, preparing the vocabulary")
    check_server(config)
    prepare(config, storage)
    weights = [stage_url(config, index) for index in range(len(config.stages))]
    if all(is_committed(storage, url) for url in weights):
        return False
    progress_url = join(config.folder, distributed.PROGRESS_FILE)
    description = describe_run(config, storage, is_prepared=True)
    describe_placement(description, config)
    notify(as_text(description, with_verdict=False))
    lost = 0
    with suppress(ValueError, TypeError, StorageError):  # no earlier start, or a file of another version
        lost = max(0, Progress(**json.loads(storage.read(progress_url))).step - description.steps_done)
    if description.steps_done or lost:
        since = f"; at least {lost:,} later steps were not saved and are trained again" if lost else ""
        notify(f"resuming from step {description.steps_done:,} of {description.steps:,}{since}")
    storage.delete(join(config.folder, distributed.FAILURE_FILE))
    storage.delete(progress_url)
    display.phase("starting Ray" if address_of(config.cluster) is None else "joining the Ray cluster")
    connect(config.cluster)
    taken = Ownership.take(storage, config.folder)
    ownership = Ownership(storage, config.folder, taken.claim)  # without the rank start, which restarts change
    mail, open_alerts = Mailbox(str(taken.start)), dict[str, str]()
    impatient, last = storage.within(5.0), Progress()  # seconds to retry a read; the next poll tries again

    def show_progress() -> None:
        """Show what is new in the progress file; rank 0 writes it, wherever it is."""
        nonlocal last
        if not impatient.exists(progress_url):
            return
        previous, last = last, Progress(**json.loads(impatient.read(progress_url)))
        metrics = replace(last, phase="")
        if last.step and metrics != replace(previous, phase=""):
            display.show(metrics)
        if last.phase and last != previous:
            display.phase(last.phase)

    display.phase(f"placing {description.ranks} rank{'s' * (description.ranks > 1)}")
    with poll(show_progress, distributed.PROGRESS_SECONDS):
        try:
            _train(config, ownership, mail, open_alerts, interrupts, display)
        finally:
            show_messages(mail, open_alerts, display.message, is_last=True)
            mail.call("del", "", True)
    _raise_failure(config, ownership)
    if unfinished := [s.name for s, url in zip(config.stages, weights, strict=True) if not is_committed(storage, url)]:
        remedy = "if this machine and the cluster's nodes do not share it, give an `output` that all of them see"
        raise RunFailed(f"the ranks ended without finishing stage {unfinished[0]} in {config.folder}; {remedy}")
    return True


def _train(
    config: RunConfig, ownership: Ownership, mail: Mailbox, open_alerts: dict[str, str], interrupts: Interrupts,
    display: RunDisplay,
) -> None:  # fmt: skip
    """Run Ray Train until the stages are finished, again after preemption, growth or a failure. Raises RunFailed."""
    import ray
    import ray.train

    from jobs.placement import FAILED, Placement, Restarts, run_on_ranks

    train: Any = ray.train  # Ray's annotations are those of Train v1
    cluster, limit = config.cluster, config.cluster.max_preemptions
    driver = f"{int(time.time()):010d}-{secrets.token_hex(2)}"
    restarts = Restarts(config.storage, join(config.folder, "restarts"), driver)
    placement = Placement(cluster, mail, display.message)

    were_placed, num_announced = False, 0

    def check() -> None:
        """Show when the ranks are placed or have ended, and why they were restarted; called every second."""
        nonlocal were_placed, num_announced
        if bool(placement.ranks) != were_placed:
            were_placed = not were_placed
            num_announced = announce_restarts(config, restarts, interrupts.storage, num_announced, display.message)
            display.phase("starting the ranks" if were_placed else "the ranks have ended")
        show_messages(mail, open_alerts, display.message)
        interrupts.check(mail, placement.ranks)

    while True:
        failures_left = cluster.max_failures - len(restarts.messages(FAILED))
        budget = train.FailureConfig(max_failures=failures_left, max_preemption_failures=-1 if limit is None else limit)
        work = partial(distributed.run_rank, claim=ownership.claim, start=mail.start)
        try:
            with interrupts.deferred():
                stopped: str | None = run_on_ranks(work, config, config.name, budget, placement, check, [restarts])
        except MomeError:
            raise
        except Exception as error:
            _raise_failure(config, ownership)
            # A failure of the controller, or of the start of the ranks, is never retried by Ray Train itself.
            if failures_left > 0 and isinstance(error, train.ControllerError | ray.exceptions.RayActorError):
                restarts.record(FAILED, f"Ray Train's controller failed: {root_cause(error)}")
                continue
            failures = f"{len(restarts.messages(FAILED))} failure(s) (cluster.max_failures: {cluster.max_failures})"
            advice = "Re-run the same command to resume."
            raise RunFailed(f"the run stopped after {failures}: {root_cause(error)}. {advice}") from error
        if stopped is None:
            return
        restarts.record(stopped, f"the ranks saved and stopped: {stopped}")
        log.warning("the ranks saved and stopped (%s); restarting them", stopped)
        if limit is not None and len(restarts.messages(distributed.PREEMPTED)) > limit:
            advice = "It is saved: re-run the same command to resume; cluster.max_preemptions sets the budget."
            raise RunFailed(f"the run stopped after {limit} preemption(s). {advice}")


def announce_restarts(
    config: RunConfig, restarts: Restarts, storage: Storage, num_announced: int, show: Callable[[str], None]
) -> int:
    """Show the causes of the restarts after failures, without the first `num_announced`; return how many are shown.

    An unavailable store delays them to the next call. After a permanent failure none is shown: the ranks start only to
    return.
    """
    from jobs.placement import FAILED

    try:
        if storage.exists(join(config.folder, distributed.FAILURE_FILE)):
            return num_announced
        failures, step = restarts.messages(FAILED, storage), saved_steps(config, storage)
    except StorageError as error:
        log.debug("restarts are shown later: %s", error)
        return num_announced
    for number, message in list(enumerate(failures, 1))[num_announced:]:
        show(f"restart {number} of at most {config.cluster.max_failures} from step {step:,}: {message}")
    return len(failures)


def _raise_failure(config: RunConfig, ownership: Ownership) -> None:
    """Raise the error that the ranks recorded as permanent, if any."""
    ownership.check()
    storage, url = Storage(config.storage), join(config.folder, distributed.FAILURE_FILE)
    if storage.exists(url):
        failure = json.loads(storage.read(url))
        raise RunFailed(failure["message"], exit_status=failure["exit_status"])


def show_messages(
    mail: Mailbox, open_alerts: dict[str, str], show: Callable[[str], None], is_last: bool = False
) -> None:
    """Show rank 0's new warnings and alerts, and with `is_last` the alerts that are not over; keep those' texts."""
    for message in mail.receive():
        show(f"error: {message['text']}" if message["level"] in ("ERROR", "CRITICAL") else message["text"])
        if message.get("over"):
            open_alerts.pop(message["alert"], None)
        elif "alert" in message:
            open_alerts[message["alert"]] = message["text"]
    for text in open_alerts.values() if is_last else ():
        show(f"alert not over: {text}")
