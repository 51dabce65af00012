"""Lines, bands, marks and ticks of a chart stay inside its frame, whatever the values."""

import itertools
import math

import pytest

from pipeline.pages.charts import Mark, Measure, Series, line_chart

WIDTH = 350


def chart(values, in_seconds=False, unit=1.0):
    points = [(unit * number, value) for number, value in enumerate(values)]
    last = unit * max(len(values) - 1, 0)
    measure = Measure("loss", [Series(0, points)] if values else [])
    return line_chart([measure], WIDTH, [("a_stage", 0.0, last)], [Mark(last, "restart", "")], in_seconds)


def points_of(panel):
    return [tuple(map(float, point.split(","))) for _, line in panel.lines for point in line.split()]


@pytest.mark.parametrize(
    "values",
    [
        [], [1.0], [2.0, 2.0], [0.0, 0.0], [9.3, 4.1, 3.9], [1e-7, 3e-7], [1e-6, 1e3], [0.0, 5.0], [-2.0, 5.0],
        [-1.0, 1e9], [1e9, 3.0], [math.nan, 1.0, 3.0], [math.nan, math.inf], list(map(float, range(5000))),
    ],
)  # fmt: skip
def test_every_element_is_inside_the_frame(values):
    drawn = chart(values)
    panel, ((x, width, _),) = drawn.panels[0], drawn.bands
    points = points_of(panel) + [(x, y) for _, x, y in panel.dots]
    assert len(points) == min(sum(map(math.isfinite, values)), 400) or len(values) > 400 >= len(points) > 200
    assert all(drawn.left <= x <= WIDTH - drawn.right and panel.top <= y <= panel.bottom for x, y in points)
    assert 2 <= len(panel.ticks) == len({label for _, label in panel.ticks}) <= 7
    assert all(panel.top <= y <= panel.bottom for y, _ in panel.ticks)
    assert all(drawn.left <= at <= WIDTH - drawn.right for at, *_ in [*drawn.ticks, *drawn.marks])
    assert x + width <= WIDTH - drawn.right + 0.1
    assert panel.bottom < drawn.height


def test_axes_are_logarithmic_over_decades_and_use_a_fitting_unit_of_time():
    panel = chart([1000.0, 100.0, 10.0, 1.0]).panels[0]
    steps = [after - before for (_, before), (_, after) in itertools.pairwise(points_of(panel))]
    assert panel.is_logarithmic
    assert steps == pytest.approx([30.0] * 3, abs=0.2), "lower values are drawn lower"
    assert not chart([3.0, 2.0, 1.0]).panels[0].is_logarithmic
    for unit, name in ((10.0, "s"), (600.0, "min"), (20_000.0, "h"), (100_000.0, "d")):
        labels = [label for _, label in chart([1.0] * 8, in_seconds=True, unit=unit).ticks]
        assert 2 <= len(labels) <= 7
        assert all(label.endswith(f" {name}") for label in labels)
