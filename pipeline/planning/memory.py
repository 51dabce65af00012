"""Memory of one rank by category, as DeepSpeed 0.19's engines lay it out for each ZeRO stage.

Read in its sources and found again on running engines (`mome bench step`). W ranks; P trained and F frozen elements; b
bytes of an element of the model (2 in bfloat16, 4 in float32). Where two moments compete for the peak, both are counted
and the larger one is the total:

- backward: the activations, and what reduces gradients bucket by bucket;
- the update: gradients as float32 partitions, and what Adam holds for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.planning.work import Parameters

FLOAT32 = 4
MOMENTS = 2 * FLOAT32
ALIGNMENT = 2  # elements: DeepSpeed pads a flat buffer to a multiple of 2 W


@dataclass(frozen=True)
class Sharding:
    """How state lies on the ranks, and the engine's settings that decide what it buffers."""

    zero_stage: int
    world_size: int
    precision: Literal["float32", "bfloat16"]
    reduce_bucket: int  # elements
    allgather_bucket: int  # elements
    max_live: int  # elements of gathered weights that ZeRO 3 keeps
    offload_optimizer: bool = False
    offload_parameters: bool = False
    averages: bool = False  # an exponential moving average of the weights is kept
    accumulates: bool = False  # a step is several micro-batches
    fused_update: bool = True  # Adam in one kernel, which holds nothing beside its state (CUDA)

    @property
    def element(self) -> int:
        return 2 if self.precision == "bfloat16" else FLOAT32

    def part(self, elements: float) -> float:
        """Elements of a flat buffer on one rank."""
        step = ALIGNMENT * self.world_size
        return -(-elements // step) * step / self.world_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, and what of its state lies in host memory."""

    states: float  # weights that forward reads, master weights, moments, moving average
    gradients: float
    buffers: float  # of the engine and the model, whatever happens
    activations: float  # alive when backward begins
    backward: float  # for a moment, beside the activations: their gradients, buckets, gathered weights
    update: float  # for a moment, in the optimiser's step
    loader: float  # this rank's rows of the batch, and those exchanged
    host: float = 0.0

    @property
    def total(self) -> float:
        """The most at any moment."""
        held = self.states + self.gradients + self.buffers + self.loader
        return held + max(self.activations + self.backward, self.update)

    def as_json(self) -> dict[str, int]:
        names = ("states", "gradients", "buffers", "activations", "backward", "update", "loader", "host", "total")
        return {name: round(getattr(self, name)) for name in names}


def memory_of(
    parameters: Parameters, sharding: Sharding, activations: float = 0.0, workspace: float = 0.0, loader: float = 0.0
) -> Memory:
    """What one rank needs. `workspace` is what a micro-batch's backward holds beside its activations."""
    layout = {0: _whole, 1: _partitioned, 2: _partitioned, 3: _gathered}[sharding.zero_stage]
    found = layout(parameters, sharding)
    average = FLOAT32 * sharding.part(parameters.trained) if sharding.averages else 0.0
    return Memory(
        states=found.states + average,
        gradients=found.gradients,
        buffers=found.buffers + parameters.buffers,
        activations=activations,
        backward=found.backward + workspace,
        update=found.update,
        loader=loader,
        host=found.host,
    )


@dataclass(frozen=True)
class _Layout:
    states: float
    gradients: float
    buffers: float
    backward: float
    update: float
    host: float = 0.0


def _whole(parameters: Parameters, sharding: Sharding) -> _Layout:
    """ZeRO 0: everything on every rank; gradients are summed in one flat copy of at most 500 M elements."""
    trained, element = parameters.trained, sharding.element
    masters = 0 if sharding.precision == "float32" else FLOAT32 * trained
    return _Layout(
        states=element * parameters.total + masters + MOMENTS * trained,
        gradients=FLOAT32 * trained + (0 if sharding.precision == "float32" else element * trained),
        buffers=0.0,
        backward=0.0,
        update=max(
            FLOAT32 * min(trained, 500_000_000) if sharding.world_size > 1 else 0.0,
            _adam(sharding, parameters.largest),
        ),
    )


def _partitioned(parameters: Parameters, sharding: Sharding) -> _Layout:
    """ZeRO 1 and 2: weights whole and flat; master weights and moments cut over the ranks."""
    if sharding.zero_stage == 1 and sharding.precision == "bfloat16" and not sharding.offload_optimizer:
        return _bfloat16_states(parameters, sharding)
    element, part = sharding.element, sharding.part(parameters.trained)
    optimizer = (FLOAT32 + MOMENTS) * part
    bucket = sharding.reduce_bucket * element
    # A bucket of bfloat16 is summed as float32, which is what the engine is told to speak.
    spoken = FLOAT32 * min(sharding.reduce_bucket, parameters.trained) if element != FLOAT32 else 0
    gradients, update = FLOAT32 * part, FLOAT32 * part + _adam(sharding, part)
    host = 0.0
    if sharding.offload_optimizer:
        host, optimizer = optimizer + (FLOAT32 + element) * part, 0.0
        gradients, update = element * parameters.largest, 0.0
    return _Layout(
        states=element * (parameters.trained + parameters.frozen) + optimizer,
        gradients=gradients,
        buffers=0.0,
        backward=bucket + spoken,
        update=update,
        host=host,
    )


def _bfloat16_states(parameters: Parameters, sharding: Sharding) -> _Layout:
    """ZeRO 1 in bfloat16: gradients whole, in bfloat16 and, summed over micro-batches, in float32."""
    part, element = sharding.part(parameters.trained), sharding.element
    return _Layout(
        states=element * parameters.total + (FLOAT32 + MOMENTS) * part,
        gradients=(FLOAT32 + element) * parameters.trained,
        buffers=0.0,
        backward=0.0,
        update=_adam(sharding, part),
    )


def _gathered(parameters: Parameters, sharding: Sharding) -> _Layout:
    """ZeRO 3: all is cut over the ranks; weights are gathered for the step, and kept up to `max_live` elements."""
    element, part = sharding.element, sharding.part(parameters.trained)
    weights = element * sharding.part(parameters.total)
    optimizer, gradients = (FLOAT32 + MOMENTS) * part, FLOAT32 * part
    host = 0.0
    update = _adam(sharding, part)
    if sharding.offload_optimizer:
        host, optimizer, gradients, update = optimizer + gradients, 0.0, 0.0, 0.0
    if sharding.offload_parameters:
        host, weights = host + weights, 0.0
    gathered = element * min(parameters.total, sharding.max_live)
    # A bucket's copy in the ranks' order; and, where the bucket is of another type, the gradients it was filled from.
    scattered = FLOAT32 + (0 if element == FLOAT32 else element)
    scattered *= min(sharding.reduce_bucket, parameters.trained)
    return _Layout(
        states=weights + optimizer,
        gradients=gradients,
        buffers=sharding.reduce_bucket * FLOAT32,
        backward=gathered + scattered,
        update=update,
        host=host,
    )


def _adam(sharding: Sharding, elements: float) -> float:
    """What torch's loop over tensors holds for the largest: two float32 of its size."""
    return 0.0 if sharding.fused_update else 2 * FLOAT32 * elements
