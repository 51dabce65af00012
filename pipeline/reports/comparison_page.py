"""Runs beside one another, drawn: one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.pages.page import render_page
from pipeline.pages.timeline import Measure, Stretch, Timeline, timeline
from pipeline.reports.comparison import Comparison, StageCurves

HERE = Path(__file__).parent  # of the templates
WIDTH, HEIGHT = 350, 130  # of a stage's curves


@dataclass(frozen=True)
class Drawn:
    name: str
    line: Timeline


def render_comparison(comparison: Comparison) -> str:
    """The page as text."""
    subject = f"comparison {' '.join(comparison.folders)}"
    return render_page("comparison.html.j2", [HERE], subject, comparison=comparison, drawings=drawings(comparison))


def drawings(comparison: Comparison) -> list[Drawn]:
    """Each stage's losses, a line for each run."""
    return [Drawn(stage.name, _drawing(stage)) for stage in comparison.curves]


def _drawing(stage: StageCurves) -> Timeline:
    stretches = [Stretch(number, points) for number, points in stage.runs]
    return timeline([Measure("loss", stretches, HEIGHT)], [], [], WIDTH, in_seconds=False)
