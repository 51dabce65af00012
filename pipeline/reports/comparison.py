"""Comparison of runs: the config keys in which they differ, their results and loss curves, and the HTML page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.load import flatten
from pipeline.config.redaction import redact
from pipeline.evaluation.report import load_report_data
from pipeline.pages.charts import Measure, Series, line_chart
from pipeline.pages.page import render_page
from pipeline.reports.run_folder import QUARANTINE, RunFolder
from pipeline.tracking.journal import EVALUATION

Result = float | str | None
IGNORED_KEYS = ("name",)  # differ between any two runs
WIDTH, HEIGHT = 350, 130  # of a loss chart


@dataclass(frozen=True)
class Comparison:
    runs: list[str]  # names of the runs, or their folders if names are equal
    config: dict[str, dict[str, Any]]  # dotted path -> run -> value; runs without the key are missing
    results: dict[str, dict[str, list[Result]]]  # group -> name -> values in the order of the runs; None: missing
    losses: dict[str, list[Series]]  # stage -> curve of each run over the steps since the stage's start
    folders: list[str]


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
        explicit |= flatten(_by_name(run.recorded_config().model_dump(mode="json", exclude_defaults=True))).keys()
    config = {
        path: values
        for path, values in by_path.items()
        if path not in IGNORED_KEYS
        and (len({json.dumps(v) for v in values.values()}) > 1 or (len(values) < len(runs) and path in explicit))
    }
    return Comparison(names, config, results, losses, folders)


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
        yield "Last loss", record.config.name, record.last("train/loss")
        yield "Samples per second (median)", record.config.name, record.samples_per_second
    evaluations = load_report_data(run.storage, run.folder)
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


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as an HTML page, with a chart of losses for each stage and one line per run."""
    charts = {
        stage: line_chart([Measure("loss", curves, HEIGHT)], WIDTH) for stage, curves in comparison.losses.items()
    }
    subject = f"comparison {' '.join(comparison.folders)}"
    return render_page("pipeline/reports/comparison.html.j2", subject, comparison=comparison, loss_charts=charts)
