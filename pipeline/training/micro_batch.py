"""`engine.micro_batch_size: auto`: the largest micro-batch that fits the memory of the smallest rank.

The estimate of `mome plan` decides, before anything is allocated. The gradient does not depend on it (contract C2), so
that a run may resume on other devices; all ranks take the same number and so run the same graph (C3).
"""

from __future__ import annotations

import logging

import torch

from pipeline.config.errors import RunFailed
from pipeline.config.schema import RunConfig
from pipeline.planning.estimate import largest_micro_batch, largest_share, memory_at
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_setup import sharding_of
from pipeline.training.workload import work_of

log = logging.getLogger(__name__)

GB = 10**9
USABLE = 0.9  # of what a GPU has free: the allocator leaves some of it in fragments
UNBOUNDED = 2**62


def with_micro_batch(config: RunConfig, index: int, collectives: Collectives, vocabulary: int) -> RunConfig:
    """The run as stage `index` is to be trained: `auto` made a number. All ranks call it together.

    Raises RunFailed when not even one row fits.
    """
    if config.engine.micro_batch_size != "auto":
        return config
    room = -collectives.largest([-_room(config, collectives)])[0]
    rows = None
    if room < UNBOUNDED:
        largest = _fitting(config, index, collectives, vocabulary, room) if collectives.rank == 0 else None
        rows = collectives.broadcast_json(largest)
    stage = config.stages[index]
    if rows == 0:
        raise RunFailed(
            f"stage {stage.name}: not one row fits the {room / GB:.1f} GB of the smallest rank. Set a higher "
            "engine.zero_stage, or more ranks; `mome plan` shows what each needs"
        )
    if collectives.rank == 0:
        limit = f"{rows} rows fit" if rows else "no limit is known on a CPU: a rank's whole share"
        log.warning("stage %s: engine.micro_batch_size auto: %s", stage.name, limit)
    settings = config.model_copy(update={"engine": config.engine.model_copy(update={"micro_batch_size": rows})})
    return settings


def _room(config: RunConfig, collectives: Collectives) -> int:
    """Bytes that this rank may use."""
    if config.engine.memory_gb is not None:
        return int(config.engine.memory_gb * GB)
    if collectives.device.type != "cuda":
        return UNBOUNDED
    free, _ = torch.cuda.mem_get_info(collectives.device)
    # What the allocator keeps of an earlier stage it gives to this one.
    return int(USABLE * (free + torch.cuda.memory_reserved(collectives.device)))


def _fitting(config: RunConfig, index: int, collectives: Collectives, vocabulary: int, room: int) -> int:
    on_cuda = collectives.device.type == "cuda"
    stage = config.stages[index]
    unsplit = config.model_copy(update={"engine": config.engine.model_copy(update={"micro_batch_size": None})})
    work = work_of(unsplit, index, vocabulary, "cuda" if on_cuda else "cpu")
    sharding = sharding_of(unsplit, stage, collectives.world_size, on_cuda)
    share = largest_share(stage.global_batch_size, collectives.world_size)
    rows = largest_micro_batch(work, sharding, share, room)
    if rows:
        memory = memory_at(work, sharding, share, rows)
        log.warning("stage %s: %.2f GB of %.2f GB expected", stage.name, memory.total / GB, room / GB)
    return rows
