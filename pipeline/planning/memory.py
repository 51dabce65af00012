"""Work and memory of one rank: a training step's requirements, and DeepSpeed 0.19's allocations at each ZeRO stage.

The model of DeepSpeed was derived from its sources and is verified on running engines (`mome bench step`). The peak is
the larger of two moments: backward (activations, and buckets that reduce gradients) and the update (gradients as
float32 partitions, and Adam's temporaries).
"""

from dataclasses import asdict, dataclass
from typing import Literal

FLOAT32 = 4
MOMENTS = 2 * FLOAT32
ALIGNMENT = 2  # elements: DeepSpeed pads flat buffers to a multiple of 2 W, W ranks
WHOLE_BUCKET = 500_000_000  # elements that ZeRO 0 reduces at a time


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
    frozen: int
    buffers: int  # bytes
    largest: int  # elements of the largest parameter
    tensors: int = 1  # number of parameter tensors

    @property
    def total(self) -> int:
        return self.trained + self.frozen


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
    precision: Literal["float32", "bfloat16"]
    reduce_bucket: int  # elements
    max_live: int  # elements of gathered weights that ZeRO 3 keeps
    offload_optimizer: bool = False
    offload_parameters: bool = False
    averages: bool = False  # whether an exponential moving average of the weights exists
    fused_update: bool = True  # whether Adam is one kernel without temporaries (CUDA)

    @property
    def element(self) -> int:
        """Bytes per element of the model's weights."""
        return 2 if self.precision == "bfloat16" else FLOAT32

    def part(self, elements: float) -> float:
        """Return the elements of a flat buffer on one rank."""
        step = ALIGNMENT * self.world_size
        return -(-elements // step) * step / self.world_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device by category, and the part of its state in host memory."""

    states: float = 0.0  # weights, master weights, moments, moving average
    gradients: float = 0.0
    buffers: float = 0.0  # permanent buffers of the engine and the model
    activations: float = 0.0  # alive when backward begins
    backward: float = 0.0  # temporaries of backward: activation gradients, buckets, gathered weights
    update: float = 0.0  # temporaries of the optimizer step
    loader: float = 0.0  # this rank's examples and the swapped ones
    host: float = 0.0

    @property
    def total(self) -> float:
        """Peak bytes on the device."""
        permanent = self.states + self.gradients + self.buffers + self.loader
        return permanent + max(self.activations + self.backward, self.update)

    def as_json(self) -> dict[str, int]:
        return {name: round(size) for name, size in {**asdict(self), "total": self.total}.items()}


def memory_of(
    parameters: Parameters, sharding: Sharding, activations: float = 0.0, workspace: float = 0.0, loader: float = 0.0
) -> Memory:
    """Return the memory of one rank. `workspace` are the bytes that backward allocates besides the activations."""
    stage, element = sharding.zero_stage, sharding.element
    trained, part = parameters.trained, sharding.part(parameters.trained)
    # Bytes of a float32 copy of a weight, and of a second gradient, that only bfloat16 weights have.
    extra_copy, extra_gradient = (0, 0) if element == FLOAT32 else (FLOAT32, element)
    # torch's per-tensor loop takes two float32 copies of the largest tensor; one fused kernel takes none.
    adam = 0 if sharding.fused_update else 2 * FLOAT32
    weights, optimizer, gradients = float(element * parameters.total), (FLOAT32 + MOMENTS) * part, FLOAT32 * part
    buffers = backward = host = 0.0
    update, bucket = adam * part, min(sharding.reduce_bucket, trained)
    if stage == 0:  # everything on every rank; gradients are summed in one flat copy
        optimizer, gradients = (extra_copy + MOMENTS) * trained, (FLOAT32 + extra_gradient) * trained
        flat_copy = FLOAT32 * min(trained, WHOLE_BUCKET) if sharding.world_size > 1 else 0.0
        update = max(flat_copy, adam * parameters.largest)
    elif stage == 1 and sharding.precision == "bfloat16" and not sharding.offload_optimizer:
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
        weights, buffers = element * sharding.part(parameters.total), sharding.reduce_bucket * FLOAT32
        # A bucket's copy in rank order and, if its type differs, the gradients it was filled from.
        backward = element * min(parameters.total, sharding.max_live) + (FLOAT32 + extra_gradient) * bucket
        if sharding.offload_optimizer:
            host, optimizer, gradients, update = optimizer + gradients, 0.0, 0.0, 0.0
        if sharding.offload_parameters:
            host, weights = host + weights, 0.0
    states = weights + optimizer + (FLOAT32 * part if sharding.averages else 0.0)
    buffers += parameters.buffers
    return Memory(states, gradients, buffers, activations, backward + workspace, update, loader, host)
