"""Chart of the scaling curve, as one self-contained SVG.

Both axes are logarithmic: GPUs on x, samples per second on y; the dashed line is ideal scaling from one GPU.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from html import escape

from jobs.plan import StagePlan, Target, assumptions_of
from pipeline.pages.page import signature
from pipeline.planning.estimate import Point

WIDTH, LEFT, TOP, RIGHT, PLOT_BOTTOM = 900, 90, 50, 200, 390
LINE_CHARACTERS, LINE_HEIGHT = 120, 14  # of the assumptions below the plot, at 10 px
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def scaling_svg(plans: list[StagePlan], target: Target, title: str) -> str:
    """Every stage's curve, with the assumptions below it."""
    points = [point for plan in plans for point in plan.scaling]
    across = _LogAxis(1, max(point.gpus for point in points), LEFT, WIDTH - RIGHT)
    low, high = (chosen(point.samples_per_second for point in points) for chosen in (min, max))
    ideal = max(plan.scaling[0].samples_per_second * plan.scaling[-1].gpus for plan in plans)
    up = _LogAxis(low / 1.5, max(high, ideal) * 1.2, PLOT_BOTTOM, TOP)
    body = [*_frame(across, up, title)]
    for number, plan in enumerate(plans):
        body += _stage(plan.chosen.name, plan.scaling, COLOURS[number % len(COLOURS)], across, up)
    lines = [part for line in assumptions_of(plans, target) for part in textwrap.wrap(line.strip(), LINE_CHARACTERS)]
    for row, line in enumerate(lines):
        body.append(_text(LEFT, PLOT_BOTTOM + 55 + LINE_HEIGHT * row, line, "start", 10))
    height = PLOT_BOTTOM + 65 + LINE_HEIGHT * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        f"<desc>{signature(title)}</desc>"
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(body)}</svg>\n'
    )


class _LogAxis:
    """A logarithmic axis from one value to another, on the pixels between two places."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high = low, max(high, low * 2)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def decades(self) -> Iterator[float]:
        for power in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1):
            yield 10.0**power


def _frame(across: _LogAxis, up: _LogAxis, title: str) -> Iterator[str]:
    yield _text(WIDTH / 2, 24, title, "middle", 15)
    yield f'<path d="M{LEFT} {TOP}V{PLOT_BOTTOM}H{WIDTH - RIGHT}" stroke="black" fill="none"/>'
    gpus = 1
    while gpus <= across.high:
        yield _text(across(gpus), PLOT_BOTTOM + 16, str(gpus), "middle", 11)
        gpus *= 2
    for value in up.decades():
        yield f'<path d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd" fill="none"/>'
        yield _text(LEFT - 6, up(value) + 4, f"{value:,.0f}", "end", 11)
    yield _text((LEFT + WIDTH - RIGHT) / 2, PLOT_BOTTOM + 33, "GPUs", "middle", 12)
    yield _text(LEFT - 6, TOP - 10, "samples/s", "end", 12)


def _stage(name: str, points: list[Point], colour: str, across: _LogAxis, up: _LogAxis) -> Iterator[str]:
    path = " ".join(f"{across(p.gpus):.1f},{up(p.samples_per_second):.1f}" for p in points)
    first, last = points[0], points[-1]
    ideal = f"M{across(1):.1f} {up(first.samples_per_second):.1f}"
    ideal += f"L{across(last.gpus):.1f} {up(first.samples_per_second * last.gpus):.1f}"
    yield f'<path d="{ideal}" stroke="{colour}" stroke-dasharray="4 4" stroke-opacity="0.5" fill="none"/>'
    yield f'<polyline points="{path}" stroke="{colour}" stroke-width="2" fill="none"/>'
    for point in points:
        place = f'cx="{across(point.gpus):.1f}" cy="{up(point.samples_per_second):.1f}"'
        yield f'<circle {place} r="3" fill="{colour if point.fits else "white"}" stroke="{colour}"/>'
    label = f"{name}, {last.efficiency:.0%} at {last.gpus}"
    yield _text(across(last.gpus) + 8, up(last.samples_per_second) + 4, label, "start", 11, colour)


def _text(x: float, y: float, label: str, anchor: str, size: int, colour: str = "black") -> str:
    position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {position} font-size="{size}" fill="{colour}">{escape(label)}</text>'
