"""HTML pages: of one run, with its curves, events, data, cost, evaluations and lineage, and comparisons of several.

Everything is read from the run's folder, except the shards' manifests, which show whether the data has changed since,
and a few quarantined samples. The template reads the run's records (`reports.run_folder`) directly.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.config.errors import DataError, MomeError
from pipeline.config.load import check_stored_url, flatten, parse_config
from pipeline.config.redaction import redact
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import image_bytes
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.manifest import load_index, load_manifest, parse_pattern
from pipeline.data.shards.source import open_source
from pipeline.data.storage import join
from pipeline.evaluation import report as eval_report
from pipeline.pages.charts import FRACTIONS, Chart, Mark, Measure, Series, line_chart, percent, significant
from pipeline.pages.page import render_page, thumbnail
from pipeline.reports.run_folder import QUARANTINE, RESTARTS, RunFolder, StageRecord, Tag
from pipeline.tracking.describe import config_yaml
from pipeline.tracking.journal import EVALUATION
from pipeline.tracking.locations import absolute_uri, default_uri, experiment_name, journal_folder
from pipeline.tracking.mlflow_replay import Cursor
from pipeline.training.goodput import PHASES

ALERT, SPIKE = "mome.alert.", "mome.spike."  # prefixes of tags
OVER = "resolved at step"  # prefix of the text of an alert that is over (`pipeline.training.metrics`)
SHOWN_VERSIONS = ("mome", "torch", "deepspeed", "ray", "mlflow")
WIDE, NARROW = 1040, 350  # widths of the charts in pixels, for desktops and phones
EVALUATION_PAGE = "evaluation.html"  # next to the run's report
MAX_EVENTS = 60
MAX_SAMPLES = 24  # of the quarantine; each is a read from the store
MAX_PER_REASON = 3
THUMBNAIL = 96  # maximum side in pixels
# Metric, name of its panel, height.
MEASURES = (
    ("train/loss", "loss", 170),
    ("train/grad_norm", "gradient norm", 70),
    ("train/lr", "learning rate", 60),
    ("perf/samples_per_s", "samples per second", 70),
    ("perf/data_wait_share", "fraction of time waiting for data", 60),
)
RETRIEVAL = ("/i2t_r1", "/t2i_r1")
IGNORED_KEYS = ("name",)  # differ between any two runs
LOSS_HEIGHT = 130  # of a chart in a comparison
Result = float | str | None


class Event(NamedTuple):
    at: int  # milliseconds since 1970
    step: int | None  # global; None before the first
    kind: Literal["begun", "restart", "spike", "alert", "evaluation"]
    text: str


class SourceState(NamedTuple):
    """The data of a stage's source at the stage's start and now."""

    digest: str  # at the start; empty before
    num_shards: int | None = None  # now; None if unreadable
    num_samples: int | None = None
    change: str = ""  # why the data differs from what was trained on; empty if it does not


class StageReport(NamedTuple):
    record: StageRecord
    reached: int  # completed steps
    start_from: str
    seconds: float  # from the start to the last point, interruptions included
    sources: dict[str, SourceState]


class Cost(NamedTuple):
    """Cost of all time since the first start, restarts and lost work included."""

    ranks: float  # mean over the training time
    rank_hours: float
    price: float  # per rank-hour; 0 if unknown
    total: float


class QuarantinedSample(NamedTuple):
    """A bad sample and the reason that training recorded."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    stage: str  # of reading: members, caption, image, …
    reason: str


ReasonCount = tuple[str, str, str, int, int]  # source, stage, reason, distinct samples, times
Inspected = tuple[QuarantinedSample, str | None, str]  # read again: its image as a data URI, or why it is not shown


@dataclass(frozen=True)
class RunReport:
    run: RunFolder = field(repr=False)
    status: str
    started: int | None  # milliseconds since 1970
    ended: int | None  # time of the last point
    stages: list[StageReport]
    events: list[Event]
    alerts: list[Tag]  # the last state of each; active ones first
    time: dict[str, float]  # seconds by phase (`pipeline.training.goodput`)
    cost: Cost | None
    evaluations: list[eval_report.ReportData]  # newest first
    bad_samples: float  # replaced; the quarantine may lag behind by the steps since the last checkpoint
    quarantine_counts: list[ReasonCount]
    quarantine: list[Inspected]  # a few samples of each reason
    lineage: dict[str, str]
    mlflow_page: str  # URL of the run in MLflow's web interface; empty if unknown

    @property
    def verdict(self) -> list[str]:
        """Return the sentences on top of the page: how the run ended, its best figures, its alerts."""
        run, total = self.run, self.run.config.total_steps
        finished = sum(stage.record.status == "FINISHED" for stage in self.stages)
        step = f"step {run.reached:,} of {total:,}"
        states = {
            "FINISHED": f"Finished: {finished} of {_counted(len(self.stages), 'stage')}, {run.reached:,} steps.",
            "FAILED": f"Failed at {step}.",
            "KILLED": f"Stopped at {step}; the same command resumes it.",
            "NOT STARTED": "Not started yet.",
        }
        sentences = [states.get(self.status, f"{'Running' if run.is_live else 'Interrupted'} at {step}.")]
        if self.evaluations:
            shown = eval_report.headline(self.evaluations)
            figures = [
                f"{row.direction.lower()} R@{k} {percent(value)} (chance {percent(chance)})"
                for row in shown.recall[:2]
                for k, value, chance in row.cells[:1]
            ]
            measures = [f"{row.name.lower()} {percent(row.value)}" for row in shown.measures[:1]]
            if figures or measures:
                sentences.append(f"On {shown.key.name}: {', '.join(figures or measures)}.")
        resolved = sum(tag.value.startswith(OVER) for tag in self.alerts)
        unresolved = len(self.alerts) - resolved
        if unresolved or resolved:
            open_alerts = f"{_counted(unresolved, 'open alert')}" if unresolved else "No open alerts"
            sentences.append(f"{open_alerts}{f'; {resolved} resolved' if resolved else ''}.")
        return sentences


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Comparison:
    runs: list[str]  # names of the runs, or their folders if names are equal
    config: dict[str, dict[str, Any]]  # dotted path -> run -> value; runs without the key are missing
    results: dict[str, dict[str, list[Result]]]  # group -> name -> values in the order of the runs; None: missing
    losses: dict[str, list[Series]]  # stage -> curve of each run over the steps since the stage's start
    folders: list[str]


def collect_report(run: RunFolder, price: float | None = None, server: str | None = None) -> RunReport:
    """Collect a run's report, with a price per rank-hour (default: `cluster.price`) and the reader's MLflow URI."""
    started = min((session.start for session in run.sessions), default=None)
    # Ranks are occupied during all of the time; their number is the mean over the training time.
    cost, total = None, sum(run.seconds.values())
    sizes = [(float(s.tags["world_size"]), max(s.end - s.start, 1)) for s in run.sessions if "world_size" in s.tags]
    if sizes and total:
        ranks = sum(size * length for size, length in sizes) / sum(length for _, length in sizes)
        hours = ranks * total / 3600
        price = run.config.cluster.price if price is None else price
        cost = Cost(ranks, hours, price, hours * price)
    latest = {(tag.stage, tag.key): tag for tag in run.tags if tag.key.startswith(ALERT)}
    stages = [_stage(run, record) for record in run.stages]
    counts, inspected = _inspect_quarantine(run)
    lineage, mlflow_page = _lineage(run, server)
    return RunReport(
        run=run, status=run.status or ("NOT STARTED" if started is None else "UNFINISHED"), started=started,
        ended=max((point.at for record in run.stages for point in record.points), default=None),
        stages=stages, events=_events(run), cost=cost,
        alerts=sorted(latest.values(), key=lambda tag: (tag.value.startswith(OVER), tag.at)),
        time={phase: run.seconds[phase] for phase in PHASES if run.seconds.get(phase)},
        evaluations=eval_report.load_report_data(run.storage, run.folder),
        bad_samples=sum(stage.record.last.get(f"data/bad/{name}", 0.0) for stage in stages for name in stage.sources),
        quarantine_counts=counts, quarantine=inspected, lineage=lineage, mlflow_page=mlflow_page,
    )  # fmt: skip


def _stage(run: RunFolder, record: StageRecord) -> StageReport:
    digests = {dataset["name"]: dataset["digest"] for start in record.starts for dataset in start["datasets"]}
    start_from = record.tags.get("start_from", record.config.start_from)
    for number, other in enumerate(run.config.stages):  # name an earlier stage of this run instead of its URL
        if start_from.endswith(f"/{run.name}/stages/{number}-{other.name}"):
            start_from = f"stage {other.name}"
    sources = {}
    for name in record.config.sources:
        config, digest = run.config.sources[name], digests.get(name, "")
        try:
            check_stored_url(config.shards, f"sources.{name}.shards")
            if config.opt_out is not None:
                check_stored_url(config.opt_out, f"sources.{name}.opt_out")
            source = open_source(run.storage, config, run.config.folder)
            is_changed = digest and source.digest != digest
            change = f"the shards have changed since: digest {source.digest[:12]}…" if is_changed else ""
            sources[name] = SourceState(digest, len(source.manifest.shards), int(source.counts.sum()), change)
        except MomeError as error:
            sources[name] = SourceState(digest, change=f"cannot be read now: {error}")
    seconds = (record.points[-1].at - record.starts[0]["at"]) / 1000 if record.points and record.starts else 0.0
    return StageReport(record, max(record.reached - record.first_step, 0), start_from, seconds, sources)


def _events(run: RunFolder) -> list[Event]:
    """Return starts, restarts with their recorded causes, spikes, alerts and evaluations, in order of time."""
    events = [Event(tag.at, tag.step, "spike", tag.value) for tag in run.tags if tag.key.startswith(SPIKE)]
    events += [Event(tag.at, tag.step, "alert", tag.value) for tag in run.tags if tag.key.startswith(ALERT)]
    for point in run.evaluations:  # its recalls, or else its first metrics
        values = {name.removeprefix(EVALUATION): v for name, v in point.values.items() if name.startswith(EVALUATION)}
        recalls = {name: value for name, value in values.items() if name.endswith(RETRIEVAL)}
        shown = recalls or {name: value for name, value in values.items() if not name.endswith("/pairs")}
        text = ", ".join(
            f"{name.rpartition('/')[0]}: {readable_metric(EVALUATION + name)} {readable_result(name, value)}"
            for name, value in list(shown.items())[:4]
        )
        events.append(Event(point.at, point.step, "evaluation", text))
    restarts = run.records(*RESTARTS)
    causes = [(1000 * entry["time"], f"{entry['cause']}: {entry['message']}") for entry in restarts]
    starts = [start for record in run.stages for start in record.starts]
    previous = 0
    for number, session in enumerate(run.sessions):
        text = f"{session.tags.get('world_size', '?')} ranks, rank 0 on {session.tags.get('mome.host', '?')}"
        if number == 0:
            events.append(Event(session.start, None, "begun", text))
        else:
            cause = [message for at, message in causes if previous <= at <= session.start]
            tags = [start["tags"] for start in starts if session.start <= start["at"] <= session.end]
            step = int(tags[0]["resumed_at"]) if tags and "resumed_at" in tags[0] else None
            resumed = "restarted from the beginning" if step is None else f"resumed after step {step}"
            events.append(Event(session.start, step, "restart", "; ".join([resumed, text, *cause[-1:]])))
        previous = session.start
    return sorted(events, key=lambda event: event.at)


def _lineage(run: RunFolder, server: str | None) -> tuple[dict[str, str], str]:
    """Return the origin of the last start with the run's MLflow id (or tag), and its page on the reader's server."""
    tags = run.sessions[-1].tags if run.sessions else {}
    commit = tags.get("mlflow.source.git.commit", "")
    if commit and tags.get("mome.git.dirty") == "true":
        commit += " with uncommitted changes"
    versions = [f"{name} {tags[key]}" for name in SHOWN_VERSIONS if (key := f"version.{name}") in tags]
    lineage = {
        "Experiment": experiment_name(run.config),
        "Code": commit,
        "Submission": tags.get("ray.submission_id", ""),
        "Started by": tags.get("mlflow.user", ""),
        "Versions": ", ".join(versions),
        "In MLflow": f"the run tagged mome.run = '{run.run}'" if run.run else "",
    }
    page, own = "", absolute_uri(server or default_uri(run.config.output))
    others = [] if run.recorded.tracking_uri is None else [absolute_uri(run.recorded.tracking_uri)]
    for uri in dict.fromkeys([own, *others]):
        ids = Cursor.load(journal_folder(run.folder), uri)
        if re.fullmatch(r"[0-9a-f]{32}", ids.run) and re.fullmatch(r"\d{1,32}", ids.experiment):
            lineage |= {"In MLflow": "", "MLflow run": ids.run}
            if uri == own and uri.startswith(("http://", "https://")):
                page = f"{redact(uri).rstrip('/')}/#/experiments/{ids.experiment}/runs/{ids.run}"
            break
    return {name: value for name, value in lineage.items() if value}, page


def _inspect_quarantine(run: RunFolder) -> tuple[list[ReasonCount], list[Inspected]]:
    """Return `RunReport.quarantine_counts` and `RunReport.quarantine`."""
    fields, storage = QuarantinedSample._fields, run.storage
    times = Counter(QuarantinedSample(*(record[name] for name in fields)) for record in run.records(*QUARANTINE))
    kinds: dict[tuple[str, str, str], list[QuarantinedSample]] = {}
    for sample in times:
        kinds.setdefault((sample.source, sample.stage, sample.reason), []).append(sample)
    counts = [(*kind, len(samples), sum(times[sample] for sample in samples)) for kind, samples in kinds.items()]
    # One of each kind before a second one of any, so that rare reasons are included.
    rounds = [samples[turn] for turn in range(MAX_PER_REASON) for samples in kinds.values() if turn < len(samples)]
    inspected: list[Inspected] = []
    for sample in rounds[:MAX_SAMPLES]:
        image, error = None, ""
        try:
            url = run.config.sources[sample.source].shards
            check_stored_url(url, f"sources.{sample.source}.shards")
            shard = next((shard for shard in load_manifest(storage, url).shards if shard.name == sample.shard), None)
            if shard is None:
                raise DataError(f"{sample.shard} is no longer in the manifest of {url}")
            index = load_index(storage, url, shard)
            number = next((n for n in range(len(index)) if index.offset[index.first[n]] == sample.offset), None)
            if number is None or index.keys[number] != sample.key:
                raise DataError(f"{sample.shard} now has another sample at byte {sample.offset}")
            file = join(parse_pattern(url).folder, sample.shard)
            members = {name: storage.read(file, at, at + size) for name, at, size in index.members(number)}
            image = thumbnail(decode(image_bytes(members), run.config.data.max_pixels), THUMBNAIL)
        except BadSample as bad:
            error = bad.reason
        except (MomeError, KeyError) as failure:
            error = f"not read again: {failure}"
        inspected.append((sample, image, error))
    return sorted(counts, key=lambda row: -row[-1]), inspected


def render_run_report(report: RunReport, comparison: Comparison | None = None) -> str:
    """Return the report as an HTML page, with a comparison with other runs if given."""
    axes, run = {"steps": False, "time": True}, report.run
    yaml = config_yaml(parse_config(run.values, run.folder), exclude_defaults=True)
    return render_page(
        "pipeline/reports/run_report.html.j2", f"report {run.folder}", report=report, run=run,
        curves={axis: [draw_curves(report, width, timed) for width in (WIDE, NARROW)] for axis, timed in axes.items()},
        shown=eval_report.headline(report.evaluations) if report.evaluations else None, max_events=MAX_EVENTS,
        over=OVER, comparison=comparison, yaml=yaml, evaluation_page=EVALUATION_PAGE, **READABLE,
    )  # fmt: skip


def draw_curves(report: RunReport, width: int, in_seconds: bool) -> Chart:
    """Lay out all curves over steps, or over seconds since the first start."""

    def x_of(at: int, step: int | None) -> float:
        return (at - (report.started or at)) / 1000 if in_seconds else float(step or 0)

    starts = [event.at for event in report.events if event.kind in ("begun", "restart")]
    records = [record for record in report.run.stages if record.points]
    measures, evaluations = [], report.run.evaluations
    objectives = sorted({name for record in records for name in record.config.objectives})
    panels = list(MEASURES)
    if len(objectives) > 1:  # the sum hides which objective learns
        panels[1:1] = [(f"train/loss_{name}", f"{name} loss", 70) for name in objectives]
    for metric, name, height in panels:
        series = []
        for number, record in enumerate(records):
            for start, end in zip(starts, [*starts[1:], float("inf")], strict=True):  # no line crosses a restart
                points = [(x_of(at, step), value) for at, step, value in record.series(metric) if start <= at < end]
                if points:
                    series.append(Series(number, points))
        if series:
            measures.append(Measure(name, series, height))
    if len(evaluations) > 1:
        tracked = {name for point in evaluations for name in point.values if name.startswith(EVALUATION)}
        names = sorted(name for name in tracked if name.endswith(("i2t_r1", "t2i_r1")))  # also after re-ranking
        recalls = [
            Series(number, [(x_of(p.at, p.step), p.values[name]) for p in evaluations if name in p.values])
            for number, name in enumerate(names)
        ]
        measures.append(Measure("retrieval R@1 in both directions", recalls, 60))
    stages = []
    for record in records:
        first_at = record.starts[0]["at"] if record.starts else record.points[0].at
        first, last = x_of(first_at, record.first_step), x_of(record.points[-1].at, record.reached)
        stages.append((record.config.name, first, last))
    shown = [event for event in report.events if event.kind != "begun" and (in_seconds or event.step is not None)]
    marks = [Mark(x_of(event.at, event.step), event.kind, event.text) for event in shown]
    return line_chart(measures, width, stages, marks, in_seconds)


def compare(runs: Sequence[RunFolder]) -> Comparison:
    """Compare two or more runs.

    Stages are identified by name. In a section that only some runs have, such as a stage, keys with default values are
    not differences.
    """
    names, folders = [run.name for run in runs], [run.folder for run in runs]
    names = names if len(set(names)) == len(names) else folders
    losses: dict[str, list[Series]] = {}
    results: dict[str, dict[str, list[Result]]] = {}
    by_path: dict[str, dict[str, Any]] = {}
    explicit: set[str] = set()
    for number, (own_name, run) in enumerate(zip(names, runs, strict=True)):
        for record in run.stages:
            if series := record.series("train/loss"):
                curve = [(float(step - record.first_step), value) for _, step, value in series]
                losses.setdefault(record.config.name, []).append(Series(number, curve))
        for group, name, value in _results_of(run):
            results.setdefault(group, {}).setdefault(name, [None] * len(runs))[number] = value
        for path, setting in flatten(_by_name(run.values)).items():
            by_path.setdefault(path, {})[own_name] = redact(setting) if isinstance(setting, str) else setting
        recorded = parse_config(run.values, run.folder)
        explicit |= flatten(_by_name(recorded.model_dump(mode="json", exclude_defaults=True))).keys()
    config = {
        path: values
        for path, values in by_path.items()
        if path not in IGNORED_KEYS
        and (len({json.dumps(v) for v in values.values()}) > 1 or (len(values) < len(runs) and path in explicit))
    }
    return Comparison(names, _without_lone_sections(config, by_path, names), results, losses, folders)


def _without_lone_sections(
    config: dict[str, dict[str, Any]], by_path: dict[str, dict[str, Any]], names: list[str]
) -> dict[str, dict[str, Any]]:
    """Replace the keys of a section that some runs lack, such as a stage, by one entry with their number."""
    prefixes: dict[str, set[str]] = {name: set() for name in names}
    for path, values in by_path.items():
        parts = path.split(".")
        for name in values:
            prefixes[name] |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    grouped: dict[str, dict[str, Any]] = {}
    for path, values in config.items():
        lacking, parts = [name for name in names if name not in values], path.split(".")
        sections = (".".join(parts[:count]) for count in range(1, len(parts)))
        section = next((s for s in sections if lacking and all(s not in prefixes[name] for name in lacking)), None)
        if section is None:
            grouped[path] = values
        else:
            entry = grouped.setdefault(section, {})
            for name in values:
                entry[name] = f"{int(str(entry.get(name, '0')).split()[0]) + 1} keys"
    return grouped


# Metrics of an evaluation that are fractions, and their names for people.
_DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}


def readable_metric(name: str) -> str:
    """Return the name for people of an evaluation's metric: 'image → text R@1' for 'eval/test/i2t_r1'."""
    if not name.startswith(EVALUATION):
        return name
    last = name.rpartition("/")[2]
    if match := re.fullmatch(r"(reranked_)?(i2t|t2i)_(?:r(\d+)|(\w+))", last):
        measure = f"R@{match[3]}" if match[3] else match[4].replace("_", " ")
        return f"{_DIRECTIONS[match[2]]} {measure}{', re-ranked' if match[1] else ''}"
    return last.replace("_", " ").replace("mlm", "masked words:").replace("itm", "matching:")


def readable_result(name: str, value: Result) -> str:
    """Return a result for people: fractions as percentages, '–' if it is missing."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return percent(value) if FRACTIONS.search(name) else significant(value)


def best_of(name: str, values: Sequence[Result]) -> int | None:
    """Return the index of the single best value of a fraction; None for other metrics and for ties."""
    numbers = [value if isinstance(value, float) else -1.0 for value in values]
    best = max(numbers)
    is_best = FRACTIONS.search(name) and best >= 0 and numbers.count(best) == 1
    return numbers.index(best) if is_best else None


def _by_name(values: Any) -> Any:
    """Convert lists of named sections to mappings, so that an additional stage does not shift the others."""
    if isinstance(values, dict):
        return {key: _by_name(value) for key, value in values.items()}
    if isinstance(values, list) and values and all(isinstance(v, dict) and "name" in v for v in values):
        return {v["name"]: {key: _by_name(value) for key, value in v.items() if key != "name"} for v in values}
    return values


def _results_of(run: RunFolder) -> Iterator[tuple[str, str, Result]]:
    """Yield (group, name, result); evaluations are grouped by data, so that figures of different data do not meet."""
    yield "Run", "status", run.status or "unfinished"
    yield "Run", "steps", float(run.reached)
    yield "Run", "restarts", float(run.num_restarts)
    yield "Run", "bad samples replaced", float(sum(1 for _ in run.records(*QUARANTINE)))
    for record in run.stages:
        yield "Last loss", record.config.name, record.last.get("train/loss")
        yield "Samples per second (median)", record.config.name, record.samples_per_second
    evaluations = eval_report.load_report_data(run.storage, run.folder)
    for data in reversed(evaluations):
        key = data.key
        weights = "" if (key.stage, key.step) == (run.config.stages[-1].name, None) else f" of {key.stage}"
        weights += "" if key.step is None else f" at step {key.step}"
        for name, value in data.metrics.items():
            yield f"Evaluation {key.name}{weights} ({key.data})", f"{EVALUATION}{key.name}/{name}", value
    if not evaluations:  # only the metrics recorded during training are known: show each source's last ones
        latest: dict[str, dict[str, float]] = {}
        for point in run.evaluations:
            by_source: dict[str, dict[str, float]] = {}
            for name, value in point.values.items():
                if name.startswith(EVALUATION):
                    by_source.setdefault(name.rpartition("/")[0], {})[name] = value
            latest |= by_source
        for values in latest.values():
            for name, value in values.items():
                yield "Evaluation, as recorded", name, value
    if run.seconds:
        yield "Time", "hours", sum(run.seconds.values()) / 3600
        yield "Time", "goodput", run.goodput
        for phase, seconds in run.seconds.items():
            yield "Time", f"{phase} seconds", seconds
    for record in run.stages:
        for start in record.starts:
            for dataset in start["datasets"]:
                yield "Data digest", f"{record.config.name}: {dataset['name']}", dataset["digest"][:16]


READABLE: dict[str, Any] = {  # functions of templates
    "readable_metric": readable_metric, "readable_result": readable_result, "best_of": best_of,
}  # fmt: skip


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as an HTML page, with a chart of losses for each stage and one line per run."""
    charts = {
        stage: line_chart([Measure("loss", curves, LOSS_HEIGHT)], NARROW) for stage, curves in comparison.losses.items()
    }
    subject = f"comparison {' '.join(comparison.folders)}"
    return render_page(
        "pipeline/reports/comparison.html.j2", subject, comparison=comparison, loss_charts=charts, **READABLE
    )
