"""Loss curves as the lines and labels of a small drawing; the page's template makes SVG of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 24  # margins
MOST_POINTS = 400  # drawn; a longer curve shows the mean of as many stretches


@dataclass(frozen=True)
class Curve:
    """One stage's losses in units of the drawing; y grows downwards."""

    name: str
    line: str  # 'x,y x,y …'
    end: tuple[float, float]
    last: float
    first_step: int
    last_step: int
    ticks: list[tuple[float, str]]  # (y, label)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


def curve(name: str, points: Sequence[tuple[int, float]]) -> Curve:
    """The drawing of (step, loss) points in the order of their steps; points that are not finite are left out."""
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)] or [(0, 0.0)]
    shown = thinned(finite)
    low, high, ticks = scale([loss for _, loss in shown])
    first, last = shown[0][0], shown[-1][0]

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(last - first, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)
        return round(x, 1), round(y, 1)

    places = [place(step, loss) for step, loss in shown]
    return Curve(
        name=name,
        line=" ".join(f"{x},{y}" for x, y in places),
        end=places[-1],
        last=finite[-1][1],
        first_step=finite[0][0],
        last_step=finite[-1][0],
        ticks=[(place(first, tick)[1], f"{tick:g}") for tick in ticks],
    )


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of as many stretches, all but the last of them equally long."""
    size = max(-(-len(points) // most), 1)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


def scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Round bounds around the values, and three to six round ticks."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0)
    unit = 10 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    bottom, top = math.floor(low / step), math.ceil(high / step)
    top = max(top, bottom + 1)
    return bottom * step, top * step, [round(n * step, 10) for n in range(bottom, top + 1)]
