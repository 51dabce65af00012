"""Description of a resolved run: sources, stages, parameters, progress, placement, and problems that would stop it.

`mome train --dry-run` prints it before a run, and the banner of `mome train` when the run begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.cluster import address_of, check_ray, for_ranks, local_cpus, missing_resources, quantity, rank_resources
from jobs.console import aligned
from pipeline.config.errors import ConfigError, DataError, MomeError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig, SourceConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.contents.choices import choices_of
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import MANIFEST, load_manifest, parse_pattern, shard_names
from pipeline.data.shards.source import open_source
from pipeline.data.storage import Storage, join
from pipeline.pages.charts import significant
from pipeline.tracking.locations import configured_uri
from pipeline.tracking.mlflow_server import check_server
from pipeline.tracking.tensorboard import check_installed, tensorboard_folder
from pipeline.training.checkpoint.committed import is_committed, newest_first
from pipeline.training.checkpoint.weights import VOCABULARY, stage_url, weights_info
from pipeline.training.prepare import RUN_FILE, admit, check_start, choose_tokenizer
from pipeline.training.stages import Stage, check_stages, freeze_untrained, stage_skeleton

MAX_INDEXES = 256  # remote indexes of shards that a dry run reads to count the samples that filters select
ANSWER_SECONDS = 10.0  # limit for a store to respond


@dataclass(frozen=True)
class SourceDescription:
    """A source's selected samples, or in `note` why their number is not known before the run starts."""

    name: str
    url: str
    type: str
    samples: int | None = None
    shards: int | None = None
    note: str = ""


@dataclass(frozen=True)
class StageDescription:
    """A stage's length, model and start. `epochs` has the passes over each source, None if its size is unknown."""

    name: str
    objectives: list[str]
    steps: int
    global_batch_size: int
    samples: int  # that the stage reads: steps times the batch
    epochs: dict[str, float | None]
    parameters: int
    trained_parameters: int
    starts_from: str
    steps_done: int


@dataclass
class RunDescription:
    """A resolved run. `problems` are messages of what would stop it, each with its remedy."""

    name: str
    folder: str
    kind: str
    state: str = "new"
    vocabulary: str = ""
    has_vocabulary: bool = True  # else it is trained when the run starts, and the parameters are the most there can be
    ranks: int = 1
    placement: str = ""
    tracking: str = ""
    tensorboard: str = ""
    steps_done: int = 0
    steps: int = 0
    sources: list[SourceDescription] = field(default_factory=list)
    stages: list[StageDescription] = field(default_factory=list)
    changed_keys: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # since the run began: key -> (old, new)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self, key: str = "") -> Iterator[None]:
        """Turn a MomeError of the block into a problem; `key` precedes its message.

        Of a reason that is known already, such as missing credentials for the same store, the remedy is not repeated.
        """
        try:
            yield
        except MomeError as error:
            message = str(error)
            reason = message.partition("failed: ")[2]
            if reason and any(problem.endswith(reason) for problem in self.problems):
                message = f"{message.removesuffix(reason)}{reason.split(' (')[0].split('. ')[0]}, as above"
            if not any(problem.endswith(message) for problem in self.problems):
                self.problems.append(f"{key}{message}")


def describe_run(config: RunConfig, storage: Storage | None = None, is_prepared: bool = False) -> RunDescription:
    """Resolve a run from its config, its folder and its sources, without writing or starting anything.

    Of a prepared run, starting weights are not checked again, and saved counts of selected samples are used. A store
    that does not respond is a problem after `ANSWER_SECONDS`. Raises ConfigError for a config whose model does not
    support its stages.
    """
    config = for_ranks(config)
    storage = storage or Storage(config.storage).within(ANSWER_SECONDS)
    check_stages(config)
    run = RunDescription(config.name, redact(config.folder), config.model.kind, ranks=config.cluster.workers)
    run.tracking, run.steps = redact(configured_uri(config)), config.total_steps
    run.tensorboard = str(tensorboard_folder(config) or "")
    sizes: dict[str, int | None] = {}
    for name, source in config.sources.items():
        description = SourceDescription(name, redact(source.shards), source.type)
        with run.collected(f"sources.{name}.shards: "):
            description = describe_source(name, source, config, storage, is_prepared)
        run.sources.append(description)
        sizes[name] = description.samples
    tokenizer, is_begun = None, None  # None: the folder cannot be read
    with run.collected("output: "):
        is_begun = storage.exists(join(config.folder, RUN_FILE))
        if is_local(config.folder):
            folder = local_path(config.folder)
            existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
            if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
                raise ConfigError(f"{existing} is not a folder that can be written; set `output` to another one")
    if is_begun:
        with run.collected():
            run.changed_keys = admit(config, storage)
            run.steps_done = saved_steps(config, storage)
            is_finished = run.steps_done >= run.steps
            run.state = f"resumes from step {run.steps_done} of {run.steps}" if run.steps_done else "new"
            run.state = "finished: every stage is trained" if is_finished else run.state
    if is_begun is not None:
        with run.collected():
            tokenizer, run.vocabulary = _vocabulary(config, storage)
    with run.collected():
        choices_of(config, config.stages, storage)
    run.has_vocabulary, vocabulary = tokenizer is not None, tokenizer.size if tokenizer else config.tokenizer.size
    for index, stage in enumerate(config.stages):
        resolved, total = Stage(config, index), sum(stage.sources.values())
        model = stage_skeleton(resolved, vocabulary)
        freeze_untrained(model, resolved)
        if stage.start_from not in ("previous", "random") and not is_prepared:
            with run.collected():
                if tokenizer is None or "://" in stage.start_from:  # the tensors may be large, and far
                    own = join(weights_info(storage, stage.start_from).url, VOCABULARY)
                    if tokenizer is None and storage.exists(own):
                        remedy = f"set tokenizer.vocabulary to {own}"
                        raise ConfigError(f"stages.{stage.name}.start_from: it has a vocabulary of its own; {remedy}")
                else:
                    check_start(resolved, storage, tokenizer)
        samples = stage.steps * stage.global_batch_size
        epochs = {
            name: samples * weight / total / size if (size := sizes.get(name)) else None
            for name, weight in stage.sources.items()
        }
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        parameters = sum(n for n, _ in counts), sum(n for n, is_trained in counts if is_trained)
        start = "random" if resolved.start_url is None else stage.start_from
        done = min(max(run.steps_done - resolved.first_step, 0), stage.steps)
        lengths = (stage.steps, stage.global_batch_size, samples)
        run.stages.append(
            StageDescription(stage.name, [*stage.objectives], *lengths, epochs, *parameters, redact(start), done)
        )
    return run


def describe_source(
    name: str, source: SourceConfig, config: RunConfig, storage: Storage, is_prepared: bool
) -> SourceDescription:
    """Count a source's samples and shards without writing. Raises as `load_manifest` unless the run would create it."""
    description = SourceDescription(name, redact(source.shards), source.type)
    folder = parse_pattern(source.shards).folder
    same_folder = (other.synthetic for other in config.sources.values() if other.shards == source.shards)
    synthetic = next(filter(None, same_folder), None)
    if synthetic is not None and not storage.exists(join(folder, MANIFEST)):
        return replace(description, samples=synthetic.scenes, note="generated when the run starts")
    try:
        manifest = load_manifest(storage, source.shards)
    except DataError:
        tars = shard_names(source.shards, storage.list_info(folder)) if storage.exists(folder) else []
        if not tars or storage.exists(join(folder, MANIFEST)):
            raise
        return replace(description, shards=len(tars), note="indexed when the run starts")
    description = replace(description, shards=len(manifest.shards))
    is_selected = bool(source.filters) or source.opt_out is not None
    is_far = "://" in source.shards and len(manifest.shards) > MAX_INDEXES
    if is_selected and not is_prepared and (is_far or any(shard.is_trusted for shard in manifest.shards)):
        total = manifest.num_samples
        return replace(description, note=f"of {total:,} samples, those that the filters select")
    opened = open_source(storage, source, config.folder if is_prepared else None)
    note = f"selected of {manifest.num_samples:,}" if is_selected else ""
    return replace(description, samples=int(opened.counts.sum()), note=note)


def saved_steps(config: RunConfig, storage: Storage) -> int:
    """Return the number of global steps that finished stages and the newest complete checkpoint of a run hold."""
    finished = [is_committed(storage, stage_url(config, index)) for index in range(len(config.stages))]
    steps = [config.stage_start(index + 1) for index, is_finished in enumerate(finished) if is_finished]
    folder = join(config.folder, "checkpoints")
    checkpoints = newest_first(storage, folder) if storage.exists(folder) else {}
    steps += [next((step for url, (step, *_) in checkpoints.items() if is_committed(storage, url)), 0)]
    return max(steps)


def _vocabulary(config: RunConfig, storage: Storage) -> tuple[Tokenizer | None, str]:
    """Return the tokenizer, None if the run will train it, and its description. Raises as `choose_tokenizer`."""
    if not config.model.READS_TEXT:
        return Tokenizer(SPECIALS), "none: the model reads no text"
    is_saved, configured = storage.exists(join(config.folder, VOCABULARY)), config.tokenizer.vocabulary
    if not is_saved and configured is None:
        return None, f"trained from the captions when the run starts, at most {config.tokenizer.size:,} tokens"
    tokenizer = choose_tokenizer(config, storage)
    origin = "of this run" if is_saved else f"of {redact(configured or '')}"
    return tokenizer, f"{tokenizer.size:,} tokens {origin}, {'lower-cased' if tokenizer.lowercase else 'cased'}"


def describe_placement(run: RunDescription, config: RunConfig) -> dict[str, float]:
    """Describe where a run's ranks will be placed; return the resources of this machine, none if it joins a cluster."""
    cluster, joined = config.cluster, address_of(config.cluster)
    each = " and ".join(quantity(amount, kind) for kind, amount in rank_resources(cluster).items())
    if joined is not None:
        run.placement = f"{each} for each rank, on the Ray cluster {joined[0]} ({joined[1]})"
        return {}
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    run.placement = f"{each} for each rank, on this machine ({os.cpu_count()} CPUs, {quantity(gpus, 'GPU')})"
    return {"CPU": local_cpus(cluster), "GPU": gpus}


def check_services(run: RunDescription, config: RunConfig) -> None:
    """Add what this machine and MLflow lack to a run's problems. Ray is not started, a cluster not contacted."""
    with run.collected():
        check_server(config)
    with run.collected():
        check_installed(config)
    with run.collected():
        check_ray()
    machine = describe_placement(run, config)
    if machine and (fault := missing_resources(config.cluster, [machine])):
        run.problems.append(f"{fault.replace('this cluster has', 'this machine has')}, or give cluster.address")


def as_text(run: RunDescription, with_verdict: bool = True) -> str:
    """Return the description as text: facts of the run, tables of its sources and its stages, and its problems."""
    facts = [["run", f"{run.folder} ({run.kind}): {run.state}"], ["ranks", f"{run.ranks}: {run.placement}"]]
    facts += [["vocabulary", run.vocabulary], ["MLflow", run.tracking], ["TensorBoard", run.tensorboard]]
    facts += [["changed", f"{key}: was {old!r}, now {new!r}"] for key, (old, new) in run.changed_keys.items()]
    sources = [["source", "type", "samples", "shards", "location"]]
    for source in run.sources:
        counts = ("?" if number is None else f"{number:,}" for number in (source.samples, source.shards))
        location = source.url + (f" ({source.note})" if source.note else "")
        sources.append([source.name, source.type, *counts, location])
    stages = [["stage", "objectives", "steps", "batch", "epochs", "parameters", "trained", "starts from"]]
    for stage in run.stages:
        known = [number for number in stage.epochs.values() if number is not None]
        ends = [significant(number) for number in (min(known, default=0.0), max(known, default=0.0))]
        epochs = "?" if len(known) < len(stage.epochs) else " to ".join(dict.fromkeys(ends))
        done = f"{stage.steps_done:,}/" if stage.steps_done else ""
        most = "" if run.has_vocabulary else "≤ "
        sizes = [f"{most}{number / 1e6:,.1f} M" for number in (stage.parameters, stage.trained_parameters)]
        row = [stage.name, " ".join(stage.objectives), f"{done}{stage.steps:,}", f"{stage.global_batch_size:,}"]
        stages.append([*row, epochs, *sizes, stage.starts_from])
    tables = [
        aligned([row for row in facts if row[1]]),
        aligned(sources, right={2, 3}),
        aligned(stages, right={2, 3, 4, 5, 6}),
    ]
    if not with_verdict:
        return "\n\n".join(tables)
    number = len(run.problems)
    stops = f"{number} {'problem' if number == 1 else 'problems'} would stop this run:"
    verdict = stops if number else "ready to train"
    return "\n\n".join([*tables, "\n".join([verdict, *(f"- {problem}" for problem in run.problems)])])
