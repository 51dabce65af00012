"""`--preflight`: everything a run does, once, before a large allocation is reserved for it; nothing is left behind.

Every rank writes, reads and deletes an object in the run's storage; rank 0 does the same in MLflow. Then each stage is
built as for training and runs one full step on its own data: read, forward, backward, update. The weights are
discarded. Files are written to a temporary folder next to the run's; only indexes of shards that had none remain.
"""

from __future__ import annotations

import gc
import logging
import math
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config.errors import MomeError, RunFailed, StorageError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory, local_backend
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage, join
from pipeline.objectives import batch_groups
from pipeline.tracking.locations import experiment_name, tracking_uri
from pipeline.tracking.mlflow_server import check_server, try_writing
from pipeline.training.collectives import Collectives
from pipeline.training.context import Stage
from pipeline.training.health import ExecutionOrderCheck
from pipeline.training.loop import build_engine
from pipeline.training.measure import peak_memory
from pipeline.training.micro_batch import with_micro_batch
from pipeline.training.prepare import VOCABULARY, apart, prepare

log = logging.getLogger(__name__)

WRITTEN_BYTES = 8 * 2**20
GB = 1e9
Say = Callable[[str], None]


@dataclass(frozen=True)
class CheckResult:
    """A check that passed on all ranks, with the slowest rank's seconds."""

    name: str
    message: str
    seconds: float

    def __str__(self) -> str:
        return f"ok  {self.name:<24} {self.seconds:7.1f} s  {self.message}"


def preflight(config: RunConfig, say: Say, loader_backend: BackendFactory = local_backend) -> list[CheckResult]:
    """Run all checks; call it once on each rank. `say` receives each result on rank 0. Raises MomeError on failure."""
    torch.set_num_threads(config.engine.threads)
    collectives, storage = Collectives(), Storage(config.storage)
    scratch = _scratch_run(config, collectives.broadcast_json(secrets.token_hex(4)), storage)
    results: list[CheckResult] = []

    def check(name: str, run: Callable[[], str]) -> None:
        results.append(_run_check(collectives, name, run))
        if collectives.rank == 0:
            say(str(results[-1]))

    try:
        key = f"preflight-rank-{collectives.rank}"
        check("storage", lambda: check_storage(storage, scratch.folder, key, WRITTEN_BYTES))
        check("tracking", lambda: _try_tracking(config, collectives.rank))
        check("data and vocabulary", lambda: _prepare(scratch, storage, collectives))
        tokenizer = Tokenizer.load(storage, join(scratch.folder, VOCABULARY), scratch.tokenizer.lowercase)
        for index, stage in enumerate(scratch.stages):
            run = partial(_try_stage, scratch, index, storage, tokenizer, collectives, loader_backend)
            check(f"stage {stage.name}", run)
    finally:
        if collectives.rank == 0:
            try:
                storage.delete(scratch.folder)
            except StorageError as error:  # must not hide the failure of a check
                log.warning("the temporary folder %s could not be removed: %s", scratch.folder, error)
    return results


def _scratch_run(config: RunConfig, token: str, storage: Storage) -> RunConfig:
    """Return the run with a temporary folder, starting every stage that follows another from random weights."""
    values = apart(config, storage, config.output, f"{config.name}.preflight-{token}").model_dump(mode="json")
    for stage in values["stages"]:
        if stage["start_from"] == "previous":
            stage["start_from"] = "random"
    return validate(values, config.name)


def _run_check(collectives: Collectives, name: str, run: Callable[[], str]) -> CheckResult:
    """Run a check on every rank; if any fails, all of them raise, so that none waits for it."""
    started = time.perf_counter()
    try:
        message, failure = run(), ""
    except (MomeError, torch.OutOfMemoryError, MemoryError) as error:
        message, failure = "", f"rank {collectives.rank}: {type(error).__name__}: {error}"
    by_rank = collectives.gather_json((message, failure, time.perf_counter() - started))
    if failures := [failure for _, failure, _ in by_rank if failure]:
        raise RunFailed(f"preflight, {name}: " + "\n".join(failures))
    return CheckResult(name, by_rank[0][0], max(seconds for _, _, seconds in by_rank))


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


def _try_tracking(config: RunConfig, rank: int) -> str:
    """Write to the tracking server; if tracking is not required, a failure is only reported."""
    if rank != 0:
        return ""
    try:
        check_server(config, required=True)
        return try_writing(tracking_uri(config), experiment_name(config))
    except MomeError as error:
        if config.tracking.required:
            raise
        return f"not required, and unavailable: {error}"


def _prepare(config: RunConfig, storage: Storage, collectives: Collectives) -> str:
    if collectives.rank == 0:
        prepare(config, storage)
    return f"{len(config.sources)} sources"


def _try_stage(
    config: RunConfig,
    index: int,
    storage: Storage,
    tokenizer: Tokenizer,
    collectives: Collectives,
    loader_backend: BackendFactory,
) -> str:
    """Build a stage and run its first step as the training loop does."""
    run = config.for_stage(config.stages[index])
    stage = Stage(with_micro_batch(run, index, collectives, tokenizer.size), index)
    rank, world_size = collectives.rank, collectives.world_size
    order = ExecutionOrderCheck(collectives, stage.run.engine.check_graph_every, stage.first_step)
    with ExitStack() as stack:
        peak = stack.enter_context(peak_memory(collectives.device))
        stack.callback(gc.collect)
        loader = Loader(
            stage.run,
            stage.config,
            batch_groups(stage.run, stage.config),
            storage,
            tokenizer,
            rank,
            world_size,
            loader_backend,
        )
        stack.enter_context(loader)
        engine, step, _ = build_engine(stage, storage, tokenizer.size, collectives, order)
        stack.callback(engine.close)
        batch = next(iter(loader.batches(0)))
        started = time.perf_counter()
        order.before_step(0)
        losses = step(batch)
        order.after_backward(0)
        engine.step(stage.config.optimizer.lr)
        loss, norm = float(collectives.sum(losses["loss"])), engine.gradient_norm()
        seconds = time.perf_counter() - started
        largest_peak = collectives.largest([peak()])[0]
    if not math.isfinite(loss + norm):
        raise RunFailed(f"stage {stage.name}: the first step's loss is {loss}, its gradient norm {norm}")
    rows = f"{stage.config.global_batch_size} rows = {world_size} ranks x {step.accumulation} micro-batches"
    return f"{rows}; first step {seconds:.1f} s, loss {loss:.3f}, peak memory {largest_peak / GB:.2f} GB per rank"
