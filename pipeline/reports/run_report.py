"""What a campaign's report says, gathered: every stage's curves and data, what happened, where time went, what it cost.

Drawing is `campaign_page`'s. Everything is read from the run's folder (`run_folder`), but for the shards: their
manifests, to see whether they are still what was trained on, and a few bad samples, to show them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.config.errors import MomeError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.config.stored import check_stored_url
from pipeline.data.shards.source import open_source, selection_url
from pipeline.data.storage import Storage
from pipeline.evaluation import report
from pipeline.evaluation.report_data import ReportData, headline, load_report_data
from pipeline.pages.charts import Chart, Mark, Measure, Series, line_chart
from pipeline.pages.formatting import significant
from pipeline.pages.page import render_page
from pipeline.reports.bad_samples import Quarantined, look_again
from pipeline.reports.comparison import Comparison
from pipeline.reports.run_folder import Point, RunFolder, Session, StageRecord, Tag
from pipeline.tracking.describe import chosen_keys
from pipeline.tracking.journal import EVALUATION
from pipeline.tracking.locations import absolute_uri, default_uri, experiment_name, journal_folder
from pipeline.tracking.mlflow_replay import uploaded_run
from pipeline.training.goodput import PHASES

ALERT, SPIKE = "mome.alert.", "mome.spike."  # begin the names of tags
PART = "train/loss_"  # begins the names of a loss's parts
OVER = "over at step"  # begins what an alert says once its cause is gone (`pipeline.training.alerts`)
VERSION = "version."
SHOWN_VERSIONS = ("mome", "torch", "deepspeed", "ray", "mlflow")

EventKind = Literal["begun", "restart", "spike", "alert", "evaluation"]


@dataclass(frozen=True)
class Event:
    """Something that happened to the run, at `at` milliseconds since 1970."""

    at: int
    step: int | None  # global; None before the first
    kind: EventKind
    told: str


@dataclass(frozen=True)
class Alert:
    """What the run says is wrong, and what to do about it."""

    name: str
    at: int
    step: int | None
    stage: str | None
    told: str

    @property
    def is_over(self) -> bool:
        return self.told.startswith(OVER)


@dataclass(frozen=True)
class SourceFacts:
    """A source as a stage read it."""

    name: str
    shards: str
    weight: float
    digest: str  # of what the stage began with; empty where it never began
    num_shards: int | None  # now; None where they cannot be read
    num_samples: int | None
    now: str  # what is to be said of the shards as they are now; empty while they are those that were trained on
    read: float  # samples read so far
    bad: float
    epochs: float


@dataclass(frozen=True)
class StageFacts:
    name: str
    steps: int
    reached: int  # steps done
    status: str
    objectives: list[str]
    start_from: str
    sources: list[SourceFacts]
    loss: float | None  # the last
    losses: dict[str, float]  # its parts
    samples_per_second: float | None  # the median over its points
    seconds: float  # from its first point to its last, interruptions included


@dataclass(frozen=True)
class TimeShare:
    """Seconds of one kind (`pipeline.training.goodput`)."""

    kind: str
    seconds: float
    share: float
    cost: float


@dataclass(frozen=True)
class Cost:
    """Of all the time from the first start on, restarts and lost work included."""

    ranks: float  # the mean over the time of training
    rank_hours: float
    price: float  # of a rank for an hour; 0: not given
    total: float


@dataclass(frozen=True)
class RunReport:
    """One run as its report tells it."""

    name: str
    folder: str
    run: str
    experiment: str
    status: str
    started: int | None  # milliseconds since 1970
    ended: int | None  # the last sign of life
    reached: int
    total_steps: int
    config: RunConfig
    recorded: RunConfig  # as it was kept, to be shown
    stages: list[StageFacts]
    records: list[StageRecord] = field(repr=False)
    events: list[Event]
    alerts: list[Alert]
    time: list[TimeShare]
    goodput: float | None
    restarts: int
    cost: Cost | None
    evaluations: list[ReportData]  # as they were kept, the newest first
    measured: list[Point]  # every evaluation, with the step it was made at
    quarantine: Quarantined
    lineage: dict[str, str]
    mlflow_page: str  # the address of the run in MLflow's pages, if the reader's server is reached by http

    @property
    def bad_samples(self) -> float:
        """Replaced so far; the quarantine's lists may lag behind by the steps since the last checkpoint."""
        return sum(source.bad for stage in self.stages for source in stage.sources)


def collect_report(run: RunFolder, price: float | None = None, server: str | None = None) -> RunReport:
    """`price` of a rank for an hour; without it the run's own `cluster.price`. The shards are asked what they are.

    `server` is the MLflow URI of who reads the page, which it may lead to.
    """
    config, started = run.config, [session.start for session in run.sessions]
    ended = max((p.at for r in run.stages for p in r.points), default=None)
    seconds = {} if run.time is None else run.time["seconds"]
    cost = _cost(run, sum(seconds.values()), config.cluster.price if price is None else price)
    recorded, page = _in_mlflow(run, server)
    return RunReport(
        name=run.name,
        folder=run.folder,
        run=run.run,
        experiment=experiment_name(config),
        status=run.status or ("UNFINISHED" if started else "NOT STARTED"),
        started=min(started, default=None),
        ended=ended,
        reached=run.reached,
        total_steps=config.total_steps,
        config=config,
        recorded=run.recorded_config(),
        stages=[_stage(run, index) for index in range(len(config.stages))],
        records=run.stages,
        events=_events(run),
        alerts=sorted((_alert(tag) for tag in _latest(run.tags, ALERT)), key=lambda alert: alert.is_over),
        time=_time(seconds, cost),
        goodput=seconds["training"] / sum(seconds.values()) if sum(seconds.values()) else None,
        restarts=max(len(run.sessions) - 1, 0),
        cost=cost,
        evaluations=load_report_data(run.storage, run.folder),
        measured=run.evaluations,
        quarantine=look_again(config, run.storage, run.quarantined()),
        lineage=_lineage(run) | recorded,
        mlflow_page=page,
    )


def _stage(run: RunFolder, index: int) -> StageFacts:
    stage, record = run.config.stages[index], run.stages[index]
    begun = {each["name"]: each["digest"] for entry in record.begun for each in entry["datasets"]}
    speeds = [value for _, _, value in record.series("perf/samples_per_s")]
    first, parts = run.config.stage_start(index), (f"{PART}{name}" for name in stage.objectives)
    return StageFacts(
        name=stage.name,
        steps=stage.steps,
        reached=(record.reached or first) - first,
        status=record.status or ("begun" if record.begun else "not begun"),
        objectives=list(stage.objectives),
        start_from=_origin(run, record.tags.get("start_from", stage.start_from)),
        sources=[_source(run, record, name, w, begun.get(name, "")) for name, w in stage.sources.items()],
        loss=record.last("train/loss"),
        losses={name.removeprefix(PART): value for name in parts if (value := record.last(name)) is not None},
        samples_per_second=statistics.median(speeds) if speeds else None,
        seconds=(record.points[-1].at - record.begun[0]["at"]) / 1000 if record.points and record.begun else 0.0,
    )


def _origin(run: RunFolder, start_from: str) -> str:
    """Where weights came from: an earlier stage of this run by its name, else as it was given."""
    own = {f"/stages/{index}-{stage.name}": stage.name for index, stage in enumerate(run.config.stages)}
    return next((f"stage {name}" for end, name in own.items() if start_from.endswith(f"/{run.name}{end}")), start_from)


def _source(run: RunFolder, record: StageRecord, name: str, weight: float, digest: str) -> SourceFacts:
    found, fault = _shards_now(run.config, run.storage, name)
    num_shards, num_samples, now = found or (None, None, "")
    changed = bool(digest and now) and digest != now
    return SourceFacts(
        name=name,
        shards=run.config.sources[name].shards,
        weight=weight,
        digest=digest,
        num_shards=num_shards,
        num_samples=num_samples,
        now=fault or (f"the shards are others now: digest {now[:12]}…" if changed else ""),
        read=record.last(f"data/samples/{name}") or 0.0,
        bad=record.last(f"data/bad/{name}") or 0.0,
        epochs=record.last(f"data/epochs/{name}") or 0.0,
    )


def _shards_now(config: RunConfig, storage: Storage, name: str) -> tuple[tuple[int, int, str] | None, str]:
    """((shards, samples read of them, digest), "") of a source as it lies there, or (None, what is wrong)."""
    try:
        for key, url in (("shards", config.sources[name].shards), ("opt_out", config.sources[name].opt_out)):
            if url is not None:
                check_stored_url(url, f"sources.{name}.{key}")
        source = open_source(storage, config.sources[name], selection_url(config, name))
    except MomeError as error:
        return None, f"cannot be read now: {error}"
    return (len(source.manifest.shards), int(source.counts.sum()), source.digest), ""


def _events(run: RunFolder) -> list[Event]:
    """In their order."""
    found = [Event(tag.at, tag.step, "spike", tag.value) for tag in run.tags if tag.key.startswith(SPIKE)]
    found += [Event(tag.at, tag.step, "alert", tag.value) for tag in run.tags if tag.key.startswith(ALERT)]
    found += [Event(point.at, point.step, "evaluation", summarize_evaluation(point)) for point in run.evaluations]
    return sorted([*found, *_starts(run)], key=lambda event: event.at)


def _starts(run: RunFolder) -> Iterator[Event]:
    """The first start and every restart, with what is known of its cause."""
    causes = [(1000 * each["time"], f"{each['cause']}: {each['message']}") for each in run.restarts()]
    before = 0
    for number, session in enumerate(run.sessions):
        told = f"{session.tags.get('world_size', '?')} ranks, rank 0 on {session.tags.get('mome.host', '?')}"
        if number == 0:
            yield Event(session.start, None, "begun", told)
        else:
            cause = [words for at, words in causes if before <= at <= session.start]
            resumed = _resumed(run, session)
            after = "began again" if resumed is None else f"went on after step {resumed}"
            yield Event(session.start, resumed, "restart", "; ".join([after, told, *cause[-1:]]))
        before = session.start


def _resumed(run: RunFolder, session: Session) -> int | None:
    """The step of the checkpoint that a session went on from; None where it began its stage anew."""
    begun = [entry for record in run.stages for entry in record.begun if session.start <= entry["at"] <= session.end]
    found = begun[0]["tags"].get("resumed_at") if begun else None
    return None if found is None else int(found)


def summarize_evaluation(point: Point) -> str:
    """What an evaluation found, in a line: its retrieval, else its first figures."""
    found = {name: value for name, value in point.values.items() if name.startswith(EVALUATION)}
    short = {name.removeprefix(EVALUATION): value for name, value in found.items()}
    recalls = {name: value for name, value in short.items() if name.endswith(("/i2t_r1", "/t2i_r1"))}
    shown = recalls or {name: value for name, value in short.items() if not name.endswith("/pairs")}
    return ", ".join(f"{name} {significant(value)}" for name, value in list(shown.items())[:4])


def _alert(tag: Tag) -> Alert:
    return Alert(tag.key.removeprefix(ALERT), tag.at, tag.step, tag.stage, tag.value)


def _latest(tags: list[Tag], prefix: str) -> list[Tag]:
    """Of tags that were set more than once, on the same stage, the last."""
    found = {(tag.stage, tag.key): tag for tag in tags if tag.key.startswith(prefix)}
    return sorted(found.values(), key=lambda tag: tag.at)


def _time(seconds: dict[str, float], cost: Cost | None) -> list[TimeShare]:
    total = sum(seconds.values())
    each_second = cost.total / total if cost and total else 0.0
    kinds = [kind for kind in PHASES if seconds.get(kind)]
    return [TimeShare(kind, seconds[kind], seconds[kind] / total, seconds[kind] * each_second) for kind in kinds]


def _cost(run: RunFolder, seconds: float, price: float) -> Cost | None:
    """Ranks are held for all of the account's time; where their number changed, by its mean over the training."""
    sizes = [(float(s.tags["world_size"]), max(s.end - s.start, 1)) for s in run.sessions if "world_size" in s.tags]
    if not sizes or not seconds:
        return None
    ranks = sum(size * length for size, length in sizes) / sum(length for _, length in sizes)
    hours = ranks * seconds / 3600
    return Cost(ranks, hours, price, hours * price)


def _in_mlflow(run: RunFolder, server: str | None) -> tuple[dict[str, str], str]:
    """Return what leads to the run in MLflow: its id, if this machine shipped it, else the tag; and its page's address.

    Ids are MLflow's own. The address is on the reader's server, never on one that the folder names.
    """
    own = absolute_uri(server or default_uri(run.config.output))
    others = [] if run.recorded.tracking_uri is None else [absolute_uri(run.recorded.tracking_uri)]
    for uri in dict.fromkeys([own, *others]):
        if (known := uploaded_run(journal_folder(run.folder), uri)) is not None:
            is_page = uri == own and uri.startswith(("http://", "https://"))
            page = f"{redact(uri).rstrip('/')}/#/experiments/{known[1]}/runs/{known[0]}" if is_page else ""
            return {"MLflow run": known[0]}, page
    return ({"In MLflow": f"the run tagged mome.run = '{run.run}'"} if run.run else {}), ""


def _lineage(run: RunFolder) -> dict[str, str]:
    """What made this run, as its last start recorded it."""
    tags = run.sessions[-1].tags if run.sessions else {}
    commit = tags.get("mlflow.source.git.commit", "")
    if commit and tags.get("mome.git.dirty") == "true":
        commit += " with changes that are not committed"
    named = {
        "Experiment": experiment_name(run.config),
        "Code": commit,
        "Submission": tags.get("ray.submission_id", ""),
        "Started by": tags.get("mlflow.user", ""),
        "Versions": ", ".join(f"{p} {tags[VERSION + p]}" for p in SHOWN_VERSIONS if VERSION + p in tags),
    }
    return {name: value for name, value in named.items() if value}


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


def render_run_report(campaign: RunReport, against: Comparison | None = None) -> str:
    """The page as text. `against`: this run beside others."""
    return render_page(
        "run_report.html.j2",
        [HERE, report.HERE],
        subject=f"campaign {campaign.folder}",
        campaign=campaign,
        curves={
            axis: [_timeline(campaign, width, axis == "time") for width in (WIDE, NARROW)] for axis in ("steps", "time")
        },
        shown=headline(campaign.evaluations) if campaign.evaluations else None,
        listed=campaign.events[:MOST_LISTED],
        unlisted=max(len(campaign.events) - MOST_LISTED, 0),
        comparison=against,
        yaml=chosen_keys(campaign.recorded),
    )


def _timeline(campaign: RunReport, width: int, in_seconds: bool) -> Chart:
    """The same curves over steps, or over seconds since the first start."""
    measures = [
        Measure(name, list(_stretches(campaign, metric, in_seconds)), height) for metric, name, height in MEASURES
    ]
    measures = [measure for measure in measures if measure.series]
    if len(campaign.measured) > 1:
        measures.append(Measure("retrieval R@1, both ways", list(_measured(campaign, in_seconds)), 60))
    stages = [(record.name, *_reach(campaign, record, in_seconds)) for record in campaign.records if record.points]
    marks = [
        Mark(_since(campaign, event.at) if in_seconds else float(event.step or 0), event.kind, event.told)
        for event in campaign.events
        if event.kind != "begun" and (in_seconds or event.step is not None)
    ]
    return line_chart(measures, width, stages, marks, in_seconds)


def _since(campaign: RunReport, at: int) -> float:
    """Seconds from the run's first start."""
    return (at - (campaign.started or at)) / 1000


def _stretches(campaign: RunReport, metric: str, in_seconds: bool) -> Iterator[Series]:
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
                yield Series(number, points)


def _measured(campaign: RunReport, in_seconds: bool) -> Iterator[Series]:
    found = {name for point in campaign.measured for name in point.values}
    names = sorted(name for name in found if name.startswith(EVALUATION) and name.endswith(RETRIEVAL))
    for number, name in enumerate(names):
        points = [(p.at, p.step, p.values[name]) for p in campaign.measured if name in p.values]
        yield Series(number, [(_since(campaign, at) if in_seconds else float(step), v) for at, step, v in points])


def _reach(campaign: RunReport, record: StageRecord, in_seconds: bool) -> tuple[float, float]:
    """From where to where a stage goes on the axis."""
    if in_seconds:
        first = record.begun[0]["at"] if record.begun else record.points[0].at
        return _since(campaign, first), _since(campaign, record.points[-1].at)
    names = [stage.name for stage in campaign.config.stages]
    return float(campaign.config.stage_start(names.index(record.name))), float(record.reached or 0)
