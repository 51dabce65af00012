"""The engine protocol of the training step, the timing of forwards, and the fragments that checkpoints store.

A fragment is a range of one parameter: its float32 master weight, its Adam moments and, if the stage keeps one, its
moving average. Checkpoints store fragments, which are readable at any world size and ZeRO stage (contract C5).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.models.forward import ForwardInput, ForwardOutput


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len) of the flattened parameter `name`. Frozen parameters have a weight only."""

    name: str
    start: int
    # "weight", "exp_avg", "exp_avg_sq" and optionally "ema", 1-d, in the engine's device and precision. They may be
    # views of its state that the next step changes.
    values: dict[str, Tensor]


class StepEngine(Protocol):
    """The part of an engine that a training step uses."""

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last` marks the last micro-batch before the update."""


class ForwardTimer:
    """Times this rank's forwards, the part of a step in which no rank waits for another (below ZeRO 3).

    A slow machine delays every rank at the next reduction, so the whole step would not identify it. On a GPU, stream
    events measure the time; they are read only where the loop waits for the device anyway.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time the forward in the block."""
        if self._is_cuda:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)

    def read(self) -> float:
        """Return the median seconds since the last call; 0 without a forward. Call it once the device has finished.

        The median is insensitive to the first steps and to those with an execution-order check.
        """
        self._seconds += [start.elapsed_time(end) / 1000 for start, end in self._events]
        median = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds, self._events = [], []
        return median
