"""What the training step needs of an engine; `deepspeed_engine` is the one there is.

A fragment is a range of one parameter with its float32 master weight and Adam moments: the form in which a
checkpoint holds state, readable at any world size and ZeRO stage (contract C5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.models.passes import Outputs, Pass


@dataclass(frozen=True)
class Fragment:
    """Elements start … start + len of the flattened parameter `name`. Frozen parameters have no moments."""

    name: str
    start: int
    values: dict[str, Tensor]  # "weight", "exp_avg", "exp_avg_sq": 1-d, float32


class FragmentSource(Protocol):
    """Where saved state is read from, whatever ranks wrote it."""

    optimizer_step: int

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start … stop of a parameter's weight or moment, 1-d float32."""
        ...


class Engine(Protocol):
    def __call__(self, passes: dict[str, Pass]) -> Outputs: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last` marks the micro-batch before `step`."""

    def step(self, rate: float) -> None: ...

    def gradient_norm(self) -> float: ...

    def gradients(self) -> dict[str, Tensor]:
        """The global batch's full gradients, between the last `backward` and `step`."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def restore(self, source: FragmentSource) -> None: ...

    def weights(self) -> dict[str, Tensor] | None:
        """Full float32 weights, on rank 0; a collective call."""
        ...
