"""Progress of a run, for display. Imports nothing heavy, because the command line does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Position, loss and speed of a run."""

    stage: str
    stage_step: int
    stage_steps: int
    step: int  # over all stages
    total_steps: int
    loss: float
    samples_per_second: float
    seconds_left: float  # in this stage


Report = Callable[[Progress], None]
