"""The scaling curve: the same global batch on 1, 2, 4, … accelerators, or the same share on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.planning.estimate import StageEstimate

SIZES = tuple(2**k for k in range(11))  # 1 to 1,024


@dataclass(frozen=True)
class Point:
    gpus: int
    samples_per_second: float
    efficiency: float  # of ideal scaling from the first point
    step_seconds: float
    micro_batch_size: int
    fits: bool
    hours: float
    cost: float


def curve(at: Callable[[int], StageEstimate], batch: int) -> list[Point]:
    """Of one stage; `at` gives the estimate for a number of accelerators. Sizes without a row each are left out."""
    points: list[Point] = []
    first: float | None = None
    for gpus in SIZES:
        if gpus > batch:
            break
        found = at(gpus)
        each = found.samples_per_second / gpus
        first = each if first is None else first
        points.append(
            Point(
                gpus,
                found.samples_per_second,
                each / first,
                found.step_seconds,
                found.micro_batch_size,
                found.fits,
                found.hours,
                found.cost,
            )
        )
    return points
