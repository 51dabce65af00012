"""Comparison of runs: the config keys in which they differ, their results and loss curves, and the HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
class Row:
    """A result of every run, in the order of the runs; None if a run lacks it."""

    name: str
    values: list[Result]

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)


@dataclass(frozen=True)
class Comparison:
    runs: list[str]  # names of the runs, or their folders if names are equal
    config: dict[str, dict[str, Any]]  # dotted path -> run -> value; runs without the key are missing
    results: dict[str, list[Row]]  # by group
    losses: dict[str, list[Series]]  # stage -> curve of each run over the steps since the stage's start
    folders: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values: non-finite numbers become null, and repeated names get their group."""
        results: dict[str, dict[str, Result]] = {}
        for group, rows in self.results.items():
            for row in rows:
                name = f"{row.name} ({group})" if row.name in results else row.name
                values = [None if isinstance(v, float) and not math.isfinite(v) else v for v in row.values]
                results[name] = dict(zip(self.runs, values, strict=True))
        return {"runs": self.runs, "config": self.config, "results": results}


def compare(runs: Sequence[RunFolder]) -> Comparison:
    """Compare two or more runs."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.folder for run in runs]
    losses: dict[str, list[Series]] = {}
    rows: dict[str, dict[str, Row]] = {}
    for number, run in enumerate(runs):
        for index, record in enumerate(run.stages):
            first = run.config.stage_start(index)
            if series := record.series("train/loss"):
                curve = [(float(step - first), value) for _, step, value in series]
                losses.setdefault(record.name, []).append(Series(number, curve))
        for group, name, value in _results_of(run):
            row = rows.setdefault(group, {}).setdefault(name, Row(name, [None] * len(runs)))
            row.values[number] = value
    results = {group: list(by_name.values()) for group, by_name in rows.items()}
    config = differences(dict(zip(names, runs, strict=True)))
    return Comparison(names, config, results, losses, [run.folder for run in runs])


def differences(runs: dict[str, RunFolder]) -> dict[str, dict[str, Any]]:
    """Return dotted path -> run -> value of the keys that differ. Stages are identified by name.

    In a section that only some runs have, such as a stage, keys with default values are not differences.
    """
    by_path: dict[str, dict[str, Any]] = {}
    explicit: set[str] = set()
    for name, run in runs.items():
        for path, value in flatten(_by_name(run.values)).items():
            by_path.setdefault(path, {})[name] = redact(value) if isinstance(value, str) else value
        explicit |= flatten(_by_name(run.recorded_config().model_dump(mode="json", exclude_defaults=True))).keys()
    return {
        path: values
        for path, values in by_path.items()
        if path not in IGNORED_KEYS
        and (len({json.dumps(v) for v in values.values()}) > 1 or (len(values) < len(runs) and path in explicit))
    }


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
        yield "Last loss", record.name, record.last("train/loss")
    for record in run.stages:
        yield "Samples per second (median)", record.name, record.samples_per_second
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
                yield "Data digest", f"{record.name}: {dataset['name']}", dataset["digest"][:16]


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as an HTML page, with a chart of losses for each stage and one line per run."""
    return render_page(
        "comparison.html.j2",
        [Path(__file__).parent],
        subject=f"comparison {' '.join(comparison.folders)}",
        comparison=comparison,
        loss_charts={
            stage: line_chart([Measure("loss", curves, HEIGHT)], WIDTH) for stage, curves in comparison.losses.items()
        },
    )
