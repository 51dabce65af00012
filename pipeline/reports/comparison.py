"""Runs beside one another: the config keys in which they differ, and what came out of each."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import flatten
from pipeline.config.redaction import redact
from pipeline.evaluation.report_data import load_report_data
from pipeline.pages.charts import Chart, Measure, Series, line_chart
from pipeline.pages.page import render_page
from pipeline.reports.run_folder import RunFolder, StageRecord
from pipeline.tracking.journal import EVALUATION

Result = float | str | None
PARTS_OF_NAME = ("name",)  # keys that differ in any two runs, and say nothing


@dataclass(frozen=True)
class Row:
    """One result of every run, in the runs' order; None where a run has none."""

    name: str
    values: list[Result]

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)


@dataclass(frozen=True)
class StageCurves:
    """A stage's losses by step since its beginning, of each run that has such a stage: (number of the run, points)."""

    name: str
    runs: list[tuple[int, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Comparison:
    runs: list[str]  # what each is called: its name, or its folder where names are alike
    config: dict[str, dict[str, Any]]  # dotted path -> run -> value; a run that has no such key is left out
    results: dict[str, list[Row]]  # by group
    curves: list[StageCurves]
    folders: list[str]

    def as_json(self) -> dict[str, Any]:
        """Results that are not numbers JSON knows become null; of results of one name the later tell their group."""
        results: dict[str, dict[str, Result]] = {}
        for group, rows in self.results.items():
            for row in rows:
                name = f"{row.name} ({group})" if row.name in results else row.name
                results[name] = {run: _plain(value) for run, value in zip(self.runs, row.values, strict=True)}
        return {"runs": self.runs, "config": self.config, "results": results}


def compare(runs: Sequence[RunFolder]) -> Comparison:
    """Two runs or more."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.folder for run in runs]
    config = differences(dict(zip(names, runs, strict=True)))
    return Comparison(names, config, _results(runs), _curves(runs), [run.folder for run in runs])


def differences(runs: dict[str, RunFolder]) -> dict[str, dict[str, Any]]:
    """Dotted path -> run -> value, of the keys that not all configs have alike. Stages go by their names.

    Of a section that only some runs have, such as a stage, what it leaves at the defaults is no difference.
    """
    flat = {name: _shown(flatten(_by_name(run.values))) for name, run in runs.items()}
    chosen = {
        path
        for run in runs.values()
        for path in flatten(_by_name(run.recorded_config().model_dump(mode="json", exclude_defaults=True)))
    }
    paths = dict.fromkeys(path for values in flat.values() for path in values if path not in PARTS_OF_NAME)
    found = {path: {run: values[path] for run, values in flat.items() if path in values} for path in paths}
    return {
        path: values
        for path, values in found.items()
        if len({json.dumps(value) for value in values.values()}) > 1 or (len(values) < len(flat) and path in chosen)
    }


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """No password that an address holds."""
    return {path: redact(value) if isinstance(value, str) else value for path, value in values.items()}


def _by_name(values: Any) -> Any:
    """Lists of named sections as mappings: a stage more in one run shifts no other."""
    if isinstance(values, dict):
        return {key: _by_name(value) for key, value in values.items()}
    if isinstance(values, list) and values and all(isinstance(v, dict) and "name" in v for v in values):
        return {v["name"]: {key: _by_name(value) for key, value in v.items() if key != "name"} for v in values}
    return values


def _results(runs: Sequence[RunFolder]) -> dict[str, list[Row]]:
    each = [dict(_results_of(run)) for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    rows: dict[str, list[Row]] = {}
    for group, name in names:
        rows.setdefault(group, []).append(Row(name, [found.get((group, name)) for found in each]))
    return rows


def _results_of(run: RunFolder) -> Iterator[tuple[tuple[str, str], Result]]:
    """((group, name), result)."""
    yield ("Run", "status"), run.status or "unfinished"
    yield ("Run", "steps"), float(run.reached)
    yield ("Run", "restarts"), float(max(len(run.sessions) - 1, 0))
    yield ("Run", "bad samples replaced"), float(len(run.quarantined()))
    for record in run.stages:
        yield ("Last loss", record.name), record.last("train/loss")
    for record in run.stages:
        yield ("Samples a second, the median", record.name), _speed(record)
    yield from _evaluated(run)
    if run.time is not None:
        seconds = run.time["seconds"]
        total = sum(seconds.values())
        yield ("Time", "hours"), total / 3600
        yield ("Time", "goodput"), seconds["training"] / total if total else None
        for kind, value in seconds.items():
            yield ("Time", f"{kind} seconds"), value
    for record in run.stages:
        for entry in record.begun:
            for each in entry["datasets"]:
                yield ("Data digest", f"{record.name}: {each['name']}"), each["digest"][:16]


def _evaluated(run: RunFolder) -> Iterator[tuple[tuple[str, str], Result]]:
    """Every evaluation's figures, under a name that says of what data: figures of other data stand in other rows."""
    found = load_report_data(run.storage, run.folder)
    last = run.config.stages[-1].name
    for shown in reversed(found):
        weights = "" if (shown.stage, shown.step) == (last, None) else f" of {shown.stage}"
        weights += "" if shown.step is None else f" at step {shown.step}"
        group = f"Evaluation {shown.source}{weights} ({shown.key.data})"
        for name, value in shown.metrics.items():
            yield (group, f"{EVALUATION}{shown.source}/{name}"), value
    if not found:  # only what was measured while it trained is known
        for (_, name), value in _recorded(run).items():
            yield ("Evaluation, as recorded", name), value


def _recorded(run: RunFolder) -> dict[tuple[str, str], float]:
    """(source, metric) -> value of the last point of each source: a later one replaces all of an earlier one's."""
    last: dict[str, dict[str, float]] = {}
    for point in run.evaluations:
        values = {name: value for name, value in point.values.items() if name.startswith(EVALUATION)}
        sources = {name.removeprefix(EVALUATION).rpartition("/")[0] for name in values}
        for source in sources:
            last[source] = {name: value for name, value in values.items() if name.startswith(f"{EVALUATION}{source}/")}
    return {(source, name): value for source, values in last.items() for name, value in values.items()}


def _speed(record: StageRecord) -> float | None:
    speeds = [value for _, _, value in record.series("perf/samples_per_s")]
    return statistics.median(speeds) if speeds else None


def _curves(runs: Sequence[RunFolder]) -> list[StageCurves]:
    names = dict.fromkeys(record.name for run in runs for record in run.stages)
    found = [StageCurves(name, list(_losses(runs, name))) for name in names]
    return [stage for stage in found if stage.runs]


def _losses(runs: Sequence[RunFolder], stage: str) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    for number, run in enumerate(runs):
        for index, record in enumerate(run.stages):
            series = record.series("train/loss")
            if record.name == stage and series:
                first = run.config.stage_start(index)
                yield number, [(step - first, value) for _, step, value in series]


def _plain(value: Result) -> Result:
    return None if isinstance(value, float) and not math.isfinite(value) else value


HERE = Path(__file__).parent  # of the templates
WIDTH, HEIGHT = 350, 130  # of a stage's curves


@dataclass(frozen=True)
class Drawn:
    name: str
    line: Chart


def render_comparison(comparison: Comparison) -> str:
    """The page as text."""
    subject = f"comparison {' '.join(comparison.folders)}"
    return render_page("comparison.html.j2", [HERE], subject, comparison=comparison, drawings=drawings(comparison))


def drawings(comparison: Comparison) -> list[Drawn]:
    """Each stage's losses, a line for each run."""
    return [Drawn(stage.name, _drawing(stage)) for stage in comparison.curves]


def _drawing(stage: StageCurves) -> Chart:
    stretches = [Series(number, points) for number, points in stage.runs]
    return line_chart([Measure("loss", stretches, HEIGHT)], WIDTH)
