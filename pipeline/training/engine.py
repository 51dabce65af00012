"""Parts of training that do not depend on DeepSpeed: engine protocol, forward timing, fragments, and the optimizer.

A fragment is a range of one parameter: its float32 master weight, its Adam moments and, if the stage keeps one, its
moving average. Checkpoints store fragments, which are readable at any world size and ZeRO stage (contract C5).
"""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OptimizerConfig
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model
from pipeline.training import release


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
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)

    def read(self) -> float:
        """Return the median seconds since the last call; 0 without a forward. Call it once the device has finished.

        The median is insensitive to the first steps and to those with an execution-order check.
        """
        seconds = [*self._seconds, *(start.elapsed_time(end) / 1000 for start, end in self._events)]
        self._seconds, self._events = [], []
        return statistics.median(seconds) if seconds else 0.0


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`: linear warm-up, then decay to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def parameter_groups(
    model: Model, config: OptimizerConfig, reproduce_vlmo_release: bool = False
) -> list[dict[str, Any]]:
    """Group the trainable parameters by whether they decay and whether they belong to a head with its own rate.

    Matrices decay; biases, norms, scales and embedding rows (fewer than two dimensions) do not. The VLMo release lists
    names instead, which misses the experts' norms. The pooler does not count as a head: it comes from pretraining, and
    the published recipes train it at the base rate. Raises ConfigError if no parameter is trainable.
    """
    heads = set(model.HEAD_PARTS) - {"pooler"}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = release.decays(name) if reproduce_vlmo_release else parameter.dim() >= 2
            is_head = config.head_lr_multiplier != 1 and model.part_of(name) in heads
            decay, factor = config.weight_decay * decays, config.head_lr_multiplier if is_head else 1.0
            empty_group = {"params": [], "weight_decay": decay, "rate_factor": factor}
            groups.setdefault((decays, is_head), empty_group)["params"].append(parameter)
    if not groups:
        raise ConfigError("no parameter is left to train: the stage's `freeze` covers all that its objectives use")
    return [groups[key] for key in sorted(groups, reverse=True)]
