"""A stage's needs from its work, the hardware and a few stated assumptions: memory, time, storage, checkpoints, cost.

Steps are taken as arithmetic at an assumed share of the accelerator's peak, then as much of the communication as
backward does not hide. Nothing is measured here; every assumption is in `Assumptions` and is printed with the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.planning.hardware import INTRA_EFFICIENCY, INTRA_LATENCY, Accelerator, Network
from pipeline.planning.memory import FLOAT32, MOMENTS, Memory, Sharding, memory_of
from pipeline.planning.work import Parameters, Work

CONTEXT_BYTES = 1.5e9  # of the CUDA context, NCCL's buffers and cuBLAS's workspace
PARAMETERS_OF_A_MODULE = 2  # that ZeRO 3 gathers at a time: mostly a weight and its bias


@dataclass(frozen=True)
class Assumptions:
    """What the estimate takes for given. Each is an option of `mome plan`."""

    mfu: float = 0.35  # share of the peak that a step's arithmetic reaches, without communication
    overlap: float = 0.0  # of the gradients' communication that backward hides; the engine sets overlap_comm off
    headroom: float = 0.1  # of the device's memory that is left free (fragments of the allocator)
    cpu_milliseconds: float = 2.7  # of one core for one photo, decoded and augmented (mome bench loader)
    sample_bytes: float = 110_000.0  # read from storage for a sample; the manifest's mean, where there is one
    checkpoint_bandwidth: float = 1e9  # bytes a second to the store, of all ranks together
    price: float = 0.0  # of a GPU for an hour
    goodput: float = 0.97  # share of the hours that is training


@dataclass(frozen=True)
class Stage:
    """What the estimate reads of a stage."""

    name: str
    steps: int
    global_batch_size: int
    pictures: int  # of a sample
    micro_batch_size: int | None  # most rows of a micro-batch; None: a rank's whole share
    checkpoint_every: int
    work: Work


@dataclass(frozen=True)
class StageEstimate:
    name: str
    parameters: Parameters
    gpus: int
    share: int  # rows of the rank with most
    micro_batch_size: int
    accumulation: int
    memory: Memory
    fits: bool
    largest_micro_batch: int  # 0: not even one row fits
    flops_per_step: float  # of all ranks
    tokens_per_step: float  # positions that enter the encoder
    compute_seconds: float
    communication_seconds: float
    communication_bytes: float  # of one rank and step
    step_seconds: float
    samples_per_second: float
    storage_bytes_per_second: float
    loader_cores: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    hours: float
    cost: float


def largest_share(batch: int, ranks: int) -> int:
    """Rows of the rank that has most: shares differ by at most one."""
    return -(-batch // ranks)


def memory_at(work: Work, sharding: Sharding, share: int, rows: int) -> Memory:
    """Of a rank with `share` rows of the batch, read `rows` at a time."""
    cut = replace(sharding, accumulates=rows < share)
    workspace = work.workspace.at(rows)
    contrast = max(0.0, work.contrast_bytes - workspace)  # the two are never alive together
    return memory_of(
        work.parameters, cut, work.activations.at(rows), workspace + contrast, work.batch_bytes_per_row * share
    )


def largest_micro_batch(work: Work, sharding: Sharding, share: int, room: float) -> int:
    """The most rows of a micro-batch with which the rank's memory stays within `room` bytes; 0 if one is too many."""
    low, high = 0, share
    while low < high:
        middle = (low + high + 1) // 2
        if memory_at(work, sharding, share, middle).total <= room:
            low = middle
        else:
            high = middle - 1
    return low


def usable_bytes(accelerator: Accelerator, assumptions: Assumptions) -> float:
    return accelerator.memory_bytes * (1 - assumptions.headroom) - CONTEXT_BYTES


def estimate(
    stage: Stage,
    sharding: Sharding,
    accelerator: Accelerator,
    network: Network,
    assumptions: Assumptions,
    micro_batch_size: int | None = None,
) -> StageEstimate:
    """The stage on `sharding.world_size` accelerators. `micro_batch_size` goes before the stage's own."""
    work, ranks = stage.work, sharding.world_size
    share = largest_share(stage.global_batch_size, ranks)
    room = usable_bytes(accelerator, assumptions)
    most = largest_micro_batch(work, sharding, share, room)
    accumulation = math.ceil(share / max(1, min(share, micro_batch_size or stage.micro_batch_size or share)))
    rows = math.ceil(share / accumulation)
    memory = memory_at(work, sharding, share, rows)
    flops = work.step_flops(share, accumulation)
    compute = flops / (accelerator.flops * assumptions.mfu)
    moved, communication = _communication(work, sharding, accelerator, network, accumulation, stage.global_batch_size)
    step = compute + max(0.0, communication - assumptions.overlap * compute)
    samples = stage.global_batch_size / step
    checkpoint = FLOAT32 * work.parameters.total + MOMENTS * work.parameters.trained
    checkpoint += FLOAT32 * work.parameters.trained if sharding.averages else 0
    bandwidth = assumptions.checkpoint_bandwidth
    hours = stage.steps * step / assumptions.goodput / 3600
    return StageEstimate(
        name=stage.name,
        parameters=work.parameters,
        gpus=ranks,
        share=share,
        micro_batch_size=rows,
        accumulation=accumulation,
        memory=memory,
        fits=memory.total <= room,
        largest_micro_batch=most,
        flops_per_step=flops * stage.global_batch_size / share,
        tokens_per_step=work.tokens.at(stage.global_batch_size),
        compute_seconds=compute,
        communication_seconds=communication,
        communication_bytes=moved,
        step_seconds=step,
        samples_per_second=samples,
        storage_bytes_per_second=samples * assumptions.sample_bytes,
        loader_cores=samples * assumptions.cpu_milliseconds / 1000 * stage.pictures,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / bandwidth,
        hours=hours,
        cost=hours * ranks * assumptions.price,
    )


def _communication(
    work: Work, sharding: Sharding, accelerator: Accelerator, network: Network, accumulation: int, batch: int
) -> tuple[float, float]:
    """Bytes that one rank sends in a step, and seconds, by rings over the slowest link.

    An all-reduce sends 2 (W - 1) / W of the data, an all-gather or reduce-scatter half of that. Gradients travel as
    float32, which is what the engine is told to speak: all-reduced in buckets once a step at stages 0 and 1, and once a
    micro-batch at 2; reduce-scattered once a micro-batch at 3. Updated weights are gathered once at 1 and 2; at 3 every
    module's weights are, for each micro-batch, and again in backward where the model is larger than what is kept.
    """
    ranks, size = sharding.world_size, work.parameters
    if ranks == 1:
        return 0.0, 0.0
    buckets = max(1.0, size.trained / sharding.reduce_bucket)
    if sharding.zero_stage == 3:
        readings = accumulation * (1 if size.total <= sharding.max_live else 2)
        elements = FLOAT32 * size.trained * accumulation + sharding.element * size.total * readings
        messages = buckets * accumulation + readings * size.tensors / PARAMETERS_OF_A_MODULE
    else:
        times = accumulation if sharding.zero_stage == 2 else 1
        weights = sharding.element * size.trained if sharding.zero_stage else 0
        elements = 2 * FLOAT32 * size.trained * times + weights
        messages = 2 * buckets * times + (1 if weights else 0)
    elements += FLOAT32 * work.contrast_width * batch
    sent = elements * (ranks - 1) / ranks
    if ranks <= accelerator.per_node:
        bandwidth, latency = accelerator.inside_bandwidth * INTRA_EFFICIENCY, INTRA_LATENCY
    else:
        bandwidth, latency = network.bandwidth * network.efficiency, network.latency
    # NCCL's trees make the latency between many nodes grow with the logarithm of their number.
    return sent, sent / bandwidth + messages * latency * math.log2(ranks)
