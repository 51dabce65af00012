"""The campaign: every stage in turn, on this rank. The same under Ray Train and under `torchrun`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from pipeline.config.errors import Preempted, Superseded
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory, local_backend
from pipeline.data.storage import Storage, join
from pipeline.tracking.tracker import JournalTracker, Status, Tracker
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.collectives import Collectives
from pipeline.training.ownership import Ownership, Start
from pipeline.training.prepare import prepare
from pipeline.training.progress import Report
from pipeline.training.spikes import SpikeFound
from pipeline.training.stage_run import Run, StageRun
from pipeline.training.supervisor import RankSupervisor

log = logging.getLogger(__name__)

CLOSE_SECONDS = 45.0  # with the other waits at the end less than Kubernetes' 120 s of grace


def train(
    config: RunConfig,
    report: Report,
    loader_backend: BackendFactory = local_backend,
    preempted: Callable[[], bool] | None = None,
    claim: str | None = None,
) -> None:
    """Run every stage that is not finished yet, from the last whole checkpoint. Called once on each rank.

    `loader_backend` builds the backend that prepares the rank's batches; `preempted`, asked on every rank, says whether
    its machine is about to be taken away. In a process's main thread SIGTERM and SIGUSR1 say the same. Rank 0 takes
    the run for this start (`ownership`); `claim` is the launcher's, where the launcher has taken it before.

    Raises Preempted once the run is saved, Superseded (on rank 0) when a later start has it, and another MomeError for
    what a restart would only repeat; anything else may be tried again. A hung rank ends the process (`watchdog`).
    """
    began = time.monotonic()
    torch.set_num_threads(config.engine.threads)
    collectives = Collectives()
    storage = Storage(config.storage)
    supervisor = RankSupervisor(config, storage, collectives, preempted, elapsed=time.monotonic() - began)
    if collectives.rank == 0:
        prepare(config, storage)
    ownership = _take(config, storage, collectives, claim)
    tokenizer = Tokenizer.load(storage, join(config.folder, "vocab.txt"), config.tokenizer.lowercase)
    tracker = _open_tracker(config, storage, collectives)
    run = Run(config, storage, tokenizer, collectives, tracker, report, loader_backend, supervisor, ownership)
    try:
        with supervisor:
            for index in range(len(config.stages)):
                if not is_committed(storage, stage_url(config, index)):
                    _run_stage(run, index)
                    collectives.barrier()
    except Superseded:
        tracker.abandon()  # how the run ends is for its owner to say
        raise
    except BaseException as error:
        _end(tracker, "KILLED" if isinstance(error, Preempted) else "FAILED")
        raise
    _end(tracker, "FINISHED")


def _take(config: RunConfig, storage: Storage, collectives: Collectives, claim: str | None) -> Ownership:
    """The run is this start's: on rank 0's word, for all ranks."""
    start = None
    if collectives.rank == 0:
        taken = Ownership.take(storage, config.folder, claim)
        claim, start = taken.claim, str(taken.start)
    claim, start = collectives.broadcast_json((claim, start))
    return Ownership(storage, config.folder, claim, Start.parse(start))


def _end(tracker: Tracker, status: Status) -> None:
    """Close the record. A run that ends before its time may have to be gone soon: its store is not waited for long."""
    tracker.finish(status)
    closing = threading.Thread(target=tracker.close, name="closing tracker", daemon=True)
    closing.start()
    closing.join(None if status == "FINISHED" else CLOSE_SECONDS)
    if closing.is_alive():
        log.warning("tracking: the run's store took more than %.0f s; the next start goes on from there", CLOSE_SECONDS)


def _run_stage(run: Run, index: int) -> None:
    """One stage to its end, begun anew from its last checkpoint as often as `guards.spike` allows."""
    spike = None
    while True:
        run.supervisor.begin_stage(run.config.stage_start(index), is_rollback=spike is not None)
        try:
            return StageRun(run, index).run(spike)
        except SpikeFound as found:
            spike = found.spike


def _open_tracker(config: RunConfig, storage: Storage, collectives: Collectives) -> Tracker:
    if collectives.rank != 0:
        return Tracker()
    tags = {
        "world_size": str(collectives.world_size),
        "zero_stage": str(config.engine.zero_stage),
    }
    return JournalTracker.open(config, storage, tags)
