"""`mome evaluate`: evaluate a checkpoint on held-out data; a result replaces only its namesake of the same data."""

import functools
import logging
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import quote

from jobs.configs import Caller
from jobs.console import check_output, write_output
from jobs.distributed import device_of, on_workers, ranks_here
from jobs.report import RUN_REPORT, open_tracker
from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.load import check_stored_url, validate
from pipeline.config.schema import RunConfig, SourceConfig, SourceType
from pipeline.config.urls import absolute, file_name_of
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.evaluation import report as eval_report
from pipeline.evaluation.evaluate import evaluate, is_collapsed
from pipeline.evaluation.explain import alignment_examples
from pipeline.evaluation.ranks import Ranks
from pipeline.evaluation.report import EvalKey, ReportData
from pipeline.inference import build_trained_model, drop_untrained_objectives
from pipeline.objectives import evaluation_tasks
from pipeline.reports.run_folder import open_run, read_records
from pipeline.training.checkpoint.committed import is_committed
from pipeline.training.checkpoint.weights import load_weights, stage_url, weights_info
from pipeline.training.prepare import RUN_FILE

log = logging.getLogger(__name__)

REPORT = "evaluation.html"  # of a run's main evaluation, with links to the others
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


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
    prompts: Sequence[str] | None = None,
    caller: Caller = Caller(),
    ranks: Ranks | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any] | None:
    """Evaluate the weights of a run, a stage or a step; return what `mome evaluate --json` prints.

    `source` is a source of the run, or a URL of shards of `source_type` (default: the stage's type, or pairs; labelled
    with a probe). The `report` is by default next to the weights; `against` is the folder of a run to compare with.
    `prompts` replace `evaluation.prompts` of the run.
    With `workers`, that many ranks on Ray share the work, else `ranks` (default: torchrun's, or this process); all but
    rank 0 get None. `progress` is called with each phase of the work in this process. Raises CheckpointError for
    unfinished weights, ConfigError and DataError for an invalid source, ConfigError for a `name` or `against` of other
    data, all before any weights are loaded.
    """
    storage, checkpoint = Storage(caller.storage), checkpoint.rstrip("/")
    types = [kind for kind in get_args(SourceType) if evaluation_tasks(None, kind)]
    if source_type is not None and source_type not in types:
        raise ConfigError(f"--type {source_type}: expected one of {', '.join(types)}")
    if report is not None:
        check_output(storage, str(report), "--report")
    info = weights_info(storage, checkpoint)
    config = stored = info.config
    if prompts is not None:
        values = stored.model_dump(mode="json")
        validate(values | {"evaluation": values["evaluation"] | {"prompts": list(prompts)}}, "--prompts")
    for option, url in (("--source", source), ("--probe", probe)):
        if url is not None and url not in stored.sources and "/" not in url:
            known = ", ".join(name for name, own in stored.sources.items() if own.type in types)
            raise ConfigError(f"{option} {url}: no source of this run; give one of {known}, or the URL of shards")
    if source is not None:
        trained_type = stored.source_type_of(stored.stage_named(info.stage))
        default_type = "labelled" if probe else trained_type if trained_type in types else "pairs"
        config = _with_source(stored, source, source_type or default_type)
    source = source or stored.evaluation.source
    if source is None or source not in config.sources:
        fault = "no held-out source is named" if source is None else f"{source} is no source of this run"
        raise ConfigError(f"evaluation.source: {fault}; give one that no stage trains on with --source")
    for own in stored.sources.keys() & {source, probe}:
        check_stored_url(stored.sources[own].shards, f"sources.{own}.shards")
    section, usual = config.sources[source], config.evaluation.max_images
    manifest = load_manifest(storage, section.shards)
    total = sum(shard.samples for shard in manifest.shards)
    most, usual = (None if count is None or count >= total else count for count in (limit or usual, usual))
    step = info.step if info.is_checkpoint else None
    is_headline = (source, most, step) == (config.evaluation.source, usual, None)
    key = EvalKey(info.stage, step, "", manifest.digest, most, section.type, is_headline)
    known_keys = [data.key for data in eval_report.load_report_data(storage, config.folder)]
    key = replace(key, name=_name(name, source, key, most != usual, stored, known_keys))
    other = None
    if against is not None:  # the other run's headline of the same data, if it can be
        there = eval_report.load_report_data(storage, open_run(against, storage).folder)
        same = [data for data in there if data.key.is_of_same_data(key)]
        if not there:
            fault = "that run was never evaluated, or by another version"
            raise ConfigError(f"--against {against}: {fault}; run `mome evaluate {shlex.quote(against)}` first")
        if not same:
            extent = [] if key.limit is None else ["--limit", str(key.limit)]
            command = shlex.join(["mome", "evaluate", against, "--source", section.shards, *extent])
            raise ConfigError(
                f"--against {against}: that run was not evaluated on the same data, so no figure can be compared.\n"
                f"Here: {key.name}: {key.data}. There: {'; '.join(f'{d.key.name}: {d.key.data}' for d in there)}.\n"
                f"Evaluate it on the same first: {command}"
            )
        other = eval_report.headline(same)

    config = caller.applied(config)
    if workers is not None:  # ranks have other working folders
        checkpoint, source = absolute(checkpoint), absolute(source) if "/" in source else source
        probe = absolute(probe) if probe and "/" in probe else probe
    work = functools.partial(_evaluate, checkpoint, source, limit, rerank_best, probe, prompts, key, caller)
    progress(f"evaluating on {key.name}" + (f" with {workers} ranks" if workers else ""))
    if workers is None:
        values, data = work(ranks or ranks_here(), lambda phase: progress(f"evaluating on {key.name}: {phase}"))
    else:
        values, data = on_workers(work, config, workers, "evaluation")
    if data is None:
        return None
    page, path = _store(values, data, config, storage, other, report)
    if tracker := open_tracker(track, config, info.recorded, storage):
        tracker.metrics(info.step, {f"eval/{key.name}/{name}": value for name, value in data.metrics.items()})
        tracker.artifact(f"evaluation/{key.name}/{REPORT}", page)
        if not storage.exists(join(config.folder, RUN_FILE)):  # weights without a run: nothing else would ever end it
            tracker.finish()
        tracker.close(timeout=60)
    return values | {"report": path}


def stored_evaluation(config: RunConfig) -> dict[str, Any] | None:
    """Return what `evaluate_checkpoint` returned for a finished run; None if it was not evaluated on today's data."""
    storage, source = Storage(config.storage), config.evaluation.source
    digest = load_manifest(storage, config.sources[source].shards).digest if source is not None else ""
    for data in eval_report.load_report_data(storage, config.folder):
        key = data.key
        if key.is_headline and (key.stage, key.digest) == (config.stages[-1].name, digest):
            return data.result | {"report": join(config.folder, report_name(key, config))}
    return None


def report_name(key: EvalKey, config: RunConfig) -> str:
    """Return the file name of a report: what was evaluated, and the weights unless they are the run's last."""
    stage = [] if key.stage == config.stages[-1].name else [key.stage]
    step = [] if key.step is None else [f"step-{key.step}"]
    return f"evaluation-{file_name_of('@'.join([key.name, *stage, *step]))}.html"


def _with_source(config: RunConfig, source: str, source_type: str) -> RunConfig:
    """Add a source to the config if it is given as a URL of shards."""
    section = config.sources.get(source) or SourceConfig(shards=source, type=cast(SourceType, source_type))
    return config.model_copy(update={"sources": {**config.sources, source: section}})


def _name(
    name: str | None, source: str, key: EvalKey, is_limited: bool, config: RunConfig, known: list[EvalKey]
) -> str:
    """Return a name that no evaluation of these weights on other data has; raise ConfigError for a `name` taken."""
    weights = (key.stage, key.step)
    taken = {k.name for k in known if (k.stage, k.step) == weights and not k.is_of_same_data(key)}
    taken |= {other for other, own in config.sources.items() if source not in (other, own.shards)}
    if name is not None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--as {name}: expected up to 100 letters, digits, '_', '.' and '-'")
        if name in taken:
            fault = "other data, or another number of samples, have this name; its results would be lost"
            raise ConfigError(f"--as {name}: {fault}. Give another name")
        return name
    base = source
    if source not in config.sources:  # a URL of shards: its last part
        base = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.rstrip("/").rpartition("/")[2])[:100].strip("-._") or "source"
    if is_limited:
        base += "-all" if key.limit is None else f"-first-{key.limit}"
    typed = f"{base}-{key.source_type}"
    has_same_content = any((k.stage, k.step, k.name, k.digest) == (*weights, base, key.digest) for k in known)
    apart = typed if has_same_content else f"{base}-{key.digest[:8]}"
    candidates = (base, apart, f"{typed}-{key.digest[:8]}", f"{typed}-{key.digest}")
    return next((candidate for candidate in candidates if candidate not in taken), candidates[-1])


def _evaluate(
    checkpoint: str,
    source: str,
    limit: int | None,
    rerank_best: int | None,
    probe: str | None,
    prompts: Sequence[str] | None,
    key: EvalKey,
    caller: Caller,
    ranks: Ranks,
    progress: Callable[[str], None] = lambda phase: None,
) -> tuple[dict[str, Any], ReportData | None]:
    """Evaluate on this rank; all ranks call it and get the same values, and rank 0 the report's data."""
    storage, device = Storage(caller.storage), device_of(ranks)
    weights = drop_untrained_objectives(load_weights(storage, checkpoint))
    config = _with_source(weights.config, source, key.source_type)
    config = config if probe is None else _with_source(config, probe, "labelled")
    if prompts is not None:
        evaluation = config.evaluation.model_copy(update={"prompts": tuple(prompts)})
        config = config.model_copy(update={"evaluation": evaluation})
    tokenizer = Tokenizer(weights.vocabulary or SPECIALS, config.tokenizer.lowercase)
    model = build_trained_model(weights).to(device)
    others = {}  # finished earlier stages, which evaluate the objectives that only they trained
    for index, stage in enumerate(config.stages[: config.stages.index(config.stage_named(weights.stage))]):
        if is_committed(storage, url := stage_url(config, index)):
            usable = drop_untrained_objectives(load_weights(storage, url))
            others[stage.name] = build_trained_model(usable).to(device)
    result = evaluate(
        model, tokenizer, config, storage, source, limit, weights.stage, others, rerank_best,
        progress=progress,
        choices=weights.choices, ranks=ranks, probe=probe,
    )  # fmt: skip
    result.source, result.checkpoint, data = key.name, weights.url, None
    if ranks.rank == 0:
        alignments = alignment_examples(model, tokenizer, result.held_out, config, config.stage_named(result.stage))
        data = eval_report.build_report_data(result, config, tokenizer, alignments, key)
    result.held_out.close()
    return result.to_json(), data


def _store(
    values: dict[str, Any],
    data: ReportData,
    config: RunConfig,
    storage: Storage,
    other: ReportData | None,
    report: Path | None,
) -> tuple[bytes, str]:
    """Log warnings, and store the results next to the weights; return the report's page and where it is."""
    if data.trained_on:
        message = "source '%s' was trained on (stages: %s): these results are not held-out"
        log.warning(message, data.key.name, ", ".join(data.trained_on))
    if values["itm"] and is_collapsed(values["itm"]):
        log.warning(
            "matching has collapsed: %.0f %% of the true pairs and %.0f %% of the mismatched ones are classified "
            "correctly; train longer, or check that the stage started from the weights it should have",
            100 * values["itm"]["accuracy_matched"],
            100 * values["itm"]["accuracy_mismatched"],
        )

    records = read_records(config, storage).stages
    curves = {r.config.name: [(step, loss) for _, step, loss in r.series("train/loss")] for r in records}
    run_page = RUN_REPORT if storage.exists(join(config.folder, RUN_FILE)) else ""
    own_page = run_page if report is None else ""  # a page elsewhere has no neighbours to link
    page = eval_report.render_report(data, config, curves, other, run_page=own_page).encode()
    try:
        eval_report.save_report_data(storage, config.folder, data)
        evaluations = eval_report.load_report_data(storage, config.folder)
        links = [(evaluation, quote(report_name(evaluation.key, config))) for evaluation in evaluations]
        shown = eval_report.headline(evaluations)
        main_page = eval_report.render_report(shown, config, curves, links=links, run_page=run_page)
        storage.write(join(config.folder, REPORT), main_page.encode())
    except StorageError as error:
        if report is None:
            raise
        log.warning("the results could not be stored next to the weights: %s", error)
    if report is not None:
        write_output(storage, str(report), page, "--report")
        return page, str(report)
    path = join(config.folder, report_name(data.key, config))
    storage.write(path, page)
    log.info("writing the results of %s to %s", data.checkpoint, config.folder)
    return page, path
