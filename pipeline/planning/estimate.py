"""Estimates of a stage from its work, the hardware and stated assumptions: memory, time, storage, cost, scaling.

A step takes its FLOPs at an assumed fraction of the accelerator's peak, plus the communication that backward does not
overlap. Nothing is measured here; every assumption is in `Assumptions` and is printed with the result.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from pipeline.planning.hardware import INTRA_EFFICIENCY, INTRA_LATENCY, Accelerator, Network
from pipeline.planning.memory import FLOAT32, MOMENTS, Memory, Parameters, Sharding, Work, memory_of

CONTEXT_BYTES = 1.5e9  # CUDA context, NCCL buffers and cuBLAS workspace
PARAMETERS_OF_A_MODULE = 2  # gathered together by ZeRO 3: typically a weight and its bias


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the estimate. Each is an option of `mome plan`."""

    mfu: float = 0.35  # model FLOPs utilization of a step without its communication
    overlap: float = 0.0  # fraction of the compute time that hides communication; the engine sets overlap_comm off
    headroom: float = 0.1  # fraction of the device memory lost to allocator fragmentation
    cpu_milliseconds: float = 2.7  # of one core to decode and augment a photo (mome bench loader)
    sample_bytes: float = 110_000.0  # per sample in storage; the manifest's mean, if known
    checkpoint_bandwidth: float = 1e9  # bytes per second to the store, all ranks together
    price: float = 0.0  # per GPU-hour
    goodput: float = 0.97  # fraction of the time spent in training steps


@dataclass(frozen=True)
class StageSettings:
    """The stage's settings that enter the estimate."""

    name: str
    steps: int
    global_batch_size: int
    images: int  # per sample
    micro_batch_size: int | None  # maximum examples per micro-batch; None: a rank's whole share
    work: Work


@dataclass(frozen=True)
class StageEstimate:
    """The estimate of one stage."""

    name: str
    parameters: Parameters
    gpus: int
    share: int  # examples of the rank with most
    micro_batch_size: int
    accumulation: int
    memory: Memory
    fits: bool
    largest_micro_batch: int  # 0: not even one example fits
    flops_per_step: float  # all ranks
    tokens_per_step: float  # positions that enter the encoder
    compute_seconds: float
    communication_seconds: float
    communication_bytes: float  # per rank and step
    step_seconds: float
    samples_per_second: float
    storage_bytes_per_second: float
    loader_cores: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    hours: float
    cost: float


def memory_at(work: Work, sharding: Sharding, share: int, examples: int) -> Memory:
    """Return the memory of a rank with `share` examples of the batch, in micro-batches of `examples`."""
    workspace = max(work.workspace.at(examples), work.contrast_bytes)  # ITC and a backward are never alive together
    loader = work.batch_bytes_per_example * share
    return memory_of(work.parameters, sharding, work.activations.at(examples), workspace, loader)


def largest_micro_batch(work: Work, sharding: Sharding, share: int, room: float) -> int:
    """Return the largest micro-batch that fits into `room` bytes; 0 if not even one example does."""
    sizes = range(1, share + 1)
    return bisect_right(sizes, room, key=lambda examples: memory_at(work, sharding, share, examples).total)


def usable_bytes(accelerator: Accelerator, assumptions: Assumptions) -> float:
    return accelerator.memory_bytes * (1 - assumptions.headroom) - CONTEXT_BYTES


def estimate(
    stage: StageSettings,
    sharding: Sharding,
    accelerator: Accelerator,
    network: Network,
    assumptions: Assumptions,
    micro_batch_size: int | None = None,
) -> StageEstimate:
    """Return the estimate on `sharding.world_size` accelerators. `micro_batch_size` overrides the stage's."""
    work, ranks, batch = stage.work, sharding.world_size, stage.global_batch_size
    share, room = math.ceil(batch / ranks), usable_bytes(accelerator, assumptions)
    accumulation = math.ceil(share / max(1, min(share, micro_batch_size or stage.micro_batch_size or share)))
    examples = math.ceil(share / accumulation)
    memory = memory_at(work, sharding, share, examples)
    flops = work.step_flops(share, accumulation)
    compute = flops / (accelerator.flops * assumptions.mfu)
    moved, communication = _communication(work, sharding, accelerator, network, accumulation, batch)
    step = compute + max(0.0, communication - assumptions.overlap * compute)
    samples = batch / step
    checkpoint = FLOAT32 * work.parameters.total + MOMENTS * work.parameters.trained
    checkpoint += FLOAT32 * work.parameters.trained if sharding.averages else 0
    hours = stage.steps * step / assumptions.goodput / 3600
    return StageEstimate(
        name=stage.name, parameters=work.parameters,
        gpus=ranks, share=share, micro_batch_size=examples, accumulation=accumulation,
        memory=memory, fits=memory.total <= room,
        largest_micro_batch=largest_micro_batch(work, sharding, share, room),
        flops_per_step=flops * batch / share, tokens_per_step=work.tokens.at(batch),
        compute_seconds=compute, communication_seconds=communication, communication_bytes=moved,
        step_seconds=step, samples_per_second=samples,
        storage_bytes_per_second=samples * assumptions.sample_bytes,
        loader_cores=samples * assumptions.cpu_milliseconds / 1000 * stage.images,
        checkpoint_bytes=checkpoint, checkpoint_seconds=checkpoint / assumptions.checkpoint_bandwidth,
        hours=hours, cost=hours * ranks * assumptions.price,
    )  # fmt: skip


def _communication(
    work: Work, sharding: Sharding, accelerator: Accelerator, network: Network, accumulation: int, batch: int
) -> tuple[float, float]:
    """Return the bytes that one rank sends per step, and the seconds that takes with rings over the slowest link.

    An all-reduce sends 2 (W - 1) / W of the data, an all-gather or reduce-scatter half of that. Gradients are sent as
    float32: all-reduced in buckets once per step at ZeRO 0 and 1 and once per micro-batch at 2; reduce-scattered once
    per micro-batch at 3. Updated weights are gathered once at 1 and 2. At 3 the weights of every module are gathered
    for each micro-batch, and again in backward if the model exceeds `max_live`.
    """
    ranks, size = sharding.world_size, work.parameters
    if ranks == 1:
        return 0.0, 0.0
    buckets = max(1.0, size.trained / sharding.reduce_bucket)
    if sharding.zero_stage == 3:
        gathers = accumulation * (1 if size.total <= sharding.max_live else 2)
        elements = FLOAT32 * size.trained * accumulation + sharding.element * size.total * gathers
        messages = buckets * accumulation + gathers * size.tensors / PARAMETERS_OF_A_MODULE
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
    # With NCCL's trees the latency grows with the logarithm of the number of nodes.
    return sent, sent / bandwidth + messages * latency * math.log2(ranks)
