"""A campaign drawn: one HTML file with every stage's curves on one axis, what happened, its data, its time and cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.evaluation import report
from pipeline.evaluation.report_data import headline
from pipeline.pages.page import render_page
from pipeline.pages.timeline import Mark, Measure, Stretch, Timeline, timeline
from pipeline.reports.campaign import Campaign
from pipeline.reports.comparison import Comparison
from pipeline.reports.run_folder import StageRecord
from pipeline.tracking.describe import chosen_keys
from pipeline.tracking.journal import EVALUATION

HERE = Path(__file__).parent  # of the templates
WIDE, NARROW = 1040, 350  # of a timeline, in pixels: for a desk, for a telephone
MOST_LISTED = 60  # events; what is beyond is counted
# Metric of the journal, name of its panel, its height.
MEASURES = (
    ("train/loss", "loss", 170),
    ("train/grad_norm", "gradient norm", 70),
    ("train/lr", "learning rate", 60),
    ("perf/samples_per_s", "samples a second", 70),
    ("perf/data_wait_share", "share of time waiting for data", 60),
)
RETRIEVAL = ("i2t_r1", "t2i_r1")


def render_campaign(campaign: Campaign, against: Comparison | None = None) -> str:
    """The page as text. `against`: this run beside others."""
    return render_page(
        "campaign.html.j2",
        [HERE, report.HERE],
        subject=f"campaign {campaign.folder}",
        campaign=campaign,
        timelines={
            axis: [_timeline(campaign, width, axis == "time") for width in (WIDE, NARROW)] for axis in ("steps", "time")
        },
        shown=headline(campaign.evaluations) if campaign.evaluations else None,
        listed=campaign.events[:MOST_LISTED],
        unlisted=max(len(campaign.events) - MOST_LISTED, 0),
        comparison=against,
        yaml=chosen_keys(campaign.recorded),
    )


def _timeline(campaign: Campaign, width: int, in_seconds: bool) -> Timeline:
    """The same curves over steps, or over seconds since the first start."""
    measures = [
        Measure(name, list(_stretches(campaign, metric, in_seconds)), height) for metric, name, height in MEASURES
    ]
    measures = [measure for measure in measures if measure.stretches]
    if len(campaign.measured) > 1:
        measures.append(Measure("retrieval R@1, both ways", list(_measured(campaign, in_seconds)), 60))
    stages = [(record.name, *_reach(campaign, record, in_seconds)) for record in campaign.records if record.points]
    marks = [
        Mark(_since(campaign, event.at) if in_seconds else float(event.step or 0), event.kind, event.told)
        for event in campaign.events
        if event.kind != "begun" and (in_seconds or event.step is not None)
    ]
    return timeline(measures, stages, marks, width, in_seconds)


def _since(campaign: Campaign, at: int) -> float:
    """Seconds from the run's first start."""
    return (at - (campaign.started or at)) / 1000


def _stretches(campaign: Campaign, metric: str, in_seconds: bool) -> Iterator[Stretch]:
    """A line for each process that recorded the metric: what lies between two was no training."""
    starts = [event.at for event in campaign.events if event.kind in ("begun", "restart")]
    begun = [record for record in campaign.records if record.points]
    for number, record in enumerate(begun):
        series = record.series(metric)
        for start, end in zip(starts, [*starts[1:], float("inf")], strict=True):
            points = [
                (_since(campaign, at) if in_seconds else float(step), value)
                for at, step, value in series
                if start <= at < end
            ]
            if points:
                yield Stretch(number, points)


def _measured(campaign: Campaign, in_seconds: bool) -> Iterator[Stretch]:
    found = {name for point in campaign.measured for name in point.values}
    names = sorted(name for name in found if name.startswith(EVALUATION) and name.endswith(RETRIEVAL))
    for number, name in enumerate(names):
        points = [(p.at, p.step, p.values[name]) for p in campaign.measured if name in p.values]
        yield Stretch(number, [(_since(campaign, at) if in_seconds else float(step), v) for at, step, v in points])


def _reach(campaign: Campaign, record: StageRecord, in_seconds: bool) -> tuple[float, float]:
    """From where to where a stage goes on the axis."""
    if in_seconds:
        first = record.begun[0]["at"] if record.begun else record.points[0].at
        return _since(campaign, first), _since(campaign, record.points[-1].at)
    names = [stage.name for stage in campaign.config.stages]
    return float(campaign.config.stage_start(names.index(record.name))), float(record.reached or 0)
