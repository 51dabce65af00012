"""How far a run has come and how fast: what its ranks tell whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.loading.loader import Loader


@dataclass(frozen=True)
class Progress:
    """Where the run stands, for whoever shows it."""

    stage: str
    stage_step: int
    stage_steps: int
    step: int  # over all stages
    total_steps: int
    loss: float
    samples_per_second: float
    seconds_left: float  # in this stage


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Speed:
    steps_per_second: float
    samples_per_second: float
    wait_share: float


class Meter:
    """Speed and data wait between two readings."""

    def __init__(self, batch: int, start: int, loader: Loader):
        self.batch, self.loader = batch, loader
        self._time, self._step, self._waited = time.perf_counter(), start, loader.wait_seconds

    def read(self, step: int) -> Speed:
        """Since the last reading; `step` counts the stage's steps done."""
        now, waited = time.perf_counter(), self.loader.wait_seconds
        seconds, steps = max(now - self._time, 1e-9), step - self._step
        speed = Speed(steps / seconds, steps * self.batch / seconds, (waited - self._waited) / seconds)
        self._time, self._step, self._waited = now, step, waited
        return speed
