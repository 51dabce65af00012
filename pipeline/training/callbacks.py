"""Callbacks: everything that surrounds a training step, and the data that the loop gives them.

A hook that calls a collective must do so on every rank in the same order, so such callbacks are attached on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.pages.charts import duration

if TYPE_CHECKING:
    from torch import nn

    from pipeline.data.batch import Batch
    from pipeline.training.health import Spike, StepHealth
    from pipeline.training.loop import StageState
    from pipeline.training.metrics import MetricsSnapshot


@dataclass(frozen=True)
class Progress:
    """Latest metrics of a run, or the `phase` it is in while it trains no steps; `losses` has each objective's mean."""

    stage: str = ""
    stage_step: int = 0
    stage_steps: int = 0
    step: int = 0  # over all stages
    total_steps: int = 0
    loss: float = 0.0
    samples_per_second: float = 0.0
    seconds_left: float = 0.0  # in this stage
    lr: float = 0.0
    losses: Mapping[str, float] = field(default_factory=dict)
    phase: str = ""

    def line(self) -> str:
        """Return 'pairs 10/150 (step 110/300)  loss 2.48 (itc 2.1, mlm 0.38)  lr 2.5e-05  43 samples/s  ETA 25 s'."""
        if self.phase:
            return self.phase
        whole = f" (step {self.step:,}/{self.total_steps:,})" if self.total_steps != self.stage_steps else ""
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        loss = f"loss {self.loss:.4f}" + (f" ({losses})" if len(self.losses) > 1 else "")
        speed = f"{self.samples_per_second:,.3g} samples/s  ETA {duration(self.seconds_left)}"
        return f"{self.stage} {self.stage_step:,}/{self.stage_steps:,}{whole}  {loss}  lr {self.lr:.2g}  {speed}"


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage: all steps completed, preempted after saving, or stopped at a loss spike."""

    num_steps: int  # completed
    preempted: bool = False
    spike: Spike | None = None


@dataclass(frozen=True)
class StepEvent:
    """A completed update: the stage's step (from 0) and its learning rate."""

    step: int
    with_metrics: bool  # metrics are collected
    lr: float
    health: StepHealth | None  # None at steps without a health check
    preempted: bool  # the ranks have agreed to save and stop after this step


class Callback:
    """Hooks of the training loop, called in the order below; by default they do nothing. `step` counts from 0."""

    state: StageState  # set once the stage is built, which is after `on_model_built`

    def on_model_built(self, model: nn.Module) -> None:
        """Called before the engine wraps the model."""

    def on_stage_start(self, start: int) -> None:
        """Called before the first step, once the stage has resumed at step `start`."""

    def before_batch(self, step: int) -> None:
        """Called before the step's batch is requested from the loader."""

    def before_step(self, step: int, batch: Batch) -> None:
        """Called before the forward."""

    def after_backward(self, step: int) -> None:
        """Called after the backward, before the health check."""

    def on_health(self, step: int, health: StepHealth) -> None:
        """Called after a health check, before the update."""

    def on_fault(self, step: int, name: str, message: str) -> None:
        """Called before the run is stopped because of a fault."""

    def after_step(self, event: StepEvent) -> None:
        """Called after the update."""

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        """Called when metrics have been collected after a step."""

    def on_stage_end(self, result: StageResult) -> None:
        """Called after the last step, before the weights are exported; not called when an error ends the stage."""

    def close(self) -> None:
        """Release resources; called whenever the stage ends."""


class Callbacks(Callback):
    """Forwards every hook to several callbacks in order; `close` in reverse order, whatever the others raise."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self.members = tuple(callbacks)
        for hook in [name for name in vars(Callback) if name.startswith(("on_", "before_", "after_"))]:
            calls = [getattr(callback, hook) for callback in self.members]
            setattr(self, hook, lambda *arguments, calls=calls: [call(*arguments) for call in calls])

    def close(self) -> None:
        with ExitStack() as stack:
            for callback in self.members:
                stack.callback(callback.close)
