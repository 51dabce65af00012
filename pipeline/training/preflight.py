"""`--preflight`: everything a run does, once, before a large allocation is reserved for it.

After storage and MLflow are checked, each stage is built as for training and runs one full step on its own data. Files
are written to a temporary folder next to the run's; only indexes of shards that had none remain.
"""

import logging
import math
import resource
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pipeline.config.errors import MomeError, RunFailed, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import experiment_name, tracking_uri
from pipeline.tracking.mlflow_server import check_server, try_writing
from pipeline.tracking.tracker import Tracker
from pipeline.training.callbacks import Callbacks
from pipeline.training.collectives import Collectives
from pipeline.training.health import ExecutionOrderCheck
from pipeline.training.loop import RunContext, build_stage_state
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import VOCABULARY, apart, prepare
from pipeline.training.stages import Stage
from pipeline.training.supervisor import RankSupervisor
from pipeline.training.workload import with_micro_batch

log = logging.getLogger(__name__)

WRITTEN_BYTES = 8 * 2**20
GB = 1e9


def preflight(
    config: RunConfig, say: Callable[[str], None], loader_backend: BackendFactory | None = None
) -> dict[str, dict[str, Any]]:
    """Run all checks, on each rank; return each one's `message` and slowest rank's `seconds`. Raises MomeError."""
    torch.set_num_threads(config.engine.threads)
    collectives, storage = Collectives(), Storage(config.storage)
    rank, token = collectives.rank, collectives.broadcast(secrets.token_hex(4))
    scratch = apart(config, storage, config.output, f"{config.name}.preflight-{token}")
    stages = [  # no earlier stage has trained the weights to start from
        stage.model_copy(update={"start_from": "random"}) if stage.start_from == "previous" else stage
        for stage in scratch.stages
    ]
    scratch = scratch.model_copy(update={"stages": tuple(stages)})
    results: dict[str, dict[str, Any]] = {}

    def check(name: str, work: Callable[[], str]) -> None:
        """Run a check on every rank; if any fails, all of them raise, so that none waits for it."""
        started, message, failure = time.perf_counter(), "", ""
        try:
            message = work()
        except (MomeError, torch.OutOfMemoryError, MemoryError) as error:
            failure = f"rank {rank}: {type(error).__name__}: {error}"
        own = message, failure, time.perf_counter() - started
        messages, failures, seconds = zip(*collectives.gather_objects(own), strict=True)
        if any(failures):
            raise RunFailed(f"preflight, {name}: " + "\n".join(filter(None, failures)))
        results[name] = {"message": messages[0], "seconds": max(seconds)}
        if rank == 0:
            say(f"ok  {name:<24} {max(seconds):7.1f} s  {messages[0]}")

    try:
        check("storage", lambda: check_storage(storage, scratch.folder, f"preflight-rank-{rank}", WRITTEN_BYTES))
        check("tracking", lambda: "" if rank else _check_tracking(config))
        sources = f"{len(scratch.sources)} sources"
        check("data and vocabulary", lambda: "" if rank else f"{sources}, {prepare(scratch, storage).size} tokens")
        tokenizer = Tokenizer.load(storage, join(scratch.folder, VOCABULARY), scratch.tokenizer.lowercase)
        supervisor, ownership = RankSupervisor(scratch, storage, collectives), Ownership(storage, scratch.folder, "")
        context = RunContext(
            scratch, storage, tokenizer, collectives, Tracker(), lambda _: None, loader_backend, supervisor, ownership
        )
        for index, settings in enumerate(scratch.stages):
            check(f"stage {settings.name}", partial(_try_stage, Stage(scratch, index), context))
    finally:
        if rank == 0:
            try:
                storage.delete(scratch.folder)
            except StorageError as error:  # must not hide the failure of a check
                log.warning("the temporary folder %s could not be removed: %s", scratch.folder, error)
    return results


def check_storage(storage: Storage, folder: str, key: str, num_bytes: int) -> str:
    """Write, read, list and delete an object in `folder`; return the speeds. Raises StorageError."""
    url, data, started = join(folder, key), secrets.token_bytes(num_bytes), time.perf_counter()
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


def _check_tracking(config: RunConfig) -> str:
    try:
        check_server(config, required=True)
        return try_writing(tracking_uri(config), experiment_name(config))
    except MomeError as error:
        if config.tracking.required:
            raise
        return f"not required, and unavailable: {error}"


def _try_stage(stage: Stage, context: RunContext) -> str:
    """Build a stage and run its first step as the training loop does."""
    collectives = context.collectives
    stage = with_micro_batch(stage, collectives, context.tokenizer.size)
    order = Callbacks([ExecutionOrderCheck(collectives, stage.run.engine.check_graph_every, stage.first_step)])
    on_cuda = collectives.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(collectives.device)
    with build_stage_state(stage, context, order) as state:
        batch = next(iter(state.loader.batches(0)))
        started = time.perf_counter()
        order.before_step(0, batch)
        losses = state.step(batch)
        order.after_backward(0)
        state.engine.step(stage.config.optimizer.lr)
        loss, norm = float(collectives.sum(losses["loss"])), float(state.engine.gradient_norm)
        seconds = time.perf_counter() - started
    # On a GPU the allocator's peak in this stage; on a CPU the process's so far (in KiB on Linux).
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = collectives.largest([torch.cuda.max_memory_allocated(collectives.device) if on_cuda else resident])[0]
    if not math.isfinite(loss + norm):
        raise RunFailed(f"stage {stage.name}: the first step's loss is {loss}, its gradient norm {norm}")
    num_micro_batches = state.step.accumulation
    rows = f"{stage.config.global_batch_size} rows = {collectives.world_size} ranks x {num_micro_batches} micro-batches"
    memory = f"peak memory{'' if on_cuda else ' so far'} {peak / GB:.2f} GB per rank"
    return f"{rows}; first step {seconds:.1f} s, loss {loss:.3f}, {memory}"
