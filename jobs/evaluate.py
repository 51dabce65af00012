"""`mome evaluate`: a stage's weights on held-out pairs, with the report, recorded where the run was tracked."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from jobs.console import console
from pipeline.config.errors import ConfigError
from pipeline.config.schema import EVALUATED, RunConfig, SourceConfig, StageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage, join
from pipeline.evaluation.aligned import aligned
from pipeline.evaluation.evaluate import TASKS, Evaluation, evaluate, stage_of
from pipeline.evaluation.report import write_report
from pipeline.evaluation.shown import Shown, keep, kept
from pipeline.models import build_model
from pipeline.models.model import Model
from pipeline.reports.run_folder import open_run
from pipeline.tracking.journal import Journal
from pipeline.tracking.tracker import Tracker, journal_folder
from pipeline.training.accounting import spent
from pipeline.training.checkpoint import Weights, is_committed, load_weights, stage_url
from pipeline.training.stages import heads, load_matching

log = logging.getLogger(__name__)

REPORT = "report.html"


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """The last stage of a run that has just been trained."""
    with spent(Storage(config.storage), config.folder, "evaluation"):
        return evaluate_checkpoint(config.folder)


def evaluate_checkpoint(
    checkpoint: str,
    source: str | None = None,
    limit: int | None = None,
    report: Path | None = None,
    track: bool = True,
    against: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run's or a stage's weights; returns the numbers as `mome evaluate --json` prints them.

    `source` is one of the run's, or the URL of shards. The report goes into the run's folder, or to `report`; the
    figures of the run in folder `against` stand beside. With `track` the result is kept in the run's folder too.
    Raises CheckpointError for a folder without finished weights, ConfigError and DataError for a wrong source,
    ConfigError for a run to stand beside that was never evaluated.
    """
    other = None if against is None else _evaluation_of(against, source)
    storage = Storage()
    weights = load_weights(storage, checkpoint.rstrip("/"))
    config, source = _with_source(weights.config, stage_of(weights.config, weights.stage), source)
    storage = Storage(config.storage)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary)
    model = model_of(weights)
    found = evaluate(
        model,
        tokenizer,
        config,
        storage,
        source,
        limit,
        weights.stage,
        dict(_earlier_stages(config, weights, storage)),
        progress=lambda message: console.print(f"evaluating: {message}", style="dim"),
        choices=weights.choices,
    )
    if found.trained_on:
        told = ", ".join(found.trained_on)
        log.warning("source '%s' was trained on (stages: %s): these are no held-out results", found.source, told)
    if found.matching is not None and found.matching.is_collapsed:
        log.warning(
            "matching has collapsed: right for %.0f %% of the true pairs and %.0f %% of the wrong ones; "
            "train longer, or check that the stage started from the weights it should have",
            100 * found.matching.accuracy_matched,
            100 * found.matching.accuracy_mismatched,
        )
    alignments = aligned(model, tokenizer, found.held_out, config, stage_of(config, weights.stage))
    place = str(report) if report is not None else join(config.folder, REPORT)
    found = found.located(checkpoint=weights.url, report=place)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / REPORT
        shown = write_report(found, config, tokenizer, page, _curves(config), alignments, other)
        storage.write(place, page.read_bytes())
        if track:
            keep(storage, config.folder, shown)
            _record(config, storage, found, page)
    return found.to_json()


def _evaluation_of(run: str, source: str | None) -> Shown:
    """The last evaluation of another run, of the same source if there is one."""
    opened = open_run(run)
    found = kept(opened.storage, opened.folder)
    if not found:
        raise ConfigError(f"--against {run}: that run was never evaluated; run `mome evaluate {run}` first")
    return next((each for each in found if each.source == source), found[0])


def model_of(weights: Weights) -> Model:
    """The model that a stage's weights are of."""
    config = weights.config
    index = config.stages.index(stage_of(config, weights.stage))
    model = build_model(config.model, len(weights.vocabulary), heads(config, index))
    load_matching(model, weights.tensors, weights.stage, weights.absent)
    return model


def _earlier_stages(config: RunConfig, weights: Weights, storage: Storage) -> Iterator[tuple[str, nn.Module]]:
    """The finished stages before this one, which alone can tell what their objectives learnt."""
    for index, stage in enumerate(config.stages):
        url = stage_url(config, index)
        if stage.name == weights.stage:
            return
        if is_committed(storage, url):
            yield stage.name, model_of(load_weights(storage, url))


def _with_source(config: RunConfig, stage: StageConfig, source: str | None) -> tuple[RunConfig, str | None]:
    """A source given as a URL of shards joins the run's own, read as the stage's is, or as pairs."""
    if source is None or source in config.sources:
        return config, source
    if "/" not in source:
        known = ", ".join(name for name, each in config.sources.items() if each.use in EVALUATED)
        raise ConfigError(f"--source {source}: no source of this run; give one of {known}, or the URL of shards")
    use = config.use_of(stage)
    held_out = SourceConfig(shards=source, use=use if use in TASKS else "pairs")
    return config.model_copy(update={"sources": {**config.sources, "held_out": held_out}}), "held_out"


def _record(config: RunConfig, storage: Storage, found: Evaluation, page: Path) -> None:
    tracker = Tracker.open(config, storage)
    tracker.metrics(config.total_steps, found.metrics())
    tracker.artifact(f"evaluation/{found.source}/{REPORT}", page)
    tracker.close(timeout=60)


def _curves(config: RunConfig) -> dict[str, list[tuple[int, float]]]:
    """Each stage's loss by step, as far as this machine's journal of the run knows it."""
    journal = Journal(journal_folder(config.folder))
    curves: dict[str, list[tuple[int, float]]] = {stage.name: [] for stage in config.stages}
    for record in journal.all_records():
        if record["kind"] == "metrics" and record["stage"] is not None and "train/loss" in record["values"]:
            name = config.stages[record["stage"]].name
            curves[name].append((record["step"], float(record["values"]["train/loss"])))
    return {name: points for name, points in curves.items() if points}
