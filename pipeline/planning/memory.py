"""Work and memory of one rank: a training step's requirements, and DeepSpeed 0.19's allocations at each ZeRO stage.

The model of DeepSpeed was derived from its sources and is verified on running engines (`mome bench step`). The peak is
the larger of two moments:

- backward: the activations and the buckets that reduce gradients;
- the update: gradients as float32 partitions and Adam's temporaries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        """Return the line through two points (examples, value)."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - slope * first[0], slope)

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
    accumulates: bool = False  # whether a step has several micro-batches
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
    engine = {0: _zero_0, 1: _zero_1_and_2, 2: _zero_1_and_2, 3: _zero_3}[sharding.zero_stage](parameters, sharding)
    average = FLOAT32 * sharding.part(parameters.trained) if sharding.averages else 0.0
    return replace(
        engine,
        states=engine.states + average,
        buffers=engine.buffers + parameters.buffers,
        activations=activations,
        backward=engine.backward + workspace,
        loader=loader,
    )


def _zero_0(parameters: Parameters, sharding: Sharding) -> Memory:
    """Everything on every rank; gradients are summed in one flat copy."""
    trained, element = parameters.trained, sharding.element
    is_float32 = sharding.precision == "float32"
    flat_copy = FLOAT32 * min(trained, WHOLE_BUCKET) if sharding.world_size > 1 else 0.0
    return Memory(
        states=element * parameters.total + (0 if is_float32 else FLOAT32 * trained) + MOMENTS * trained,
        gradients=FLOAT32 * trained + (0 if is_float32 else element * trained),
        update=max(flat_copy, _adam_temporaries(sharding, parameters.largest)),
    )


def _zero_1_and_2(parameters: Parameters, sharding: Sharding) -> Memory:
    """Whole, flat weights; master weights and moments partitioned."""
    element, part = sharding.element, sharding.part(parameters.trained)
    if sharding.zero_stage == 1 and sharding.precision == "bfloat16" and not sharding.offload_optimizer:
        # Gradients are whole: in bfloat16 and, summed over micro-batches, in float32.
        return Memory(
            states=element * parameters.total + (FLOAT32 + MOMENTS) * part,
            gradients=(FLOAT32 + element) * parameters.trained,
            update=_adam_temporaries(sharding, part),
        )
    optimizer, host = (FLOAT32 + MOMENTS) * part, 0.0
    # Buckets of bfloat16 are summed as float32, the engine's communication type.
    float32_bucket = FLOAT32 * min(sharding.reduce_bucket, parameters.trained) if element != FLOAT32 else 0
    gradients, update = FLOAT32 * part, FLOAT32 * part + _adam_temporaries(sharding, part)
    if sharding.offload_optimizer:
        host, optimizer = optimizer + (FLOAT32 + element) * part, 0.0
        gradients, update = element * parameters.largest, 0.0
    return Memory(
        states=element * parameters.total + optimizer,
        gradients=gradients,
        backward=sharding.reduce_bucket * element + float32_bucket,
        update=update,
        host=host,
    )


def _zero_3(parameters: Parameters, sharding: Sharding) -> Memory:
    """Everything partitioned; weights are gathered for use, and kept up to `max_live` elements."""
    element, part = sharding.element, sharding.part(parameters.trained)
    weights = element * sharding.part(parameters.total)
    optimizer, gradients = (FLOAT32 + MOMENTS) * part, FLOAT32 * part
    host, update = 0.0, _adam_temporaries(sharding, part)
    if sharding.offload_optimizer:
        host, optimizer, gradients, update = optimizer + gradients, 0.0, 0.0, 0.0
    if sharding.offload_parameters:
        host, weights = host + weights, 0.0
    gathered = element * min(parameters.total, sharding.max_live)
    # A bucket's copy in rank order and, if its type differs, the gradients it was filled from.
    scattered = (FLOAT32 + (0 if element == FLOAT32 else element)) * min(sharding.reduce_bucket, parameters.trained)
    return Memory(
        states=weights + optimizer,
        gradients=gradients,
        buffers=sharding.reduce_bucket * FLOAT32,
        backward=gathered + scattered,
        update=update,
        host=host,
    )


def _adam_temporaries(sharding: Sharding, elements: float) -> float:
    """Return the bytes of torch's per-tensor loop for the largest tensor: two float32 copies."""
    return 0.0 if sharding.fused_update else 2 * FLOAT32 * elements
