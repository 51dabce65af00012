"""Function that Ray Train runs on each worker: this rank's part of the run, and its reports to the driver.

An error that a restart would only repeat (config, data or checkpoint fault, NaN, out of memory) is written to the run's
folder; after the restart every rank sees it and returns, and the driver raises it. Ray Train itself retries every
exception, whatever its kind.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from jobs.cluster import available_ranks
from jobs.mailbox import Mailbox, forwarded_warnings
from pipeline.config.errors import MomeError, Preempted, RunFailed, StorageError, Superseded
from pipeline.config.redaction import configure_logging, redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.loading.backends import BackendFactory, local_backend
from pipeline.data.storage import Storage, join
from pipeline.training.background_writer import DEADLINE_SECONDS, BackgroundWriter
from pipeline.training.health import is_out_of_memory
from pipeline.training.loop import train
from pipeline.training.ownership import Ownership
from pipeline.training.progress import Progress

log = logging.getLogger(__name__)

FAILURE_FILE, PROGRESS_FILE = "failure.json", "progress.json"
PROGRESS_SECONDS = 1.0
PROGRESS_CLOSE_SECONDS = 5.0  # for the last progress file to be written
PREEMPTED, GROWN, STOPPED = "preempted", "grown", "stopped"
CHECK_SECONDS = 1.0


def run_rank(loop_config: dict[str, str]) -> str | None:
    """Train; return why the ranks saved and stopped before the end (preempted, grown or stopped), or None."""
    import ray.train

    configure_logging()
    config = RunConfig.model_validate_json(loop_config["config"])
    storage = Storage(config.storage)
    ownership = Ownership(storage, config.folder, loop_config["claim"])
    if storage.exists(join(config.folder, FAILURE_FILE)) or not ownership.holds():
        return None
    context, mail = ray.train.get_context(), Mailbox(loop_config["start"])
    signal = RankPreemptionSignal(config.cluster, context.get_world_rank(), context.get_world_size(), mail)
    progress = ProgressFile(config, storage)
    with forwarded_warnings(mail) if context.get_world_rank() == 0 else nullcontext():
        try:
            train(config, progress, loader_backend(config), preempted=signal, claim=ownership.claim)
        except Preempted as error:
            log.warning("%s", error)
            return signal.reason or PREEMPTED
        except Exception as error:
            failure = _permanent_failure(error)
            if failure is not None and ownership.holds():
                storage.write(join(config.folder, FAILURE_FILE), json.dumps(failure).encode())
            raise
        finally:
            progress.close()
            signal.close()
    return None


def loader_backend(config: RunConfig) -> BackendFactory:
    """Return the backend that builds this rank's batches: its own processes, or Ray actors."""
    if not config.cluster.loader_actors:
        return local_backend
    from jobs.loader_actors import RayBackend

    return RayBackend


def _permanent_failure(error: Exception) -> dict[str, Any] | None:
    """Return the JSON of an error that a restart would only repeat; None for one that a restart may resolve."""
    if is_out_of_memory(error):
        message = f"out of memory: {redact(str(error))}. Set engine.micro_batch_size lower, or engine.zero_stage higher"
        return {"message": f"{message}.", "exit_status": 1}
    if isinstance(error, MomeError) and not isinstance(error, StorageError | Superseded):
        return error_json(error)
    return None


def error_json(error: MomeError) -> dict[str, Any]:
    """Return an error as JSON, to be raised by the driver."""
    return {"message": str(error), "exit_status": error.exit_status}


def error_from_json(values: dict[str, Any]) -> RunFailed:
    """Return the error that `error_json` described."""
    error = RunFailed(values["message"])
    error.exit_status = values["exit_status"]
    return error


class ProgressFile:
    """Progress report of rank 0: a small file in the run's folder, written in the background at most once a second."""

    def __init__(self, config: RunConfig, storage: Storage):
        self._url = join(config.folder, PROGRESS_FILE)
        self._writer = BackgroundWriter(storage, DEADLINE_SECONDS, logging.DEBUG)
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        last_of_stage = progress.stage_step == progress.stage_steps
        if last_of_stage or time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._writer.write(self._url, json.dumps(asdict(progress)).encode())

    def close(self) -> None:
        self._writer.close(PROGRESS_CLOSE_SECONDS)


class RankPreemptionSignal:
    """Signal that healthy ranks should save and stop: a node is drained, more ranks would fit, or the driver asks.

    Each rank calls its own signal at every step, and the training loop makes the ranks agree. Ray's public function,
    `ray.train.get_preemption_info()`, is a barrier among the ranks and too slow for every step; Ray's watcher stores
    the same information in each rank's own context.
    """

    def __init__(self, cluster: ClusterConfig, rank: int, world_size: int, mail: Mailbox):
        self.reason: str | None = STOPPED if rank == 0 and mail.stop_requested() else None
        self._cluster, self._mail = cluster, mail
        self._num_missing = cluster.workers - world_size
        self._closed = threading.Event()
        if rank == 0 and self.reason is None:
            threading.Thread(target=self._watch, name="preemption", daemon=True).start()

    def __call__(self) -> bool:
        if self.reason is None and _node_is_draining():
            self.reason = PREEMPTED
        return self.reason is not None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        since: float | None = None
        while not self._closed.wait(CHECK_SECONDS):
            if self._mail.stop_requested():
                self.reason = STOPPED
                return
            available = 0
            if self._num_missing > 0:
                try:
                    available = available_ranks(self._cluster)
                except Exception as error:  # the head may be unreachable for a while; the next check tries again
                    log.warning("cannot determine whether more ranks would fit: %s", error)
            since = (since or time.monotonic()) if available > 0 else None
            if since and time.monotonic() - since >= self._cluster.grow_seconds:
                log.warning(
                    "there is room for %d more rank(s): saving, to restart with them",
                    min(available, self._num_missing),
                )
                self.reason = GROWN
                return


def _node_is_draining() -> bool:
    """Return whether Ray's watcher has announced that a node of the worker group will be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
