"""What Ray Train runs on each worker: this rank's part of the run, and what it leaves for the driver.

A rank that meets an error which a restart would only repeat (a config, data or checkpoint fault, NaN, out of memory)
leaves it in the run's folder; after the restart every rank sees it and returns, and the driver raises it. Ray Train
itself retries every exception, whatever its kind.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from jobs.mailbox import Mailbox, forwarded_warnings
from jobs.notice import PREEMPTED, Notice
from pipeline.config.errors import MomeError, Preempted, RunFailed, StorageError, Superseded
from pipeline.config.redaction import configure_logging, redact
from pipeline.config.schema import RunConfig
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
PROGRESS_CLOSE_SECONDS = 5.0  # for the last report to be written


def run_rank(loop_config: dict[str, str]) -> str | None:
    """Train; returns why the ranks saved and stopped before the end, if they did (`jobs.notice`)."""
    import ray.train

    configure_logging()
    config = RunConfig.model_validate_json(loop_config["config"])
    storage = Storage(config.storage)
    ownership = Ownership(storage, config.folder, loop_config["claim"])
    if storage.exists(join(config.folder, FAILURE_FILE)) or not ownership.holds():
        return None
    context, mail = ray.train.get_context(), Mailbox(loop_config["start"])
    notice = Notice(config.cluster, context.get_world_rank(), context.get_world_size(), mail)
    with forwarded_warnings(mail) if context.get_world_rank() == 0 else nullcontext():
        return _train(config, storage, ownership, notice)


def _train(config: RunConfig, storage: Storage, ownership: Ownership, notice: Notice) -> str | None:
    progress = ProgressFile(config, storage)
    try:
        train(config, progress, loader_backend(config), preempted=notice, claim=ownership.claim)
    except Preempted as error:
        log.warning("%s", error)
        return notice.reason or PREEMPTED
    except Exception as error:
        told = _told(error)
        if told is not None and ownership.holds():
            storage.write(join(config.folder, FAILURE_FILE), json.dumps(told).encode())
        raise
    finally:
        progress.close()
        notice.close()
    return None


def loader_backend(config: RunConfig) -> BackendFactory:
    if not config.cluster.loader_actors:
        return local_backend
    from jobs.loader_actors import RayBackend

    return RayBackend


def _told(error: Exception) -> dict[str, Any] | None:
    """The message of an error that a restart would only repeat; None for one that may be tried again."""
    if is_out_of_memory(error):
        message = (
            f"out of memory: {redact(str(error))}. Set engine.micro_batch_size lower, or engine.zero_stage higher."
        )
        return {"message": message, "exit_status": 1}
    if isinstance(error, MomeError) and not isinstance(error, StorageError | Superseded):
        return error_json(error)
    return None


def error_json(error: MomeError) -> dict[str, Any]:
    """What a rank tells the driver of an error, as JSON."""
    return {"message": str(error), "exit_status": error.exit_status}


def error_from_json(told: dict[str, Any]) -> RunFailed:
    """The error that the driver raises for it."""
    error = RunFailed(told["message"])
    error.exit_status = told["exit_status"]
    return error


class ProgressFile:
    """Rank 0's report: a small file in the run's folder, at most once a second, written in the background."""

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
