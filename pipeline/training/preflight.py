"""`--preflight`: everything a run does, once, before a large allocation is reserved for it; nothing is left behind.

Every rank writes, reads and deletes an object in the run's storage; rank 0 does the same in MLflow. Then each stage is
built as for training and runs one full step on its own data: read, forward, backward, update. The weights are
discarded. Files are written to a temporary folder next to the run's; only indexes of shards that had none remain.
"""

from __future__ import annotations

import logging
import math
import resource
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config.errors import MomeError, RunFailed, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory, local_backend
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import experiment_name, tracking_uri
from pipeline.tracking.mlflow_server import check_server, try_writing
from pipeline.training.collectives import Collectives
from pipeline.training.health import ExecutionOrderCheck
from pipeline.training.loop import build_step
from pipeline.training.prepare import VOCABULARY, apart, prepare
from pipeline.training.stages import Stage
from pipeline.training.workload import with_micro_batch

log = logging.getLogger(__name__)

WRITTEN_BYTES = 8 * 2**20
GB = 1e9


@dataclass(frozen=True)
class CheckResult:
    """A check that passed on all ranks, with the slowest rank's seconds."""

    name: str
    message: str
    seconds: float


def preflight(
    config: RunConfig, say: Callable[[str], None], loader_backend: BackendFactory = local_backend
) -> list[CheckResult]:
    """Run all checks; call it once on each rank. Raises MomeError on failure.

    `say` receives a line for each check on rank 0 when it is done.
    """
    torch.set_num_threads(config.engine.threads)
    collectives, storage = Collectives(), Storage(config.storage)
    rank = collectives.rank
    scratch_name = f"{config.name}.preflight-{collectives.broadcast_json(secrets.token_hex(4))}"
    scratch = apart(config, storage, config.output, scratch_name)
    stages = [  # no earlier stage has trained the weights to start from
        stage.model_copy(update={"start_from": "random"}) if stage.start_from == "previous" else stage
        for stage in scratch.stages
    ]
    scratch = scratch.model_copy(update={"stages": tuple(stages)})
    results: list[CheckResult] = []

    def check(name: str, run: Callable[[], str]) -> None:
        """Run a check on every rank; if any fails, all of them raise, so that none waits for it."""
        started = time.perf_counter()
        try:
            message, failure = run(), ""
        except (MomeError, torch.OutOfMemoryError, MemoryError) as error:
            message, failure = "", f"rank {rank}: {type(error).__name__}: {error}"
        by_rank = collectives.gather_json((message, failure, time.perf_counter() - started))
        if failures := [failure for _, failure, _ in by_rank if failure]:
            raise RunFailed(f"preflight, {name}: " + "\n".join(failures))
        result = CheckResult(name, by_rank[0][0], max(seconds for *_, seconds in by_rank))
        results.append(result)
        if rank == 0:
            say(f"ok  {name:<24} {result.seconds:7.1f} s  {result.message}")

    def prepare_scratch() -> str:
        if rank == 0:
            prepare(scratch, storage)
        return f"{len(scratch.sources)} sources"

    try:
        check("storage", lambda: check_storage(storage, scratch.folder, f"preflight-rank-{rank}", WRITTEN_BYTES))
        check("tracking", lambda: _try_tracking(config) if rank == 0 else "")
        check("data and vocabulary", prepare_scratch)
        tokenizer = Tokenizer.load(storage, join(scratch.folder, VOCABULARY), scratch.tokenizer.lowercase)
        for index, stage in enumerate(scratch.stages):
            run = partial(_try_stage, Stage(scratch, index), storage, tokenizer, collectives, loader_backend)
            check(f"stage {stage.name}", run)
    finally:
        if rank == 0:
            try:
                storage.delete(scratch.folder)
            except StorageError as error:  # must not hide the failure of a check
                log.warning("the temporary folder %s could not be removed: %s", scratch.folder, error)
    return results


def check_storage(storage: Storage, folder: str, key: str, num_bytes: int) -> str:
    """Write, read, list and delete an object in `folder`; return the speeds. Raises StorageError."""
    url, data = join(folder, key), secrets.token_bytes(num_bytes)
    started = time.perf_counter()
    storage.write(url, data)
    written = time.perf_counter()
    is_equal = storage.read(url) == data
    read = time.perf_counter()
    is_listed = key in storage.list(folder)
    storage.delete(url)
    is_deleted = not storage.exists(url)
    if not (is_equal and is_listed and is_deleted):
        fault = "returns other data" if not is_equal else "does not list it" if not is_listed else "did not delete it"
        raise StorageError(f"{url}: the store accepted an object but {fault}; it is not consistent, use another")
    speeds = (num_bytes / 1e6 / max(seconds, 1e-9) for seconds in (written - started, read - written))
    return "written at {:.0f} MB/s, read at {:.0f} MB/s, deleted".format(*speeds)


def _try_tracking(config: RunConfig) -> str:
    """Write to the tracking server; if tracking is not required, a failure is only reported."""
    try:
        check_server(config, required=True)
        return try_writing(tracking_uri(config), experiment_name(config))
    except MomeError as error:
        if config.tracking.required:
            raise
        return f"not required, and unavailable: {error}"


def _try_stage(
    stage: Stage, storage: Storage, tokenizer: Tokenizer, collectives: Collectives, loader_backend: BackendFactory
) -> str:
    """Build a stage and run its first step as the training loop does."""
    stage = with_micro_batch(stage, collectives, tokenizer.size)
    order = ExecutionOrderCheck(collectives, stage.run.engine.check_graph_every, stage.first_step)
    on_cuda = collectives.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(collectives.device)
    with build_step(stage, storage, tokenizer, collectives, loader_backend, order) as (loader, engine, step, _):
        batch = next(iter(loader.batches(0)))
        started = time.perf_counter()
        order.before_step(0)
        losses = step(batch)
        order.after_backward(0)
        engine.step(stage.config.optimizer.lr)
        loss, norm = float(collectives.sum(losses["loss"])), engine.gradient_norm()
        seconds = time.perf_counter() - started
    # On a GPU the allocator's peak in this stage; on a CPU the process's so far (in KiB on Linux).
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(collectives.device) if on_cuda else resident
    largest_peak = collectives.largest([peak])[0]
    if not math.isfinite(loss + norm):
        raise RunFailed(f"stage {stage.name}: the first step's loss is {loss}, its gradient norm {norm}")
    rows = f"{stage.config.global_batch_size} rows = {collectives.world_size} ranks x {step.accumulation} micro-batches"
    memory = f"peak memory{'' if on_cuda else ' so far'} {largest_peak / GB:.2f} GB per rank"
    return f"{rows}; first step {seconds:.1f} s, loss {loss:.3f}, {memory}"
