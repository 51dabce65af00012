"""A timeline's lines, bands, marks and ticks stay inside its frame, whatever the values."""

from __future__ import annotations

import itertools
import math

import pytest

from pipeline.pages.timeline import Mark, Measure, Stretch, Timeline, timeline

WIDTH = 350


def drawn(values: list[float], in_seconds: bool = False, unit: float = 1.0) -> Timeline:
    points = [(unit * number, value) for number, value in enumerate(values)]
    last = unit * max(len(values) - 1, 0)
    stretches = [Stretch(0, points)] if values else []
    return timeline(
        [Measure("loss", stretches)], [("a_stage", 0.0, last)], [Mark(last, "restart", "")], WIDTH, in_seconds
    )


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [1e-6, 1e3], [0.0, 5.0], [-1.0, 1e9], [math.nan, 1.0, 3.0]])
def test_everything_lies_inside_the_frame(values: list[float]) -> None:
    found = drawn(values)
    panel = found.panels[0]
    spots = [tuple(map(float, spot.split(","))) for line in panel.lines for spot in line.points.split()]
    spots += [(x, y) for _, x, y in panel.dots]
    assert len(spots) == sum(map(math.isfinite, values))
    assert all(found.left <= x <= WIDTH - found.right and panel.top <= y <= panel.bottom for x, y in spots)
    assert all(panel.top <= y <= panel.bottom for y, _ in panel.ticks)
    assert all(found.left <= x <= WIDTH - found.right for x, _ in found.ticks)
    assert all(found.left <= x <= WIDTH - found.right for x, _, _ in found.marks)
    assert found.bands[0].x + found.bands[0].width <= WIDTH - found.right + 0.1
    assert panel.bottom < found.height


def test_values_over_decades_are_drawn_on_a_logarithmic_axis_with_equal_steps() -> None:
    found = drawn([1000.0, 100.0, 10.0, 1.0]).panels[0]
    heights = [float(spot.split(",")[1]) for spot in found.lines[0].points.split()]
    assert found.is_logarithmic
    steps = [after - before for before, after in itertools.pairwise(heights)]
    assert steps == pytest.approx([30.0] * 3, abs=0.2)
    assert not drawn([3.0, 2.0, 1.0]).panels[0].is_logarithmic


@pytest.mark.parametrize(("unit", "name"), [(10.0, "s"), (600.0, "min"), (20_000.0, "h"), (100_000.0, "d")])
def test_the_clock_is_told_in_a_unit_that_fits(unit: float, name: str) -> None:
    labels = [label for _, label in drawn([1.0] * 8, in_seconds=True, unit=unit).ticks]
    assert 2 <= len(labels) <= 7
    assert all(label.endswith(f" {name}") for label in labels)
