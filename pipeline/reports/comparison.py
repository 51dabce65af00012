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
from pipeline.evaluation.report_data import load_report_data
from pipeline.pages.charts import Measure, Series, line_chart
from pipeline.pages.page import render_page
from pipeline.reports.run_folder import RunFolder
from pipeline.tracking.journal import EVALUATION

Result = float | str | None
Losses = list[tuple[int, float]]  # (step since the stage's start, loss)
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
    losses: dict[str, list[tuple[int, Losses]]]  # stage -> (index of the run, curve)
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
    losses: dict[str, list[tuple[int, Losses]]] = {}
    rows: dict[tuple[str, str], list[Result]] = {}
    for number, run in enumerate(runs):
        for index, record in enumerate(run.stages):
            first = run.config.stage_start(index)
            if series := record.series("train/loss"):
                curve = [(step - first, value) for _, step, value in series]
                losses.setdefault(record.name, []).append((number, curve))
        for group, name, value in _results_of(run):
            rows.setdefault((group, name), [None] * len(runs))[number] = value
    results: dict[str, list[Row]] = {}
    for (group, name), values in rows.items():
        results.setdefault(group, []).append(Row(name, values))
    config = differences(dict(zip(names, runs, strict=True)))
    return Comparison(names, config, results, losses, [run.folder for run in runs])


def differences(runs: dict[str, RunFolder]) -> dict[str, dict[str, Any]]:
    """Return dotted path -> run -> value of the keys that differ. Stages are identified by name.

    In a section that only some runs have, such as a stage, keys with default values are not differences.
    """
    flat = {
        name: {path: redact(v) if isinstance(v, str) else v for path, v in flatten(_by_name(run.values)).items()}
        for name, run in runs.items()
    }
    explicit = {
        path
        for run in runs.values()
        for path in flatten(_by_name(run.recorded_config().model_dump(mode="json", exclude_defaults=True)))
    }
    paths = dict.fromkeys(path for values in flat.values() for path in values if path not in IGNORED_KEYS)
    by_path = {path: {run: values[path] for run, values in flat.items() if path in values} for path in paths}
    return {
        path: values
        for path, values in by_path.items()
        if len({json.dumps(value) for value in values.values()}) > 1 or (len(values) < len(flat) and path in explicit)
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
    yield "Run", "bad samples replaced", float(len(run.quarantined()))
    for record in run.stages:
        yield "Last loss", record.name, record.last("train/loss")
    for record in run.stages:
        yield "Samples per second (median)", record.name, record.samples_per_second
    evaluations = load_report_data(run.storage, run.folder)
    last = run.config.stages[-1].name
    for data in reversed(evaluations):
        weights = "" if (data.stage, data.step) == (last, None) else f" of {data.stage}"
        weights += "" if data.step is None else f" at step {data.step}"
        for name, value in data.metrics.items():
            yield f"Evaluation {data.source}{weights} ({data.key.data})", f"{EVALUATION}{data.source}/{name}", value
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
    charts = {
        stage: line_chart([Measure("loss", [Series(number, points) for number, points in curves], HEIGHT)], WIDTH)
        for stage, curves in comparison.losses.items()
    }
    subject = f"comparison {' '.join(comparison.folders)}"
    return render_page(
        "comparison.html.j2", [Path(__file__).parent], subject, comparison=comparison, loss_charts=charts
    )
