"""`mome evaluate`: a checkpoint's weights on held-out pairs, with a report beside the weights that were given.

One process does it, or ranks share it: those that `--workers` has Ray place, or those of torchrun. What is measured is
named before anything is: an evaluation replaces the one of its own name, which is of the same data, and no other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from torch import nn

from jobs.caller import Caller, untracked_because
from jobs.console import notify
from jobs.distributed import device_of, on_workers, ranks_here, run_request
from jobs.output import check_output, write_output
from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig, SourceConfig, SourceType, StageConfig
from pipeline.config.stored import check_stored_url
from pipeline.config.urls import absolute, file_name_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.explain import alignment_examples
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.report import ReportLink, build_report_data, render_report
from pipeline.evaluation.report_data import EvalKey, ReportData, headline, load_report_data, save_report_data
from pipeline.evaluation.results import Evaluation
from pipeline.inference import build_trained_model, load_usable_weights
from pipeline.models.model import Model
from pipeline.objectives import evaluated_source_types
from pipeline.reports.run_folder import open_run, stages_of
from pipeline.tracking.locations import configured_uri
from pipeline.tracking.tracker import JournalTracker
from pipeline.training.checkpoint import (
    Weights,
    WeightsInfo,
    is_committed,
    stage_url,
    weights_info,
)
from pipeline.training.goodput import add_time
from pipeline.training.prepare import RUN_FILE

log = logging.getLogger(__name__)

REPORT = "report.html"  # of a run's headline, with links to the others
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class EvalRequest:
    """What is to be measured, on what."""

    checkpoint: str
    source: str | None = None
    limit: int | None = None
    rerank_best: int | None = None
    source_type: SourceType | None = None  # what a URL of shards is read as; None: as the stage's own, or as pairs
    probe: str | None = None  # labelled pictures that a linear classifier is trained on
    name: str | None = None  # of the evaluation; None: the source's
    caller: str = "{}"  # a Caller, as JSON

    @property
    def read_as(self) -> SourceType | None:
        return self.source_type or ("labelled" if self.probe else None)

    def store(self) -> Storage:
        return Caller.model_validate_json(self.caller).store()


@dataclass(frozen=True)
class Target:
    """What an evaluation is of and where its results go, known before anything is measured."""

    info: WeightsInfo
    config: RunConfig  # with the caller's stores and servers
    source: str  # one of its sources
    key: EvalKey

    @property
    def label(self) -> str:
        return _label(self.key, self.config)

    @property
    def report(self) -> str:
        return join(self.config.folder, f"report-{self.label}.html")


@dataclass(frozen=True)
class EvalResult:
    """What the first rank tells of an evaluation: everything that is then written, printed and tracked."""

    result: dict[str, Any]  # as `mome evaluate --json` prints it
    metrics: dict[str, float]
    shown: ReportData | None  # on the first rank
    warnings: list[str]


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """The last stage of a run that has just been trained; on its ranks where they have what the driver may lack."""
    caller = Caller.of(config)
    asked = EvalRequest(config.folder, caller=caller.model_dump_json())
    with add_time(caller.store(), config.folder, "evaluation"):
        target = _target(asked, caller)
        gpus = config.cluster.gpus_per_worker
        ranks = config.cluster.workers
        measured = _measured_on_ray(asked, target, ranks) if gpus else _measured(asked, target.key, SINGLE_PROCESS)
        return _deliver(measured, target, caller, track=True)


def evaluate_checkpoint(
    checkpoint: str,
    source: str | None = None,
    limit: int | None = None,
    report: Path | None = None,
    track: bool | None = None,
    against: str | None = None,
    workers: int | None = None,
    rerank_best: int | None = None,
    source_type: str | None = None,
    probe: str | None = None,
    name: str | None = None,
    caller: Caller = Caller(),
) -> dict[str, Any] | None:
    """Evaluate a run's, a stage's or a step's weights; the numbers as `mome evaluate --json` prints them.

    `source` is one of the run's, or the URL of shards. The results go into the folder of these weights, and the report
    there or to `report`; the figures that the run in folder `against` has of the same data stand beside. With `track`
    they are recorded in MLflow; if it is None, where `untracked_because` finds nothing against it. With `workers` so
    many ranks on Ray share the work; under torchrun its ranks do, and all but the first get None.
    Raises CheckpointError for a folder without finished weights, ConfigError and DataError for a wrong source,
    ConfigError for a `name` that other data have, and for a run to stand beside that was not evaluated on these data.
    """
    if source_type is not None and source_type not in (expected := evaluated_source_types()):
        raise ConfigError(f"--type {source_type}: expected one of {', '.join(expected)}")
    asked = EvalRequest(
        checkpoint.rstrip("/"),
        source,
        limit,
        rerank_best,
        cast(SourceType, source_type),
        probe,
        name,
        caller=caller.model_dump_json(),
    )
    if report is not None:
        check_output(caller.store(), str(report), "--report")
    target = _target(asked, caller)
    other = None if against is None else _evaluation_of(against, target, caller)
    if workers is not None:
        return _deliver(_measured_on_ray(asked, target, workers), target, caller, track, other, report)
    ranks = ranks_here()
    measured = _measured(asked, target.key, ranks)
    return _deliver(measured, target, caller, track, other, report) if ranks.rank == 0 else None


def _target(asked: EvalRequest, caller: Caller) -> Target:
    """Raises ConfigError, CheckpointError and DataError for what can be known to be wrong before weights are read."""
    storage = caller.store()
    info = weights_info(storage, asked.checkpoint)
    stage = info.config.stage_named(info.stage)
    config, source = _with_source(info.config, stage, asked.source, "--source", asked.read_as)
    source = source or config.evaluation.source
    if source is None:
        raise ConfigError(
            "evaluation.source: no held-out source is named; give one that no stage trains on with --source"
        )
    if source not in config.sources:
        raise ConfigError(f"evaluation.source {source}: no source of this run; give one with --source")
    for own in info.config.sources.keys() & {source, asked.probe}:
        check_stored_url(config.sources[own].shards, f"sources.{own}.shards")
    manifest = load_manifest(storage, config.sources[source].shards)
    total = sum(shard.samples for shard in manifest.shards)
    limit, usual = (
        None if most is None or most >= total else most
        for most in (asked.limit or config.evaluation.max_images, config.evaluation.max_images)
    )
    step = info.step if info.is_checkpoint else None
    is_headline = (source, limit, step) == (config.evaluation.source, usual, None)
    key = EvalKey(info.stage, step, "", manifest.digest, limit, config.sources[source].type, is_headline)
    known = [each.key for each in load_report_data(storage, config.folder)]
    key = replace(key, name=_name(asked.name, source, key, limit != usual, info.config, known))
    return Target(info, caller.applied(config), source, key)


def _name(
    asked: str | None, source: str, key: EvalKey, is_limited: bool, config: RunConfig, known: list[EvalKey]
) -> str:
    """Return the name of an evaluation: no other of these weights has it, unless it is of the same data.

    `config` is the stored one, `source` one of its sources or a URL. Raises ConfigError for an `asked` one that is
    taken.
    """
    of_same_weights = [each for each in known if (each.stage, each.step) == (key.stage, key.step)]

    def is_free(name: str) -> bool:
        own = config.sources.get(name)
        others = (each for each in of_same_weights if each.name == name and not each.is_of_same_data(key))
        return next(others, None) is None and (own is None or name == source or own.shards == source)

    if asked is not None:
        if not NAME.fullmatch(asked):
            raise ConfigError(f"--as {asked}: expected up to 100 letters, digits, '_', '.' and '-'")
        if not is_free(asked):
            raise ConfigError(
                f"--as {asked}: other data, or another number of samples, have this name; its results would be lost. "
                "Give another name"
            )
        return asked
    base = source if source in config.sources else _slug(source)
    if is_limited:
        base += "-all" if key.limit is None else f"-first-{key.limit}"
    differs_in_type = any((each.name, each.digest) == (base, key.digest) for each in of_same_weights)
    apart = f"{base}-{key.source_type}" if differs_in_type else f"{base}-{key.digest[:8]}"
    candidates = (base, apart, f"{base}-{key.source_type}-{key.digest[:8]}")
    return next((name for name in candidates if is_free(name)), f"{base}-{key.source_type}-{key.digest}")


def _label(key: EvalKey, config: RunConfig) -> str:
    """Return a part of the report's name: what was evaluated, and the weights unless they are the run's last."""
    stage = [] if key.stage == config.stages[-1].name else [key.stage]
    step = [] if key.step is None else [f"step-{key.step}"]
    return file_name_of("@".join([key.name, *stage, *step]))


def _slug(url: str) -> str:
    """Return the last part of a URL of shards as a name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", url.rstrip("/").rpartition("/")[2])[:100].strip("-._") or "source"


def _measured_on_ray(asked: EvalRequest, target: Target, workers: int) -> EvalResult:
    """Raises MomeError with the first failure, on whichever rank."""
    source, probe = (
        each if each is None or "/" not in each else absolute(each) for each in (asked.source, asked.probe)
    )
    asked = replace(asked, checkpoint=absolute(asked.checkpoint), source=source, probe=probe, name=target.key.name)
    given = {"asked": asdict(asked), "key": asdict(target.key)}
    return EvalResult(**on_workers(_evaluate_rank, target.config, workers, "evaluation", given))


def _evaluate_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker."""

    def measure(given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
        asked = EvalRequest(**given["asked"])
        return vars(_measured(asked, EvalKey(**given["key"]), ranks))

    return run_request(loop_config, measure)


def _measured(asked: EvalRequest, key: EvalKey, ranks: Ranks) -> EvalResult:
    """Called on each of the ranks, which get the same; only the first makes the page."""
    storage = asked.store()
    weights = load_usable_weights(storage, asked.checkpoint)
    stage = weights.config.stage_named(weights.stage)
    config, source = _with_source(weights.config, stage, asked.source, "--source", asked.read_as)
    config, probe = _with_source(config, stage, asked.probe, "--probe", "labelled")
    device = device_of(ranks)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    model = build_trained_model(weights).to(device)
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
    found = replace(found, source=key.name).located(checkpoint=weights.url)
    shown = _shown(found, model, tokenizer, config, key) if ranks.rank == 0 else None
    found.held_out.close()
    return EvalResult(found.to_json(), found.metrics(), shown, _warnings(found))


def _shown(found: Evaluation, model: Model, tokenizer: Tokenizer, config: RunConfig, key: EvalKey) -> ReportData:
    stage = config.stage_named(found.stage)
    return build_report_data(
        found, config, tokenizer, alignment_examples(model, tokenizer, found.held_out, config, stage), key
    )


def _warnings(found: Evaluation) -> list[str]:
    told = []
    if found.trained_on:
        stages = ", ".join(found.trained_on)
        told.append(f"source '{found.source}' was trained on (stages: {stages}): these are no held-out results")
    if found.itm is not None and found.itm.is_collapsed:
        told.append(
            f"matching has collapsed: right for {100 * found.itm.accuracy_matched:.0f} % of the true pairs and "
            f"{100 * found.itm.accuracy_mismatched:.0f} % of the wrong ones; "
            "train longer, or check that the stage started from the weights it should have"
        )
    return told


def _evaluation_of(run: str, target: Target, caller: Caller) -> ReportData:
    """Return what another run has of the same data: of its headline if it can be. Raises ConfigError if it has none."""
    opened = open_run(run, caller.store())
    found = load_report_data(opened.storage, opened.folder)
    if not found:
        raise ConfigError(f"--against {run}: that run was never evaluated; run `mome evaluate {run}` first")
    same = [each for each in found if each.key.is_of_same_data(target.key)]
    if same:
        return headline(same)
    there = "; ".join(f"{each.source}: {each.key.data}" for each in found)
    raise ConfigError(
        f"--against {run}: that run was not evaluated on the same data, so that no figure can be compared.\n"
        f"Here: {target.key.name}: {target.key.data}. There: {there}.\n"
        f"Evaluate it on the same first: mome evaluate {run} --source {target.config.sources[target.source].shards}"
        + ("" if target.key.limit is None else f" --limit {target.key.limit}")
    )


def _earlier_stages(config: RunConfig, weights: Weights, storage: Storage) -> Iterator[tuple[str, nn.Module]]:
    """The finished stages before this one, which alone can tell what their objectives learnt."""
    for index, stage in enumerate(config.stages):
        url = stage_url(config, index)
        if stage.name == weights.stage:
            return
        if is_committed(storage, url):
            yield stage.name, build_trained_model(load_usable_weights(storage, url))


def _with_source(
    config: RunConfig, stage: StageConfig, source: str | None, option: str, source_type: SourceType | None
) -> tuple[RunConfig, str | None]:
    """A source given as a URL of shards joins the run's own, read as `use`, else as the stage's is, or as pairs."""
    if source is None or source in config.sources:
        return config, source
    if "/" not in source:
        known = ", ".join(name for name, each in config.sources.items() if each.type in evaluated_source_types())
        raise ConfigError(f"{option} {source}: no source of this run; give one of {known}, or the URL of shards")
    if source_type is None:
        own = config.source_type_of(stage)
        source_type = own if own in evaluated_source_types() else "pairs"
    given = SourceConfig(shards=source, type=source_type)
    return config.model_copy(update={"sources": {**config.sources, source: given}}), source


def _deliver(
    measured: EvalResult,
    target: Target,
    caller: Caller,
    track: bool | None,
    other: ReportData | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Warnings to the log, results beside the weights, figures to the run's tracker at the step of the weights."""
    config, shown, storage = target.config, measured.shown, caller.store()
    assert shown is not None
    for warning in measured.warnings:
        log.warning("%s", warning)
    page = render_report(shown, config, _curves(config, storage), other).encode()
    place = target.report if report is None else str(report)
    _keep(storage, target, shown, is_needed=report is None)
    if report is None:
        storage.write(place, page)
        log.info("results of %s go beside these weights, into %s", target.info.url, config.folder)
    else:
        write_output(storage, place, page, "--report")
    _track(measured, target, storage, page, track)
    return measured.result | {"report": place}


def _keep(storage: Storage, target: Target, shown: ReportData, is_needed: bool) -> None:
    """Beside the weights, with a page of the headline that leads to the others. Raises StorageError if it must."""
    config = target.config
    try:
        save_report_data(storage, config.folder, shown)
        found = load_report_data(storage, config.folder)
        links = [ReportLink.of(each, quote(f"report-{_label(each.key, config)}.html")) for each in found]
        page = render_report(headline(found), config, _curves(config, storage), links=links)
        storage.write(join(config.folder, REPORT), page.encode())
    except StorageError as error:
        if is_needed:
            raise
        log.warning("the results are not kept beside the weights: %s", error)


def _track(measured: EvalResult, target: Target, storage: Storage, page: bytes, track: bool | None) -> None:
    config = target.config
    if track is None:
        reason = untracked_because(config, target.info.recorded, storage)
        if reason is not None:
            notify(f"not recorded in MLflow: {reason}. Give --track to record it in {redact(configured_uri(config))}")
        track = reason is None
    if not track:
        return
    tracker = JournalTracker.open(config, storage)
    tracker.metrics(target.info.step, measured.metrics)
    tracker.artifact(f"evaluation/{target.key.name}/{REPORT}", page)
    if not storage.exists(join(config.folder, RUN_FILE)):  # weights without a run: nothing else would ever end it
        tracker.finish()
    tracker.close(timeout=60)


def _curves(config: RunConfig, storage: Storage) -> dict[str, list[tuple[int, float]]]:
    """Each stage's loss by step."""
    stages = stages_of(config, storage)
    return {stage.name: [(step, loss) for _, step, loss in stage.series("train/loss")] for stage in stages}
