"""`mome evaluate`: a checkpoint's weights on held-out pairs, with the report, recorded where the run was tracked.

One process does it, or ranks share it: those that `--workers` has Ray place, or those of torchrun.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from jobs.console import notify
from jobs.shared import answered, device_of, on_workers, ranks_here
from pipeline.config.errors import ConfigError
from pipeline.config.paths import absolute
from pipeline.config.schema import EVALUATED, RunConfig, SourceConfig, StageConfig, Use
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage, join
from pipeline.evaluation.aligned import aligned
from pipeline.evaluation.evaluate import TASKS, evaluate
from pipeline.evaluation.ranks import ALONE, Ranks
from pipeline.evaluation.report import render, show
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.shown import Shown, keep, kept
from pipeline.models import build_model
from pipeline.models.model import Model
from pipeline.reports.run_folder import open_run, stages_of
from pipeline.tracking.tracker import Tracker
from pipeline.training.accounting import spent
from pipeline.training.checkpoint import Weights, config_of_weights, is_committed, load_weights, stage_url
from pipeline.training.stages import heads, load_matching

log = logging.getLogger(__name__)

REPORT = "report.html"


@dataclass(frozen=True)
class Asked:
    """What is to be measured, on what."""

    checkpoint: str
    source: str | None = None
    limit: int | None = None
    rerank_best: int | None = None
    use: Use | None = None  # what a URL of shards is read as; None: as the stage's own, or as pairs
    probe: str | None = None  # labelled pictures that a linear classifier is trained on
    report: str | None = None  # where it will be written; None: the run's folder


@dataclass(frozen=True)
class Measured:
    """What the first rank tells of an evaluation: everything that is then written, printed and tracked."""

    config: RunConfig
    step: int  # global, at which the weights were
    result: dict[str, Any]  # as `mome evaluate --json` prints it
    metrics: dict[str, float]
    shown: Shown | None  # on the first rank
    warnings: list[str]


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """The last stage of a run that has just been trained; on its ranks where they have what the driver may lack."""
    asked = Asked(config.folder)
    with spent(Storage(config.storage), config.folder, "evaluation"):
        if config.cluster.gpus_per_worker:
            return _deliver(_measured_on_ray(asked, config.cluster.workers), track=True)
        return _deliver(_measured(asked, ALONE), track=True)


def evaluate_checkpoint(
    checkpoint: str,
    source: str | None = None,
    limit: int | None = None,
    report: Path | None = None,
    track: bool = True,
    against: str | None = None,
    workers: int | None = None,
    rerank_best: int | None = None,
    use: Use | None = None,
    probe: str | None = None,
) -> dict[str, Any] | None:
    """Evaluate a run's, a stage's or a step's weights; the numbers as `mome evaluate --json` prints them.

    `source` is one of the run's, or the URL of shards. The report goes into the run's folder, or to `report`; the
    figures of the run in folder `against` stand beside. With `track` the result is kept in the run's folder too. With
    `workers` so many ranks on Ray share the work; under torchrun its ranks do, and all but the first get None.
    Raises CheckpointError for a folder without finished weights, ConfigError and DataError for a wrong source,
    ConfigError for a run to stand beside that was never evaluated.
    """
    other = None if against is None else _evaluation_of(against, source)
    place = None if report is None else str(report)
    asked = Asked(checkpoint.rstrip("/"), source, limit, rerank_best, use, probe, place)
    if workers is not None:
        return _deliver(_measured_on_ray(asked, workers), track, other)
    ranks = ranks_here()
    measured = _measured(asked, ranks)
    return _deliver(measured, track, other) if ranks.rank == 0 else None


def _measured_on_ray(asked: Asked, workers: int) -> Measured:
    """Raises MomeError with the first failure, on whichever rank."""
    source, probe = (
        each if each is None or "/" not in each else absolute(each) for each in (asked.source, asked.probe)
    )
    asked = replace(asked, checkpoint=absolute(asked.checkpoint), source=source, probe=probe)
    config = config_of_weights(Storage(), asked.checkpoint)
    told = on_workers(_evaluate_rank, config, workers, "evaluation", asdict(asked))
    return Measured(**{**told, "config": RunConfig.model_validate_json(told["config"])})


def _evaluate_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker."""

    def measure(asked: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
        found = _measured(Asked(**asked), ranks)
        return {**vars(found), "config": found.config.model_dump_json()}

    return answered(loop_config, measure)


def _measured(asked: Asked, ranks: Ranks) -> Measured:
    """Called on each of the ranks, which get the same; only the first makes the page."""
    weights = load_weights(Storage(), asked.checkpoint)
    stage = weights.config.stage_named(weights.stage)
    use = asked.use or ("labelled" if asked.probe else None)
    config, source = _with_source(weights.config, stage, asked.source, "--source", use)
    config, probe = _with_source(config, stage, asked.probe, "--probe", "labelled")
    storage, device = Storage(config.storage), device_of(ranks)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    model = model_of(weights).to(device)
    found = evaluate(
        model,
        tokenizer,
        config,
        storage,
        source,
        asked.limit,
        weights.stage,
        {name: model.to(device) for name, model in _earlier_stages(config, weights, storage)},
        asked.rerank_best,
        progress=lambda message: notify(f"evaluating: {message}", style="dim") if ranks.rank == 0 else None,
        choices=weights.choices,
        ranks=ranks,
        probe=probe,
    )
    found = found.located(checkpoint=weights.url, report=asked.report or join(config.folder, REPORT))
    shown = _shown(found, model, tokenizer, config) if ranks.rank == 0 else None
    found.held_out.close()
    return Measured(config, weights.step, found.to_json(), found.metrics(), shown, _warnings(found))


def _shown(found: Evaluation, model: Model, tokenizer: Tokenizer, config: RunConfig) -> Shown:
    stage = config.stage_named(found.stage)
    return show(found, config, tokenizer, aligned(model, tokenizer, found.held_out, config, stage))


def _warnings(found: Evaluation) -> list[str]:
    told = []
    if found.trained_on:
        stages = ", ".join(found.trained_on)
        told.append(f"source '{found.source}' was trained on (stages: {stages}): these are no held-out results")
    if found.matching is not None and found.matching.is_collapsed:
        told.append(
            f"matching has collapsed: right for {100 * found.matching.accuracy_matched:.0f} % of the true pairs and "
            f"{100 * found.matching.accuracy_mismatched:.0f} % of the wrong ones; "
            "train longer, or check that the stage started from the weights it should have"
        )
    return told


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
    index = config.stages.index(config.stage_named(weights.stage))
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


def _with_source(
    config: RunConfig, stage: StageConfig, source: str | None, option: str, use: Use | None
) -> tuple[RunConfig, str | None]:
    """A source given as a URL of shards joins the run's own, read as `use`, else as the stage's is, or as pairs."""
    if source is None or source in config.sources:
        return config, source
    if "/" not in source:
        known = ", ".join(name for name, each in config.sources.items() if each.use in EVALUATED)
        raise ConfigError(f"{option} {source}: no source of this run; give one of {known}, or the URL of shards")
    if use is None:
        use = config.use_of(stage) if config.use_of(stage) in TASKS else "pairs"
    name = {"--source": "held_out", "--probe": "probe"}[option]
    given = SourceConfig(shards=source, use=use)
    return config.model_copy(update={"sources": {**config.sources, name: given}}), name


def _deliver(measured: Measured, track: bool, other: Shown | None = None) -> dict[str, Any]:
    """Warnings to the log, the page to its place, the figures to the run's tracker at the step of the weights."""
    config, result = measured.config, measured.result
    assert measured.shown is not None
    for warning in measured.warnings:
        log.warning("%s", warning)
    storage = Storage(config.storage)
    page = render(measured.shown, config, _curves(config), other).encode()
    storage.write(result["report"], page)
    if track:
        keep(storage, config.folder, measured.shown)
        tracker = Tracker.open(config, storage)
        tracker.metrics(measured.step, measured.metrics)
        tracker.artifact(f"evaluation/{result['source']}/{REPORT}", page)
        tracker.close(timeout=60)
    return result


def _curves(config: RunConfig) -> dict[str, list[tuple[int, float]]]:
    """Each stage's loss by step."""
    stages = stages_of(config)
    return {stage.name: [(step, loss) for _, step, loss in stage.series("train/loss")] for stage in stages}
