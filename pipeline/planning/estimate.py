"""Estimates of a stage from its work, the hardware and stated assumptions: memory, time, storage, cost, scaling.

A step takes its FLOPs at an assumed fraction of the accelerator's peak, plus the communication that backward does not
overlap. The memory is that of DeepSpeed 0.19's allocations at each ZeRO stage; the model was derived from its sources
and is verified on running engines (`mome bench step`). Nothing is measured here.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass

GB, TERA = 10**9, 10**12
PCIE = 25 * GB  # generation 4, 16 streams, as measured in copies
INTRA_LATENCY, INTRA_EFFICIENCY = 5e-6, 0.8  # of collectives inside a node
FLOAT32 = 4
MOMENTS = 2 * FLOAT32
ALIGNMENT = 2  # elements: DeepSpeed pads flat buffers to a multiple of 2 W, W ranks
WHOLE_BUCKET = 500_000_000  # elements that ZeRO 0 reduces at a time
CONTEXT_BYTES = 1.5e9  # CUDA context, NCCL buffers and cuBLAS workspace
PARAMETERS_OF_A_MODULE = 2  # gathered together by ZeRO 3: typically a weight and its bias


@dataclass(frozen=True)
class Accelerator:
    """Peak performance of one accelerator, from its manufacturer's data sheet."""

    name: str
    flops: float  # dense bfloat16 per second
    memory_bytes: float
    inside_bandwidth: float = PCIE  # bytes per second to others of the node, one direction
    per_node: int = 8


@dataclass(frozen=True)
class Network:
    """Interconnect between nodes. `latency` is that of one step of a collective, in seconds."""

    name: str
    bandwidth: float  # bytes per second per accelerator, one direction
    latency: float
    efficiency: float  # fraction of the bandwidth that collectives of large messages reach


ACCELERATORS = {
    item.name: item
    for item in (
        Accelerator("b200", 2250 * TERA, 180 * GB, 900 * GB),
        Accelerator("h200", 989 * TERA, 141 * GB, 450 * GB),
        Accelerator("h100", 989 * TERA, 80 * GB, 450 * GB),  # SXM5
        Accelerator("h100-pcie", 756 * TERA, 80 * GB),
        Accelerator("a100-80", 312 * TERA, 80 * GB, 300 * GB),
        Accelerator("a100-40", 312 * TERA, 40 * GB, 300 * GB),
        Accelerator("l40s", 362 * TERA, 48 * GB),
        Accelerator("a10g", 70 * TERA, 24 * GB),
        Accelerator("v100", 125 * TERA, 32 * GB, 150 * GB),  # float16; it does not support bfloat16
        Accelerator("mi300x", 1307 * TERA, 192 * GB, 448 * GB),
    )
}
NETWORKS = {
    item.name: item
    for item in (
        Network("nvlink", 450 * GB, 5e-6, 0.8),  # every accelerator in one NVLink domain
        Network("ib-400", 50 * GB, 10e-6, 0.85),  # InfiniBand NDR, a card each
        Network("ib-200", 25 * GB, 10e-6, 0.85),  # InfiniBand HDR, a card each
        Network("efa-400", 50 * GB, 20e-6, 0.7),  # AWS p5: 3,200 Gbit/s a node of eight
        Network("ethernet-100", 100 * GB / 8 / 8, 40e-6, 0.7),  # one card of 100 Gbit/s for the eight of a node
        Network("ethernet-25", 25 * GB / 8 / 8, 50e-6, 0.7),  # one card of 25 Gbit/s for the eight of a node
    )
}


def accelerator_like(device: str) -> Accelerator | None:
    """Return the accelerator with the driver's name `device` ("NVIDIA H100 80GB HBM3"), or None if it is unknown."""
    words = device.lower().replace("-", " ").split()
    matches = [accelerator for name, accelerator in ACCELERATORS.items() if name.split("-")[0] in words]
    if len(matches) > 1:
        small = any(word in ("40gb", "pcie") for word in words)
        matches = [match for match in matches if match.name.endswith(("-40", "-pcie")) == small] or matches
    return matches[0] if matches else None


@dataclass(frozen=True)
class Line:
    """A quantity that grows linearly with the examples of a micro-batch."""

    fixed: float
    per_example: float

    def at(self, examples: float) -> float:
        return max(0.0, self.fixed + self.per_example * examples)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a stage's model, in elements."""

    trained: int
    total: int
    buffers: int  # bytes
    largest: int  # elements of the largest parameter
    tensors: int = 1  # number of parameter tensors


@dataclass(frozen=True)
class Work:
    """Requirements of one training step on a rank, measured by `pipeline.training.workload`."""

    parameters: Parameters
    flops: Line  # forward and backward of a rank's examples in one micro-batch
    flops_per_example_accumulated: float  # with accumulation, including repeated forwards
    activations: Line  # bytes alive when the backward of a micro-batch begins
    workspace: Line  # bytes that the backward allocates in addition
    tokens: Line  # positions that enter the encoder, over all forwards
    batch_bytes_per_example: float  # size of the loader's output
    contrast_flops: int  # ITC of the global batch, which every rank computes
    contrast_bytes: int  # peak memory of that
    contrast_width: int  # gathered feature values per example

    def step_flops(self, share: int, accumulation: int) -> float:
        """Return a rank's FLOPs per step for its share of the global batch."""
        if accumulation == 1:
            return self.flops.at(share) + self.contrast_flops
        return self.flops_per_example_accumulated * share + self.contrast_flops


@dataclass(frozen=True)
class Sharding:
    """Distribution of state over the ranks, and the engine settings that size its buffers."""

    zero_stage: int
    world_size: int
    element: int  # bytes per element of the model's weights: 4, or 2 of bfloat16
    reduce_bucket: int  # elements
    max_live: int  # elements of gathered weights that ZeRO 3 keeps
    offload_optimizer: bool = False
    offload_parameters: bool = False
    averages: bool = False  # whether an exponential moving average of the weights exists
    fused_update: bool = True  # whether Adam is one kernel without temporaries (CUDA)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device by category, and the part of its state in host memory."""

    states: float  # weights, master weights, moments, moving average
    gradients: float
    buffers: float  # permanent buffers of the engine and the model
    activations: float  # alive when backward begins
    backward: float  # temporaries of backward: activation gradients, buckets, gathered weights
    update: float  # temporaries of the optimizer step
    loader: float  # this rank's examples and the swapped ones
    host: float

    @property
    def total(self) -> float:
        """Peak bytes on the device: those of the backward or of the update, whichever needs more."""
        permanent = self.states + self.gradients + self.buffers + self.loader
        return permanent + max(self.activations + self.backward, self.update)

    def as_json(self) -> dict[str, int]:
        return {name: round(size) for name, size in {**asdict(self), "total": self.total}.items()}


def memory_of(
    parameters: Parameters, sharding: Sharding, activations: float = 0.0, workspace: float = 0.0, loader: float = 0.0
) -> Memory:
    """Return the memory of one rank. `workspace` are the bytes that backward allocates besides the activations."""
    stage, element = sharding.zero_stage, sharding.element
    trained, ranks = parameters.trained, sharding.world_size
    # Elements of one rank's part of a flat buffer: of the trained weights, and of all.
    part, part_of_all = (float(ALIGNMENT * math.ceil(n / (ALIGNMENT * ranks))) for n in (trained, parameters.total))
    # Bytes of a float32 copy of a weight, and of a second gradient, that only bfloat16 weights have.
    extra_copy, extra_gradient = (0, 0) if element == FLOAT32 else (FLOAT32, element)
    # torch's per-tensor loop takes two float32 copies of the largest tensor; one fused kernel takes none.
    adam = 0 if sharding.fused_update else 2 * FLOAT32
    weights, optimizer, gradients = float(element * parameters.total), (FLOAT32 + MOMENTS) * part, FLOAT32 * part
    buffers = backward = host = 0.0
    update, bucket = adam * part, min(sharding.reduce_bucket, trained)
    if stage == 0:  # everything on every rank; gradients are summed in one flat copy
        optimizer, gradients = (extra_copy + MOMENTS) * trained, (FLOAT32 + extra_gradient) * trained
        flat_copy = FLOAT32 * min(trained, WHOLE_BUCKET) if ranks > 1 else 0.0
        update = max(flat_copy, adam * parameters.largest)
    elif stage == 1 and element < FLOAT32 and not sharding.offload_optimizer:
        # Whole, flat weights. Gradients are whole: in bfloat16 and, summed over micro-batches, in float32.
        gradients = (FLOAT32 + element) * trained
    elif stage in (1, 2):  # whole, flat weights; master weights, moments and gradients partitioned
        # Buckets of bfloat16 are summed as float32, the engine's communication type.
        backward = sharding.reduce_bucket * element + extra_copy * bucket
        update = FLOAT32 * part + adam * part
        if sharding.offload_optimizer:
            host, optimizer = optimizer + (FLOAT32 + element) * part, 0.0
            gradients, update = element * parameters.largest, 0.0
    else:  # everything partitioned; weights are gathered for use, and kept up to `max_live` elements
        weights, buffers = element * part_of_all, sharding.reduce_bucket * FLOAT32
        # A bucket's copy in rank order and, if its type differs, the gradients it was filled from.
        backward = element * min(parameters.total, sharding.max_live) + (FLOAT32 + extra_gradient) * bucket
        if sharding.offload_optimizer:
            host, optimizer, gradients, update = optimizer + gradients, 0.0, 0.0, 0.0
        if sharding.offload_parameters:
            host, weights = host + weights, 0.0
    states = weights + optimizer + (FLOAT32 * part if sharding.averages else 0.0)
    buffers += parameters.buffers
    return Memory(states, gradients, buffers, activations, backward + workspace, update, loader, host)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the estimate, which are printed with it. Each is an option of `mome plan`."""

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
    usable_bytes: float  # of the device, without the context's memory and what fragmentation loses
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


def estimate(
    stage: StageSettings, sharding: Sharding, accelerator: Accelerator, network: Network, assumptions: Assumptions
) -> StageEstimate:
    """Return the estimate on `sharding.world_size` accelerators."""
    work, ranks, batch = stage.work, sharding.world_size, stage.global_batch_size
    room = accelerator.memory_bytes * (1 - assumptions.headroom) - CONTEXT_BYTES
    share = math.ceil(batch / ranks)
    accumulation = math.ceil(share / max(1, min(share, stage.micro_batch_size or share)))
    examples = math.ceil(share / accumulation)
    memory = memory_at(work, sharding, share, examples)
    flops = work.step_flops(share, accumulation)
    compute = flops / (accelerator.flops * assumptions.mfu)
    moved, communication = _communication(work, sharding, accelerator, network, accumulation, batch)
    step = compute + max(0.0, communication - assumptions.overlap * compute)
    samples = batch / step
    checkpoint = FLOAT32 * work.parameters.total + (MOMENTS + FLOAT32 * sharding.averages) * work.parameters.trained
    hours = stage.steps * step / assumptions.goodput / 3600
    return StageEstimate(
        stage.name, work.parameters, ranks, share, micro_batch_size=examples, accumulation=accumulation,
        memory=memory, usable_bytes=room, fits=memory.total <= room,
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
