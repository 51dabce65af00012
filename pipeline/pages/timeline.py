"""Measures of several stages over one axis, as the lines and labels of a drawing; a page's template makes SVG of them.

Each measure has a panel of its own, one above the other; stages are bands of the axis they share, and what happened is
marked across all panels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.pages.curves import scale, thinned

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 34, 22  # margins: stages' names and marks stand above, the axis below
GAP = 26  # between panels, for a panel's name
LOG_RATIO = 30  # positive values that span more are drawn on a logarithmic axis
SECONDS = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (72 * 3600.0, 3600.0, "h"), (math.inf, 86400.0, "d"))


@dataclass(frozen=True)
class Stretch:
    """Points (x, value) of one stage that one process recorded: a line."""

    stage: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Measure:
    name: str
    stretches: Sequence[Stretch]
    height: int = 90


@dataclass(frozen=True)
class Mark:
    x: float
    kind: str
    told: str


@dataclass(frozen=True)
class Line:
    stage: int
    points: str  # 'x,y x,y …'


@dataclass(frozen=True)
class Panel:
    name: str
    top: float
    bottom: float
    lines: list[Line]
    dots: list[tuple[int, float, float]]  # (stage, x, y) of stretches of one point
    ticks: list[tuple[float, str]]  # (y, label)
    is_logarithmic: bool


@dataclass(frozen=True)
class Band:
    stage: int
    x: float
    width: float
    name: str  # empty where there is no room for it


@dataclass(frozen=True)
class Timeline:
    """In units of the drawing; y grows downwards."""

    width: int
    height: float
    left: int
    right: int
    panels: list[Panel]
    bands: list[Band]
    marks: list[tuple[float, str, str]]  # (x, kind, told)
    ticks: list[tuple[float, str]]  # (x, label)


def timeline(
    measures: Sequence[Measure],
    stages: Sequence[tuple[str, float, float]],
    marks: Sequence[Mark],
    width: int,
    in_seconds: bool,
) -> Timeline:
    """`stages`: (name, first x, last x) of each stage that was begun. x is a step, or seconds since the start."""
    found = [x for measure in measures for stretch in measure.stretches for x, _ in stretch.points]
    edges = [x for _, first, last in stages for x in (first, last)]
    across = _Across([*found, *edges, *(mark.x for mark in marks)], width)
    panels, top = [], float(TOP)
    for measure in measures:
        panels.append(_panel(measure, across, top + GAP))
        top = panels[-1].bottom
    bands = [_band(number, name, across(first), across(last)) for number, (name, first, last) in enumerate(stages)]
    told = [(round(across(mark.x), 1), mark.kind, mark.told) for mark in marks]
    ticks = [(round(across(x), 1), label) for x, label in _ticks(across, in_seconds)]
    return Timeline(width, top + BOTTOM, LEFT, RIGHT, panels, bands, told, ticks)


class _Across:
    """The axis that all panels share."""

    def __init__(self, values: Iterable[float], width: int):
        found = [*values] or [0.0]
        self.low, self.high, self.width = min(found), max(found), width
        if self.high == self.low:
            self.high = self.low + 1

    def __call__(self, x: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (x - self.low) / (self.high - self.low)


def _panel(measure: Measure, across: _Across, top: float) -> Panel:
    finite = [
        Stretch(each.stage, [(x, value) for x, value in each.points if math.isfinite(value)])
        for each in measure.stretches
    ]
    values = [value for each in finite for _, value in each.points] or [0.0, 1.0]
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    low, high, ticks = _decades(values) if logarithmic else scale(values)

    def place(value: float) -> float:
        share = math.log(high / value) / math.log(high / low) if logarithmic else (high - value) / (high - low)
        return round(top + measure.height * share, 1)

    lines, dots = [], []
    for each in finite:
        spots = [(round(across(x), 1), place(value)) for x, value in thinned(each.points, across.width // 2)]
        if len(spots) == 1:
            dots.append((each.stage, *spots[0]))
        elif spots:
            lines.append(Line(each.stage, " ".join(f"{x:g},{y:g}" for x, y in spots)))
    drawn = [(place(tick), f"{tick:g}") for tick in ticks]
    return Panel(measure.name, top, top + measure.height, lines, dots, drawn, logarithmic)


def _decades(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Bounds and ticks of a logarithmic axis: powers of ten, and no more than five of them named."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    each = -(-(high - low) // 4)
    return 10.0**low, 10.0**high, [10.0**power for power in range(low, high + 1, each)]


def _band(stage: int, name: str, start: float, end: float) -> Band:
    room = (end - start) / 6.5  # letters
    shown = name if len(name) <= room else f"{name[: int(room) - 1]}…" if room >= 4 else ""
    return Band(stage, round(start, 1), round(end - start, 1), shown)


def _ticks(across: _Across, in_seconds: bool) -> list[tuple[float, str]]:
    span = across.high - across.low
    unit, name = next((unit, f" {name}") for most, unit, name in SECONDS if span <= most) if in_seconds else (1.0, "")
    marks = scale([across.low / unit, across.high / unit])[2]
    inside = [mark for mark in marks if across.low / unit <= mark <= across.high / unit]
    return [(mark * unit, f"{mark:,g}{name}") for mark in inside]
