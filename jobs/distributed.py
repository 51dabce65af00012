"""Work of all ranks: training, evaluation, embedding and preflight checks, on Ray, under torchrun, or in this process.

    torchrun --nproc-per-node N --no-python mome evaluate CHECKPOINT

Ray Train retries every exception of a rank. An error that a restart would only repeat (config, data or checkpoint
fault, NaN, out of memory) is therefore reported as a value. While training, it is written to the run's folder: after
the restart every rank sees it and returns, and the driver raises it. Other work returns it as its result.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from jobs.cluster import connect, for_ranks, root_cause
from jobs.driver import STOP, Mailbox, forwarded_warnings
from pipeline.config.background import PeriodicThread
from pipeline.config.errors import MomeError, Preempted, RunFailed, StorageError, Superseded
from pipeline.config.redaction import configure_logging, redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.storage import Storage, join
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.training import callbacks, health, loop
from pipeline.training.collectives import Collectives
from pipeline.training.ownership import Ownership
from pipeline.training.preflight import preflight

log = logging.getLogger(__name__)

FAILURE_FILE, PROGRESS_FILE = "failure.json", "progress.json"
PROGRESS_SECONDS = 1.0
PREEMPTED, GROWN, STOPPED = "preempted", "grown", "stopped"
CHECK_SECONDS = 1.0


def run_rank(json_config: str, claim: str, start: str) -> str | None:
    """Train on a Ray Train worker; return why the ranks saved before the end (preempted, grown or stopped), or None."""
    import ray.train

    from jobs.loader_actors import RayBackend

    configure_logging()
    config = RunConfig.model_validate_json(json_config)
    storage = Storage(config.storage)
    ownership = Ownership(storage, config.folder, claim)
    if storage.exists(join(config.folder, FAILURE_FILE)) or not ownership.holds():
        return None
    context, mail = ray.train.get_context(), Mailbox(start)
    signal = RankPreemptionSignal(config.cluster, context.get_world_rank(), context.get_world_size(), mail)
    progress = ProgressFile(config, storage)
    progress.start()
    backend = RayBackend if config.cluster.loader_actors else None
    with forwarded_warnings(mail) if context.get_world_rank() == 0 else nullcontext():
        try:
            loop.train(config, progress, backend, preempted=signal, claim=claim)
        except Preempted as error:
            log.warning("%s", error)
            return signal.reason or PREEMPTED
        except Exception as error:
            failure: dict[str, Any] | None = None  # of an error that a restart would only repeat
            if health.is_out_of_memory(error):
                remedy = "Set engine.micro_batch_size lower, or engine.zero_stage higher."
                failure = {"message": f"out of memory: {redact(str(error))}. {remedy}", "exit_status": 1}
            elif isinstance(error, MomeError) and not isinstance(error, StorageError | Superseded):
                failure = {"message": str(error), "exit_status": error.exit_status}
            if failure is not None and ownership.holds():
                storage.write(join(config.folder, FAILURE_FILE), json.dumps(failure).encode())
            raise
        finally:
            progress.stop(timeout=5.0)
            signal.thread.stop(timeout=0.0)
    return None


class ProgressFile(PeriodicThread):
    """Progress report of rank 0: a small file in the run's folder, which this thread writes at most once a second.

    It holds the latest metrics, and the phase if one was reported after them.
    """

    def __init__(self, config: RunConfig, storage: Storage):
        super().__init__(self._write, PROGRESS_SECONDS, "mome-progress", at_end=True)
        self._storage, self._url = storage.within(10.0), join(config.folder, PROGRESS_FILE)  # seconds to retry a write
        self._newest: callbacks.Progress | None = None
        self._written: callbacks.Progress | None = None

    def __call__(self, progress: callbacks.Progress) -> None:
        newest = self._newest
        self._newest = replace(newest, phase=progress.phase) if progress.phase and newest is not None else progress

    def _write(self) -> None:
        newest = self._newest
        if newest is not None and newest is not self._written:
            self._written = newest
            try:
                self._storage.write(self._url, json.dumps(asdict(newest)).encode())
            except Exception as error:  # no failure here is a reason to stop the run
                log.debug("%s was not written: %s: %s", self._url, type(error).__name__, error)


class RankPreemptionSignal:
    """Signal that healthy ranks should save and stop: a node is drained, more ranks would fit, or the driver asks.

    Each rank calls its own at every step, and the training loop makes the ranks agree. Ray's public function is a
    barrier, too slow for every step; its watcher stores the same in each rank's context. `thread` is rank 0's.
    """

    def __init__(self, cluster: ClusterConfig, rank: int, world_size: int, mail: Mailbox):
        self.reason: str | None = STOPPED if rank == 0 and mail.get(STOP) else None
        self._cluster, self._mail = cluster, mail
        self._num_missing = cluster.workers - world_size
        self._room_since: float | None = None
        self.thread = PeriodicThread(self._check, CHECK_SECONDS, "preemption")
        if rank == 0 and self.reason is None:
            self.thread.start()

    def __call__(self) -> bool:
        from ray.train.v2._internal.execution.context import get_train_context

        if self.reason is None and get_train_context().preemption_context.preemption_info is not None:
            self.reason = PREEMPTED
        return self.reason is not None

    def _check(self) -> bool:
        """Look for a request of the driver and for room; return False once there is a reason to stop."""
        from jobs.placement import available_ranks

        if self._mail.get(STOP):
            self.reason = STOPPED
            return False
        available, now = 0, time.monotonic()
        if self._num_missing > 0:
            try:
                available = available_ranks(self._cluster)
            except Exception as error:  # the head may be unreachable for a while; the next check tries again
                log.warning("cannot determine whether more ranks would fit: %s", error)
        self._room_since = (self._room_since or now) if available > 0 else None
        if self._room_since is None or now - self._room_since < self._cluster.grow_seconds:
            return True
        log.warning(
            "there is room for %d more rank(s): saving, to restart with them", min(available, self._num_missing)
        )
        self.reason = GROWN
        return False


def ranks_here() -> Ranks:
    """Return the process group that torchrun started this process in, or a single process."""
    return Collectives() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE_PROCESS


def device_of(ranks: Ranks) -> torch.device:
    """Return the device of this rank."""
    if isinstance(ranks, Collectives):
        return ranks.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_workers(work: Callable[[Ranks], Any], config: RunConfig, workers: int, name: str) -> Any:
    """Run `work(ranks)` on `workers` ranks, as `run_on_cluster`; lost ranks restart `cluster.max_failures` times."""
    import ray.train

    job_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.name).strip("-._") or "weights"  # folders may have any name
    config = config.model_copy(update={"name": job_name})
    # Only training uses loader actors.
    config = for_ranks(config, workers=workers, min_workers=None, loader_actors=0, loader_resource=None)
    budget = cast(Any, ray.train).FailureConfig(max_failures=config.cluster.max_failures)  # annotated as of Train v1
    return run_on_cluster(lambda _: work(Collectives()), config, name, budget)


def run_on_cluster(work: Callable[[RunConfig], Any], config: RunConfig, name: str, budget: Any = None) -> Any:
    """Return rank 0's `work(config)`, pickled, of ranks placed by Ray. Raises MomeError with a rank's first failure."""

    def on_rank(json_config: str) -> dict[str, Any]:
        try:
            return {"result": work(RunConfig.model_validate_json(json_config))}
        except MomeError as error:
            return {"failure": {"message": str(error), "exit_status": error.exit_status}}

    config = for_ranks(config)
    connect(config.cluster)
    from jobs.placement import run_on_ranks

    try:
        result = run_on_ranks(on_rank, config, f"{config.name}-{name}", budget)
    except MomeError:
        raise
    except Exception as error:
        raise RunFailed(f"{name}: a rank was lost: {root_cause(error)}") from error
    if failure := result.get("failure"):
        raise RunFailed(failure["message"], exit_status=failure["exit_status"])
    return result["result"]


def check_rank(config: RunConfig) -> dict[str, Any]:
    """Run the preflight checks on a rank; return details and seconds by check."""
    from jobs.loader_actors import RayBackend

    return preflight(config, lambda _: None, RayBackend if config.cluster.loader_actors else None)
