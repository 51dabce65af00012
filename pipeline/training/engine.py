"""What training needs of an engine: `deepspeed_engine` is the one of runs, `plain_engine` that of trials.

A fragment is a range of one parameter with its float32 master weight, Adam moments and, if the stage keeps one, moving
average: the form in which a checkpoint holds state, readable at any world size and ZeRO stage (contract C5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.models.forward import ForwardInput, ForwardOutput


@dataclass(frozen=True)
class Fragment:
    """Elements start … start + len of the flattened parameter `name`. Frozen parameters have a weight alone."""

    name: str
    start: int
    # "weight", "exp_avg", "exp_avg_sq" and perhaps "ema": 1-d, where and in the precision in which the engine holds
    # them. They may be views of its state: the next step changes them.
    values: dict[str, Tensor]


class FragmentSource(Protocol):
    """Where saved state is read from, whatever ranks wrote it."""

    optimizer_step: int

    def holds(self, name: str, kind: str) -> bool:
        """Whether anything of that kind was saved for a parameter."""
        ...

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start … stop of a parameter's weight, moment or average, 1-d float32."""
        ...


class StepEngine(Protocol):
    """What a training step itself calls."""

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last` marks the micro-batch before `step`."""


class Engine(StepEngine, Protocol):
    def step(self, rate: float) -> None:
        """Update the weights at a learning rate, which heads may multiply."""

    def gradient_norm(self) -> float: ...

    def gradients(self) -> dict[str, Tensor]:
        """The global batch's full gradients, between the last `backward` and `step`."""
        ...

    def local_gradients(self) -> list[Tensor]:
        """This rank's part of what the next `step` applies, between the last `backward` and it."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's state by category."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def restore(self, source: FragmentSource) -> None: ...

    def weights(self) -> dict[str, Tensor] | None:
        """What the stage hands over: full float32 weights, or their moving average, on rank 0; a collective call."""
        ...
