"""Report of a run as one HTML page: curves on one axis, events, data, time and cost, evaluations, lineage.

Everything is read from the run's folder, except the shards' manifests, which show whether the data has changed since,
and a few quarantined samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.config.errors import MomeError
from pipeline.config.redaction import redact
from pipeline.config.stored import check_stored_url
from pipeline.data.shards.source import open_source, selection_url
from pipeline.evaluation.report import HERE as EVALUATION_TEMPLATES
from pipeline.evaluation.report_data import ReportData, headline, load_report_data
from pipeline.pages.charts import Chart, Mark, Measure, Series, line_chart
from pipeline.pages.formatting import significant
from pipeline.pages.page import render_page
from pipeline.reports.bad_samples import QuarantineReport, inspect_quarantine
from pipeline.reports.comparison import Comparison
from pipeline.reports.run_folder import MetricPoint, RunFolder, StageRecord
from pipeline.tracking.describe import config_yaml
from pipeline.tracking.journal import EVALUATION
from pipeline.tracking.locations import absolute_uri, default_uri, experiment_name, journal_folder
from pipeline.tracking.mlflow_replay import uploaded_run
from pipeline.training.goodput import PHASES

HERE = Path(__file__).parent  # folder of the templates
ALERT, SPIKE = "mome.alert.", "mome.spike."  # prefixes of tags
OVER = "over at step"  # prefix of the text of an alert that is over (`pipeline.training.alerts`)
SHOWN_VERSIONS = ("mome", "torch", "deepspeed", "ray", "mlflow")
WIDE, NARROW = 1040, 350  # widths of the charts in pixels, for desktops and phones
MAX_EVENTS = 60
# Metric, name of its panel, height.
MEASURES = (
    ("train/loss", "loss", 170),
    ("train/grad_norm", "gradient norm", 70),
    ("train/lr", "learning rate", 60),
    ("perf/samples_per_s", "samples per second", 70),
    ("perf/data_wait_share", "fraction of time waiting for data", 60),
)
RETRIEVAL = ("i2t_r1", "t2i_r1")

EventKind = Literal["begun", "restart", "spike", "alert", "evaluation"]


@dataclass(frozen=True)
class Event:
    at: int  # milliseconds since 1970
    step: int | None  # global; None before the first
    kind: EventKind
    text: str


@dataclass(frozen=True)
class Alert:
    """A problem that training reported, with its remedy."""

    name: str
    at: int
    step: int | None
    stage: str | None
    text: str

    @property
    def is_over(self) -> bool:
        return self.text.startswith(OVER)


@dataclass(frozen=True)
class SourceSummary:
    """A source of a stage: its data at the start, its data now, and what the stage has read."""

    name: str
    shards: str
    weight: float
    digest: str  # at the stage's start; empty before
    num_shards: int | None  # now; None if unreadable
    num_samples: int | None
    change: str  # why the data differs from what was trained on; empty if it does not
    read: float  # samples
    bad: float  # samples
    epochs: float


@dataclass(frozen=True)
class StageSummary:
    name: str
    steps: int
    reached: int  # completed steps
    status: str
    objectives: list[str]
    start_from: str
    sources: list[SourceSummary]
    loss: float | None  # last
    losses: dict[str, float]  # last, by objective
    samples_per_second: float | None
    seconds: float  # from the start to the last point, interruptions included


@dataclass(frozen=True)
class PhaseTime:
    """Time and cost of one phase (`pipeline.training.goodput`)."""

    phase: str
    seconds: float
    fraction: float
    cost: float


@dataclass(frozen=True)
class Cost:
    """Cost of all time since the first start, restarts and lost work included."""

    ranks: float  # mean over the training time
    rank_hours: float
    price: float  # per rank-hour; 0 if unknown
    total: float


@dataclass(frozen=True)
class RunReport:
    run: RunFolder = field(repr=False)
    experiment: str
    status: str
    started: int | None  # milliseconds since 1970
    ended: int | None  # time of the last point
    stages: list[StageSummary]
    events: list[Event]
    alerts: list[Alert]
    time: list[PhaseTime]
    cost: Cost | None
    evaluations: list[ReportData]  # newest first
    quarantine: QuarantineReport
    lineage: dict[str, str]
    mlflow_page: str  # URL of the run in MLflow's web interface; empty if unknown

    @property
    def bad_samples(self) -> float:
        """Replaced samples. The quarantine may lag behind by the steps since the last checkpoint."""
        return sum(source.bad for stage in self.stages for source in stage.sources)


def collect_report(run: RunFolder, price: float | None = None, server: str | None = None) -> RunReport:
    """Collect a run's report. `price` per rank-hour defaults to the run's `cluster.price`.

    `server` is the reader's MLflow URI, to which the page may link.
    """
    started = min((session.start for session in run.sessions), default=None)
    cost = _cost(run, run.config.cluster.price if price is None else price)
    mlflow, mlflow_page = _find_in_mlflow(run, server)
    return RunReport(
        run=run,
        experiment=experiment_name(run.config),
        status=run.status or ("NOT STARTED" if started is None else "UNFINISHED"),
        started=started,
        ended=max((point.at for record in run.stages for point in record.points), default=None),
        stages=[_stage(run, index) for index in range(len(run.config.stages))],
        events=_events(run),
        alerts=_alerts(run),
        time=_time(run.seconds, cost),
        cost=cost,
        evaluations=load_report_data(run.storage, run.folder),
        quarantine=inspect_quarantine(run.config, run.storage, run.quarantined()),
        lineage=_lineage(run) | mlflow,
        mlflow_page=mlflow_page,
    )


def _stage(run: RunFolder, index: int) -> StageSummary:
    stage, record = run.config.stages[index], run.stages[index]
    digests = {dataset["name"]: dataset["digest"] for start in record.starts for dataset in start["datasets"]}
    losses = {name: record.last(f"train/loss_{name}") for name in stage.objectives}
    first = run.config.stage_start(index)
    start_from = record.tags.get("start_from", stage.start_from)
    for number, other in enumerate(run.config.stages):  # name an earlier stage of this run instead of its URL
        if start_from.endswith(f"/{run.name}/stages/{number}-{other.name}"):
            start_from = f"stage {other.name}"
    return StageSummary(
        name=stage.name,
        steps=stage.steps,
        reached=(record.reached or first) - first,
        status=record.status or ("running" if record.starts else "not started"),
        objectives=list(stage.objectives),
        start_from=start_from,
        sources=[_source(run, record, name, w, digests.get(name, "")) for name, w in stage.sources.items()],
        loss=record.last("train/loss"),
        losses={name: value for name, value in losses.items() if value is not None},
        samples_per_second=record.samples_per_second,
        seconds=(record.points[-1].at - record.starts[0]["at"]) / 1000 if record.points and record.starts else 0.0,
    )


def _source(run: RunFolder, record: StageRecord, name: str, weight: float, digest: str) -> SourceSummary:
    config, num_shards, num_samples, change = run.config.sources[name], None, None, ""
    try:
        for key, url in (("shards", config.shards), ("opt_out", config.opt_out)):
            if url is not None:
                check_stored_url(url, f"sources.{name}.{key}")
        source = open_source(run.storage, config, selection_url(run.config, name))
        num_shards, num_samples = len(source.manifest.shards), int(source.counts.sum())
        if digest and source.digest != digest:
            change = f"the shards have changed since: digest {source.digest[:12]}…"
    except MomeError as error:
        change = f"cannot be read now: {error}"
    return SourceSummary(
        name=name,
        shards=config.shards,
        weight=weight,
        digest=digest,
        num_shards=num_shards,
        num_samples=num_samples,
        change=change,
        read=record.last(f"data/samples/{name}") or 0.0,
        bad=record.last(f"data/bad/{name}") or 0.0,
        epochs=record.last(f"data/epochs/{name}") or 0.0,
    )


def _events(run: RunFolder) -> list[Event]:
    prefixes: tuple[tuple[str, EventKind], ...] = ((SPIKE, "spike"), (ALERT, "alert"))
    events = [
        Event(tag.at, tag.step, kind, tag.value)
        for prefix, kind in prefixes
        for tag in run.tags
        if tag.key.startswith(prefix)
    ]
    events += [Event(point.at, point.step, "evaluation", _summarize_evaluation(point)) for point in run.evaluations]
    return sorted([*events, *_starts(run)], key=lambda event: event.at)


def _starts(run: RunFolder) -> Iterator[Event]:
    """Yield the first start and every restart, with its recorded cause."""
    causes = [(1000 * entry["time"], f"{entry['cause']}: {entry['message']}") for entry in run.restarts()]
    starts = [start for record in run.stages for start in record.starts]
    previous = 0
    for number, session in enumerate(run.sessions):
        text = f"{session.tags.get('world_size', '?')} ranks, rank 0 on {session.tags.get('mome.host', '?')}"
        if number == 0:
            yield Event(session.start, None, "begun", text)
        else:
            cause = [message for at, message in causes if previous <= at <= session.start]
            tags = [start["tags"] for start in starts if session.start <= start["at"] <= session.end]
            step = int(tags[0]["resumed_at"]) if tags and "resumed_at" in tags[0] else None
            resumed = "restarted from the beginning" if step is None else f"resumed after step {step}"
            yield Event(session.start, step, "restart", "; ".join([resumed, text, *cause[-1:]]))
        previous = session.start


def _summarize_evaluation(point: MetricPoint) -> str:
    """Return an evaluation's recalls, or else its first metrics, in one line."""
    values = {name.removeprefix(EVALUATION): v for name, v in point.values.items() if name.startswith(EVALUATION)}
    recalls = {name: value for name, value in values.items() if name.endswith(("/i2t_r1", "/t2i_r1"))}
    shown = recalls or {name: value for name, value in values.items() if not name.endswith("/pairs")}
    return ", ".join(f"{name} {significant(value)}" for name, value in list(shown.items())[:4])


def _alerts(run: RunFolder) -> list[Alert]:
    """Return the last state of every alert of every stage, active ones first."""
    latest = {(tag.stage, tag.key): tag for tag in run.tags if tag.key.startswith(ALERT)}
    tags = sorted(latest.values(), key=lambda tag: tag.at)
    alerts = [Alert(tag.key.removeprefix(ALERT), tag.at, tag.step, tag.stage, tag.value) for tag in tags]
    return sorted(alerts, key=lambda alert: alert.is_over)


def _time(seconds: dict[str, float], cost: Cost | None) -> list[PhaseTime]:
    total = sum(seconds.values())
    price = cost.total / total if cost and total else 0.0
    phases = [phase for phase in PHASES if seconds.get(phase)]
    return [PhaseTime(phase, seconds[phase], seconds[phase] / total, seconds[phase] * price) for phase in phases]


def _cost(run: RunFolder, price: float) -> Cost | None:
    """Compute the cost. Ranks are occupied during all of the time; their number is the mean over the training time."""
    seconds = sum(run.seconds.values())
    sizes = [(float(s.tags["world_size"]), max(s.end - s.start, 1)) for s in run.sessions if "world_size" in s.tags]
    if not sizes or not seconds:
        return None
    ranks = sum(size * length for size, length in sizes) / sum(length for _, length in sizes)
    hours = ranks * seconds / 3600
    return Cost(ranks, hours, price, hours * price)


def _find_in_mlflow(run: RunFolder, server: str | None) -> tuple[dict[str, str], str]:
    """Return how to find the run in MLflow (its id if this machine uploaded it, otherwise its tag), and its page's URL.

    The URL is on the reader's own server, never on one that the run's folder names.
    """
    own = absolute_uri(server or default_uri(run.config.output))
    others = [] if run.recorded.tracking_uri is None else [absolute_uri(run.recorded.tracking_uri)]
    for uri in dict.fromkeys([own, *others]):
        if (ids := uploaded_run(journal_folder(run.folder), uri)) is not None:
            has_page = uri == own and uri.startswith(("http://", "https://"))
            page = f"{redact(uri).rstrip('/')}/#/experiments/{ids[1]}/runs/{ids[0]}" if has_page else ""
            return {"MLflow run": ids[0]}, page
    return ({"In MLflow": f"the run tagged mome.run = '{run.run}'"} if run.run else {}), ""


def _lineage(run: RunFolder) -> dict[str, str]:
    """Return code, versions and user of the last start."""
    tags = run.sessions[-1].tags if run.sessions else {}
    commit = tags.get("mlflow.source.git.commit", "")
    if commit and tags.get("mome.git.dirty") == "true":
        commit += " with uncommitted changes"
    versions = {name: tags.get(f"version.{name}") for name in SHOWN_VERSIONS}
    lineage = {
        "Experiment": experiment_name(run.config),
        "Code": commit,
        "Submission": tags.get("ray.submission_id", ""),
        "Started by": tags.get("mlflow.user", ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
    }
    return {name: value for name, value in lineage.items() if value}


def render_run_report(report: RunReport, comparison: Comparison | None = None) -> str:
    """Return the report as an HTML page, with a comparison with other runs if given."""
    return render_page(
        "run_report.html.j2",
        [HERE, EVALUATION_TEMPLATES],
        subject=f"report {report.run.folder}",
        report=report,
        run=report.run,
        curves={
            axis: [_chart(report, width, axis == "time") for width in (WIDE, NARROW)] for axis in ("steps", "time")
        },
        shown=headline(report.evaluations) if report.evaluations else None,
        listed=report.events[:MAX_EVENTS],
        unlisted=max(len(report.events) - MAX_EVENTS, 0),
        comparison=comparison,
        yaml=config_yaml(report.run.recorded_config(), exclude_defaults=True),
    )


def _chart(report: RunReport, width: int, in_seconds: bool) -> Chart:
    """Lay out all curves over steps, or over seconds since the first start."""

    def x_of(at: int, step: int | None) -> float:
        return (at - (report.started or at)) / 1000 if in_seconds else float(step or 0)

    starts = [event.at for event in report.events if event.kind in ("begun", "restart")]
    records = [(index, record) for index, record in enumerate(report.run.stages) if record.points]
    measures = []
    for metric, name, height in MEASURES:
        series = []
        for number, (_, record) in enumerate(records):
            for start, end in zip(starts, [*starts[1:], float("inf")], strict=True):  # no line crosses a restart
                points = [(x_of(at, step), value) for at, step, value in record.series(metric) if start <= at < end]
                if points:
                    series.append(Series(number, points))
        if series:
            measures.append(Measure(name, series, height))
    evaluations = report.run.evaluations
    if len(evaluations) > 1:
        names = sorted({n for p in evaluations for n in p.values if n.startswith(EVALUATION) and n.endswith(RETRIEVAL)})
        recalls = [
            Series(number, [(x_of(p.at, p.step), p.values[name]) for p in evaluations if name in p.values])
            for number, name in enumerate(names)
        ]
        measures.append(Measure("retrieval R@1 in both directions", recalls, 60))
    stages = []
    for index, record in records:
        last, first_step = record.points[-1], report.run.config.stage_start(index)
        first_at = record.starts[0]["at"] if record.starts else record.points[0].at
        stages.append((record.name, x_of(first_at, first_step), x_of(last.at, record.reached)))
    marks = [
        Mark(x_of(event.at, event.step), event.kind, event.text)
        for event in report.events
        if event.kind != "begun" and (in_seconds or event.step is not None)
    ]
    return line_chart(measures, width, stages, marks, in_seconds)
