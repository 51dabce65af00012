"""Loss spikes: back to the last checkpoint, and past the data that made the loss jump (PaLM, arXiv 2204.02311, 5.1).

The data order is a function of the step (contract C1), so leaving batches out is a matter of numbers: after a rollback
the stage's step s reads the batch of a later step. Which, and the losses that the next spike is judged by, are part of
every checkpoint. A run that is killed after a rollback and before its next checkpoint meets the spike again and leaves
out the same batches, because the same losses lead to the same decision.

A *step* counts the stage's updates, a *batch* what is read: batch = step + the batches left out before it.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from pipeline.config.errors import RunFailed
from pipeline.config.schema import SpikeConfig

Skipped = tuple[int, int]  # the batches start … stop - 1 of a stage


@dataclass(frozen=True)
class Spike:
    """A loss that jumped in `step`, which read `batch`; it is the stage's `number`th."""

    number: int
    step: int
    batch: int
    loss: float
    median: float


class SpikeFound(Exception):
    """Not an end of the run: the stage is to be taken up again from its last checkpoint, past the spike."""

    def __init__(self, spike: Spike):
        super().__init__(f"step {spike.step}: the loss {spike.loss:.4g} is far above the median {spike.median:.4g}")
        self.spike = spike


class SpikeGuard:
    """The losses of late, and which batches of the stage are left out. The same on every rank."""

    def __init__(self, config: SpikeConfig | None):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window if config else 1)
        self.skipped: list[Skipped] = []
        self._rollbacks = 0  # more than ranges left out where two spikes came before the next checkpoint

    def state(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        losses = list(self._losses) if self.config else []
        return {"skipped": [list(each) for each in self.skipped], "rollbacks": self._rollbacks, "losses": losses}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped = [(start, stop) for start, stop in state.get("skipped", [])]
        self._rollbacks = state.get("rollbacks", 0)
        self._losses.clear()
        self._losses.extend(state.get("losses", []))

    def batch_of(self, step: int) -> int:
        """Which batch a step reads, from the place on that the guard was restored to."""
        return step + sum(stop - start for start, stop in self.skipped)

    def judge(self, step: int, loss: float) -> None:
        """One step's loss of the whole batch, before its update. Raises SpikeFound."""
        if self.config is None:
            return
        if len(self._losses) == self.config.window:
            median = statistics.median(self._losses)
            if loss > self.config.factor * median:
                raise SpikeFound(Spike(self._rollbacks + 1, step, self.batch_of(step), loss, median))
        self._losses.append(loss)

    def skip(self, spike: Spike, resumed_at: int, stage: str) -> Skipped:
        """Leave out what was read since the step now resumed at, up to the spike and `skip` more. Called once restored.

        Raises RunFailed when the stage had its rollbacks.
        """
        assert self.config is not None
        if spike.number > self.config.max_rollbacks:
            raise RunFailed(
                f"stage {stage}, step {spike.step}: the loss jumped to {spike.loss:.4g} (median of the last "
                f"{self.config.window}: {spike.median:.4g}) after {self.config.max_rollbacks} rollbacks; "
                "guards.spike.max_rollbacks allows no more. Look at the data; lower optimizer.lr, or "
                "clip with optimizer.max_grad_norm."
            )
        left_out = (self.batch_of(resumed_at), spike.batch + 1 + self.config.skip)
        self.skipped.append(left_out)
        self._rollbacks = spike.number
        return left_out
