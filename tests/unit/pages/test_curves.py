"""Drawn curves stay inside their frame and keep their ends."""

from __future__ import annotations

import math

import pytest

from pipeline.pages.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve


@pytest.mark.parametrize(
    "losses",
    [
        [1.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [9.3, 4.1, 3.9, 3.95],
        [1e-7, 3e-7],
        [-2.0, 5.0],
        list(range(5000)),
        [1e9, 3.0],
    ],
)
def test_every_point_and_tick_lies_inside_the_frame(losses: list[float]) -> None:
    drawn = curve("stage", list(enumerate(losses, start=100)))
    points = [tuple(map(float, each.split(","))) for each in drawn.line.split()]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    assert 2 <= len(drawn.ticks) <= 7
    assert len({label for _, label in drawn.ticks}) == len(drawn.ticks)
    assert all(TOP <= y <= HEIGHT - BOTTOM for y, _ in drawn.ticks)
    assert drawn.last == losses[-1]
    assert (drawn.first_step, drawn.last_step) == (100, 99 + len(losses))


def test_lower_losses_are_drawn_lower() -> None:
    points = [tuple(map(float, each.split(","))) for each in curve("s", [(0, 3.0), (10, 1.0)]).line.split()]
    assert points[0][1] < points[1][1]
    assert points[0][0] < points[1][0]


def test_points_that_are_not_numbers_are_left_out() -> None:
    drawn = curve("stage", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 0.5)])
    assert len(drawn.line.split()) == 2
    assert "nan" not in drawn.line
    assert curve("stage", [(0, math.nan)]).line
