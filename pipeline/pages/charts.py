"""Number formats, and polyline charts as coordinates and labels, which the pages' templates render as SVG.

A chart has one panel per measure, stacked above a shared axis (steps or seconds). Stages are bands of that axis, and
events are marks across all panels. Coordinates are in units of the drawing; y grows downwards.
"""

import math
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 34, 22  # margins: stage names and marks above, the axis below
GAP = 26  # between panels, for a panel's name
LOG_RATIO = 30  # positive values that span a larger ratio are drawn on a logarithmic axis
MAX_POINTS = 400  # of a line; more are averaged
TIME_UNITS = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (72 * 3600.0, 3600.0, "h"), (math.inf, 86400.0, "d"))
# Names of metrics and results that are fractions.
FRACTIONS = re.compile(r"(_r\d+|accuracy\w*|text_only|top\d|consistency|chance|matched|true|goodput)$")


def percent(fraction: float | None) -> str:
    """Return '12.5 %' with a no-break space: one decimal, two below one percent, a dash for None."""
    if fraction is None:
        return "–"
    return f"{fraction * 100:.{2 if 0 < round(fraction, 4) < 0.01 else 1}f}\N{NO-BREAK SPACE}%"


def significant(value: float) -> str:
    """Return four significant digits: '0.001235', '12.35', '12,346'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return `1 h 02 min`, `3 min 05 s` or `12 s`; one decimal below ten seconds."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(milliseconds: float) -> str:
    """Return a time since 1970 as '2026-11-21 18:32:05 UTC'; a dash outside the years 1970 to 9999."""
    if not 0 <= milliseconds < 253_402_300_800_000:  # the year 10000
        return "–"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class Series(NamedTuple):
    """Points (x, value) that are joined by a line; `stage` selects the colour."""

    stage: int
    points: Sequence[tuple[float, float]]


class Measure(NamedTuple):
    """The content of one panel."""

    name: str
    series: Sequence[Series]
    height: int = 90


class Mark(NamedTuple):
    """An event at `x`: a restart, a spike, an alert or an evaluation."""

    x: float
    kind: str
    text: str


class Panel(NamedTuple):
    name: str
    top: float
    bottom: float
    lines: list[tuple[int, str]]  # stage, 'x,y x,y …'
    dots: list[tuple[int, float, float]]  # (stage, x, y) of series with a single point
    ticks: list[tuple[float, str]]  # (y, label)
    is_logarithmic: bool


class Chart(NamedTuple):
    width: int
    height: float
    left: int
    right: int
    panels: list[Panel]
    bands: list[tuple[float, float, str]]  # (x, width, name) of each stage; the name is empty if it does not fit
    marks: list[Mark]
    ticks: list[tuple[float, str]]  # (x, label)


class Axis(NamedTuple):
    """Maps values between `low` and `high` to coordinates between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    is_logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.is_logarithmic:
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)


def line_chart(
    measures: Sequence[Measure],
    width: int,
    stages: Sequence[tuple[str, float, float]] = (),
    marks: Sequence[Mark] = (),
    in_seconds: bool = False,
) -> Chart:
    """Lay out a chart of `measures`. `stages` are (name, first x, last x); x is a step, or seconds since the start."""
    values = [x for measure in measures for series in measure.series for x, _ in series.points]
    values += [x for _, *edges in stages for x in edges] + [mark.x for mark in marks]
    low, high = min(values, default=0.0), max(values, default=0.0)
    high = high if high > low else low + 1
    x_of = Axis(low, high, LEFT, width - RIGHT)
    panels, bottom = [], float(TOP)
    for measure in measures:
        panels.append(_panel(measure, x_of, bottom + GAP))
        bottom = panels[-1].bottom
    bands = []
    for name, first, last in stages:
        start, length = x_of(first), x_of(last) - x_of(first)
        room = length / 6.5  # in letters
        label = name if len(name) <= room else f"{name[: int(room) - 1]}…" if room >= 4 else ""
        bands.append((round(start, 1), round(length, 1), label))
    unit, suffix = 1.0, ""
    if in_seconds:
        unit, suffix = next((unit, f" {name}") for limit, unit, name in TIME_UNITS if high - low <= limit)
    values = [tick for tick in linear_ticks([low / unit, high / unit])[2] if low / unit <= tick <= high / unit]
    ticks = [(round(x_of(tick * unit), 1), f"{tick:,g}{suffix}") for tick in values]
    placed = [mark._replace(x=round(x_of(mark.x), 1)) for mark in marks]
    return Chart(width, bottom + BOTTOM, LEFT, RIGHT, panels, bands, placed, ticks)


def _panel(measure: Measure, x_of: Axis, top: float) -> Panel:
    finite = [(s.stage, [(x, value) for x, value in s.points if math.isfinite(value)]) for s in measure.series]
    values = [value for _, points in finite for _, value in points] or [0.0, 1.0]
    is_logarithmic = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    if is_logarithmic:  # powers of ten, with at most five ticks
        first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        low, high = 10.0**first, 10.0**last
        ticks = [10.0**power for power in range(first, last + 1, -(-(last - first) // 4))]
    else:
        low, high, ticks = linear_ticks(values)
    y_of = Axis(low, high, top + measure.height, top, is_logarithmic)
    lines, dots = [], []
    for stage, points in finite:
        size = max(-(-len(points) // MAX_POINTS), 1)  # means of equally long sections; the last may be shorter
        sections = [points[start : start + size] for start in range(0, len(points), size)]
        means = [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in sections]
        placed = [(round(x_of(x), 1), round(y_of(value), 1)) for x, value in means]
        if len(placed) == 1:
            dots.append((stage, *placed[0]))
        elif placed:
            lines.append((stage, " ".join(f"{x:g},{y:g}" for x, y in placed)))
    labels = [(round(y_of(tick), 1), f"{tick:g}") for tick in ticks]
    return Panel(measure.name, top, top + measure.height, lines, dots, labels, is_logarithmic)


def linear_ticks(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return (low, high, ticks): round bounds around the values, and three to six round ticks."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0)
    unit = 10 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    bottom, top = math.floor(low / step), math.ceil(high / step)
    top = max(top, bottom + 1)
    return bottom * step, top * step, [round(n * step, 10) for n in range(bottom, top + 1)]
