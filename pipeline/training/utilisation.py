"""Model FLOPs utilisation (MFU): a step's arithmetic as `mome plan` counts it, beside what the GPU's sheet promises.

Texts count with the most tokens that the stage allows, as in the plan, and the promise is of bfloat16 products.
"""

from __future__ import annotations

import torch

from pipeline.config.schema import RunConfig
from pipeline.planning.estimate import largest_share
from pipeline.planning.hardware import accelerator_like
from pipeline.training.collectives import Collectives
from pipeline.training.steps import accumulation
from pipeline.training.workload import work_of


def seconds_at_peak(config: RunConfig, index: int, vocabulary: int, collectives: Collectives) -> float | None:
    """On rank 0, what a step of stage `index` would take at the peak of its GPU; None where that is not known.

    Times the steps a second this is the MFU. Takes seconds; `engine.micro_batch_size` must be a number or None.
    """
    if collectives.rank != 0 or collectives.device.type != "cuda":
        return None
    return seconds_on(torch.cuda.get_device_name(collectives.device), config, index, vocabulary, collectives.world_size)


def seconds_on(device: str, config: RunConfig, index: int, vocabulary: int, world_size: int) -> float | None:
    """The same on GPUs of a name, as CUDA tells it."""
    known = accelerator_like(device)
    if known is None:
        return None
    batch = config.stages[index].global_batch_size
    work = work_of(config, index, vocabulary, "cuda")
    pieces = accumulation(batch, world_size, config.engine.micro_batch_size)
    return work.step_flops(largest_share(batch, world_size), pieces) / known.flops
