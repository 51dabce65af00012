"""`mome evaluate`: evaluate a checkpoint on held-out data, with a report next to its weights.

A single process, torchrun's ranks, or `--workers` ranks on Ray share the work. An evaluation is named before it starts:
it replaces the evaluation of the same name, which is of the same data, and no other.
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

REPORT = "report.html"  # of a run's main evaluation, with links to the others
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class EvalRequest:
    """Weights to evaluate and the data to evaluate them on."""

    checkpoint: str
    source: str | None = None
    limit: int | None = None
    rerank_best: int | None = None
    source_type: SourceType | None = None  # of a URL of shards (default: the stage's type, or pairs)
    probe: str | None = None  # labelled source to train a linear classifier on
    name: str | None = None  # of the evaluation (default: the source's name)
    caller: str = "{}"  # a Caller, as JSON

    @property
    def read_as(self) -> SourceType | None:
        return self.source_type or ("labelled" if self.probe else None)

    def store(self) -> Storage:
        return Caller.model_validate_json(self.caller).store()


@dataclass(frozen=True)
class EvalTarget:
    """Weights, data and output names of an evaluation, resolved before any weights are loaded."""

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
    """Result of an evaluation on rank 0: what is written, printed and tracked."""

    values: dict[str, Any]  # as `mome evaluate --json` prints it
    metrics: dict[str, float]
    shown: ReportData | None  # on the first rank
    warnings: list[str]


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Evaluate the last stage of a run that was just trained, on Ray if its ranks have GPUs."""
    caller = Caller.of(config)
    request = EvalRequest(config.folder, caller=caller.model_dump_json())
    with add_time(caller.store(), config.folder, "evaluation"):
        target = _target(request, caller)
        gpus = config.cluster.gpus_per_worker
        ranks = config.cluster.workers
        result = _evaluate_on_ray(request, target, ranks) if gpus else _evaluate(request, target.key, SINGLE_PROCESS)
        return _deliver(result, target, caller, track=True)


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
    """Evaluate the weights of a run, a stage or a step; return what `mome evaluate --json` prints.

    `source` is a source of the run, or a URL of shards. Results are stored next to the weights, and the report there or
    at `report`; `against` is the folder of a run whose figures on the same data are shown for comparison. `track`
    records the metrics in MLflow; None does so unless `untracked_because` objects. With `workers`, that many ranks on
    Ray share the work; under torchrun its ranks do, and all but rank 0 get None.

    Raises CheckpointError for a folder without finished weights, ConfigError and DataError for an invalid source,
    ConfigError for a `name` of other data, and for an `against` that was not evaluated on these data.
    """
    if source_type is not None and source_type not in (expected := evaluated_source_types()):
        raise ConfigError(f"--type {source_type}: expected one of {', '.join(expected)}")
    request = EvalRequest(
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
    target = _target(request, caller)
    other = None if against is None else _evaluation_of(against, target, caller)
    if workers is not None:
        return _deliver(_evaluate_on_ray(request, target, workers), target, caller, track, other, report)
    ranks = ranks_here()
    result = _evaluate(request, target.key, ranks)
    return _deliver(result, target, caller, track, other, report) if ranks.rank == 0 else None


def _target(request: EvalRequest, caller: Caller) -> EvalTarget:
    """Resolve the request. Raises ConfigError, CheckpointError or DataError before any weights are loaded."""
    storage = caller.store()
    info = weights_info(storage, request.checkpoint)
    stage = info.config.stage_named(info.stage)
    config, source = _with_source(info.config, stage, request.source, "--source", request.read_as)
    source = source or config.evaluation.source
    if source is None:
        raise ConfigError(
            "evaluation.source: no held-out source is named; give one that no stage trains on with --source"
        )
    if source not in config.sources:
        raise ConfigError(f"evaluation.source {source}: no source of this run; give one with --source")
    for own in info.config.sources.keys() & {source, request.probe}:
        check_stored_url(config.sources[own].shards, f"sources.{own}.shards")
    manifest = load_manifest(storage, config.sources[source].shards)
    total = sum(shard.samples for shard in manifest.shards)
    limit, usual = (
        None if most is None or most >= total else most
        for most in (request.limit or config.evaluation.max_images, config.evaluation.max_images)
    )
    step = info.step if info.is_checkpoint else None
    is_headline = (source, limit, step) == (config.evaluation.source, usual, None)
    key = EvalKey(info.stage, step, "", manifest.digest, limit, config.sources[source].type, is_headline)
    known = [data.key for data in load_report_data(storage, config.folder)]
    key = replace(key, name=_name(request.name, source, key, limit != usual, info.config, known))
    return EvalTarget(info, caller.applied(config), source, key)


def _name(
    name: str | None, source: str, key: EvalKey, is_limited: bool, config: RunConfig, known: list[EvalKey]
) -> str:
    """Return the name of an evaluation: no other of these weights has it, unless it is of the same data.

    `config` is the stored one, `source` one of its sources or a URL. Raises ConfigError for a `name` that is taken.
    """
    of_same_weights = [k for k in known if (k.stage, k.step) == (key.stage, key.step)]

    def is_free(candidate: str) -> bool:
        own = config.sources.get(candidate)
        others = (k for k in of_same_weights if k.name == candidate and not k.is_of_same_data(key))
        return next(others, None) is None and (own is None or candidate == source or own.shards == source)

    if name is not None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--as {name}: expected up to 100 letters, digits, '_', '.' and '-'")
        if not is_free(name):
            raise ConfigError(
                f"--as {name}: other data, or another number of samples, have this name; its results would be lost. "
                "Give another name"
            )
        return name
    base = source
    if source not in config.sources:  # a URL of shards: its last part
        base = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.rstrip("/").rpartition("/")[2])[:100].strip("-._") or "source"
    if is_limited:
        base += "-all" if key.limit is None else f"-first-{key.limit}"
    differs_in_type = any((k.name, k.digest) == (base, key.digest) for k in of_same_weights)
    apart = f"{base}-{key.source_type}" if differs_in_type else f"{base}-{key.digest[:8]}"
    candidates = (base, apart, f"{base}-{key.source_type}-{key.digest[:8]}")
    return next((candidate for candidate in candidates if is_free(candidate)), f"{base}-{key.source_type}-{key.digest}")


def _label(key: EvalKey, config: RunConfig) -> str:
    """Return a part of the report's name: what was evaluated, and the weights unless they are the run's last."""
    stage = [] if key.stage == config.stages[-1].name else [key.stage]
    step = [] if key.step is None else [f"step-{key.step}"]
    return file_name_of("@".join([key.name, *stage, *step]))


def _evaluate_on_ray(request: EvalRequest, target: EvalTarget, workers: int) -> EvalResult:
    """Raises MomeError with the first failure, on whichever rank."""
    source, probe = (
        name if name is None or "/" not in name else absolute(name) for name in (request.source, request.probe)
    )
    request = replace(
        request, checkpoint=absolute(request.checkpoint), source=source, probe=probe, name=target.key.name
    )
    payload = {"request": asdict(request), "key": asdict(target.key)}
    return EvalResult(**on_workers(_evaluate_rank, target.config, workers, "evaluation", payload))


def _evaluate_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """Evaluate on a Ray Train worker."""

    def measure(payload: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
        request = EvalRequest(**payload["request"])
        return vars(_evaluate(request, EvalKey(**payload["key"]), ranks))

    return run_request(loop_config, measure)


def _evaluate(request: EvalRequest, key: EvalKey, ranks: Ranks) -> EvalResult:
    """Evaluate on this rank; all ranks call it and get the same metrics, only rank 0 builds the report data."""
    storage = request.store()
    weights = load_usable_weights(storage, request.checkpoint)
    stage = weights.config.stage_named(weights.stage)
    config, source = _with_source(weights.config, stage, request.source, "--source", request.read_as)
    config, probe = _with_source(config, stage, request.probe, "--probe", "labelled")
    device = device_of(ranks)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    model = build_trained_model(weights).to(device)
    evaluation = evaluate(
        model,
        tokenizer,
        config,
        storage,
        source,
        request.limit,
        weights.stage,
        {name: model.to(device) for name, model in _earlier_stages(config, weights, storage)},
        request.rerank_best,
        progress=lambda message: notify(f"evaluating: {message}", style="dim") if ranks.rank == 0 else None,
        choices=weights.choices,
        ranks=ranks,
        probe=probe,
    )
    evaluation = replace(evaluation, source=key.name).located(checkpoint=weights.url)
    shown = None
    if ranks.rank == 0:
        evaluated_stage = config.stage_named(evaluation.stage)
        alignments = alignment_examples(model, tokenizer, evaluation.held_out, config, evaluated_stage)
        shown = build_report_data(evaluation, config, tokenizer, alignments, key)
    evaluation.held_out.close()
    return EvalResult(evaluation.to_json(), evaluation.metrics(), shown, _warnings(evaluation))


def _warnings(evaluation: Evaluation) -> list[str]:
    warnings = []
    if evaluation.trained_on:
        stages = ", ".join(evaluation.trained_on)
        warnings.append(
            f"source '{evaluation.source}' was trained on (stages: {stages}): these results are not held-out"
        )
    if evaluation.itm is not None and evaluation.itm.is_collapsed:
        warnings.append(
            f"matching has collapsed: {100 * evaluation.itm.accuracy_matched:.0f} % of the true pairs and "
            f"{100 * evaluation.itm.accuracy_mismatched:.0f} % of the mismatched ones are classified correctly; "
            "train longer, or check that the stage started from the weights it should have"
        )
    return warnings


def _evaluation_of(run: str, target: EvalTarget, caller: Caller) -> ReportData:
    """Return what another run has of the same data: of its headline if it can be. Raises ConfigError if it has none."""
    opened = open_run(run, caller.store())
    evaluations = load_report_data(opened.storage, opened.folder)
    if not evaluations:
        raise ConfigError(f"--against {run}: that run was never evaluated; run `mome evaluate {run}` first")
    same = [data for data in evaluations if data.key.is_of_same_data(target.key)]
    if same:
        return headline(same)
    available = "; ".join(f"{data.source}: {data.key.data}" for data in evaluations)
    raise ConfigError(
        f"--against {run}: that run was not evaluated on the same data, so that no figure can be compared.\n"
        f"Here: {target.key.name}: {target.key.data}. There: {available}.\n"
        f"Evaluate it on the same first: mome evaluate {run} --source {target.config.sources[target.source].shards}"
        + ("" if target.key.limit is None else f" --limit {target.key.limit}")
    )


def _earlier_stages(config: RunConfig, weights: Weights, storage: Storage) -> Iterator[tuple[str, nn.Module]]:
    """Yield the finished earlier stages, which evaluate the objectives that only they trained."""
    for index, stage in enumerate(config.stages):
        url = stage_url(config, index)
        if stage.name == weights.stage:
            return
        if is_committed(storage, url):
            yield stage.name, build_trained_model(load_usable_weights(storage, url))


def _with_source(
    config: RunConfig, stage: StageConfig, source: str | None, option: str, source_type: SourceType | None
) -> tuple[RunConfig, str | None]:
    """Add a source given as a URL of shards to the config, of the given type, the stage's type, or pairs."""
    if source is None or source in config.sources:
        return config, source
    if "/" not in source:
        known = ", ".join(name for name, own in config.sources.items() if own.type in evaluated_source_types())
        raise ConfigError(f"{option} {source}: no source of this run; give one of {known}, or the URL of shards")
    if source_type is None:
        own = config.source_type_of(stage)
        source_type = own if own in evaluated_source_types() else "pairs"
    added = SourceConfig(shards=source, type=source_type)
    return config.model_copy(update={"sources": {**config.sources, source: added}}), source


def _deliver(
    result: EvalResult,
    target: EvalTarget,
    caller: Caller,
    track: bool | None,
    other: ReportData | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Log warnings, store the results next to the weights, and track the metrics at the step of the weights."""
    config, shown, storage = target.config, result.shown, caller.store()
    assert shown is not None
    for warning in result.warnings:
        log.warning("%s", warning)
    page = render_report(shown, config, _curves(config, storage), other).encode()
    path = target.report if report is None else str(report)
    _keep(storage, target, shown, is_needed=report is None)
    if report is None:
        storage.write(path, page)
        log.info("writing the results of %s to %s", target.info.url, config.folder)
    else:
        write_output(storage, path, page, "--report")
    _track(result, target, storage, page, track)
    return result.values | {"report": path}


def _keep(storage: Storage, target: EvalTarget, shown: ReportData, is_needed: bool) -> None:
    """Store the results next to the weights and update the main report, which links to all evaluations.

    Raises StorageError if `is_needed`, otherwise logs it.
    """
    config = target.config
    try:
        save_report_data(storage, config.folder, shown)
        evaluations = load_report_data(storage, config.folder)
        links = [
            ReportLink.of(evaluation, quote(f"report-{_label(evaluation.key, config)}.html"))
            for evaluation in evaluations
        ]
        page = render_report(headline(evaluations), config, _curves(config, storage), links=links)
        storage.write(join(config.folder, REPORT), page.encode())
    except StorageError as error:
        if is_needed:
            raise
        log.warning("the results could not be stored next to the weights: %s", error)


def _track(result: EvalResult, target: EvalTarget, storage: Storage, page: bytes, track: bool | None) -> None:
    config = target.config
    if track is None:
        reason = untracked_because(config, target.info.recorded, storage)
        if reason is not None:
            notify(f"not recorded in MLflow: {reason}. Give --track to record it in {redact(configured_uri(config))}")
        track = reason is None
    if not track:
        return
    tracker = JournalTracker.open(config, storage)
    tracker.metrics(target.info.step, result.metrics)
    tracker.artifact(f"evaluation/{target.key.name}/{REPORT}", page)
    if not storage.exists(join(config.folder, RUN_FILE)):  # weights without a run: nothing else would ever end it
        tracker.finish()
    tracker.close(timeout=60)


def _curves(config: RunConfig, storage: Storage) -> dict[str, list[tuple[int, float]]]:
    """Return the loss curve of each stage."""
    stages = stages_of(config, storage)
    return {stage.name: [(step, loss) for _, step, loss in stage.series("train/loss")] for stage in stages}
