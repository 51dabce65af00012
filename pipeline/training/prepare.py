"""Preparation of a run, by one process before a cluster is reserved; repeated for a restart, it changes nothing."""

import itertools
import json
import logging
import sys
import time
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.errors import CheckpointError, ConfigError, DataError, StorageError
from pipeline.config.load import changes, parse_config
from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.choices import choices_of
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.shards.manifest import ensure_indexed
from pipeline.data.shards.source import open_source
from pipeline.data.storage import NotFound, Storage, join
from pipeline.objectives import SOURCE_INPUTS
from pipeline.tracking.tensorboard import check_installed
from pipeline.training.checkpoint.weights import VOCABULARY, load_weights
from pipeline.training.stages import Stage, check_fit, check_stages, prepare_experts, stage_skeleton

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
REPORT_SECONDS = 5.0  # between progress messages
MAX_CAPTIONS = 200_000  # per folder of shards, for training a vocabulary
COVERAGE_FILE = "vocabulary.json"
COVERAGE_CAPTIONS = 1000  # per folder of shards, for measuring the coverage
MAX_UNKNOWN = 0.01  # fraction of [UNK] among the tokens, above which an alert is raised


def prepare(config: RunConfig, storage: Storage) -> Tokenizer:
    """Prepare all that ranks read, and admit the config; ConfigError, DataError, StorageError or CheckpointError."""
    check_stages(config)
    check_installed(config)
    for path, (old, new) in admit(config, storage).items():
        log.warning("resuming with a changed key: %s: was %r, now %r", path, old, new)
    build_synthetic(storage, config.sources)
    for url in sorted({source.shards for source in config.sources.values()}):
        name = next(name for name, source in config.sources.items() if source.shards == url)
        try:
            ensure_indexed(storage, url, _ProgressLog(f"{url}: indexed"))
        except (DataError, StorageError) as error:
            raise type(error)(f"sources.{name}.shards: {error}") from error
    for name, source in config.sources.items():
        if source.filters or source.opt_out is not None:  # caches the counts of the selection for the ranks
            open_source(storage, source, config.folder, _ProgressLog(f"sources.{name}: filtered"))
    by_stage = [choices_of(config, [stage], storage) for stage in config.stages]  # label lists of the heads, by file
    tokenizer = choose_tokenizer(config, storage)
    for stage in (Stage(config, index) for index in range(len(config.stages))):
        if stage.config.start_from not in ("previous", "random"):
            check_start(stage, storage, tokenizer)
    storage.write(join(config.folder, VOCABULARY), tokenizer.vocabulary_file)
    if config.model.READS_TEXT:
        measure_coverage(storage, config.folder, tokenizer, _folders_with_text(config))
    for name, labels in ChainMap(*by_stage).items():  # copied, so that the run's checkpoints can be used elsewhere
        if all(lists.get(name, labels) == labels for lists in by_stage):
            storage.write(join(config.folder, name), labels.to_bytes())
    storage.write(join(config.folder, RUN_FILE), config.model_dump_json(indent=1).encode())
    return tokenizer


@dataclass
class _ProgressLog:
    """Logs the progress of long work over shards every few seconds."""

    task: str
    logged_at: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() - self.logged_at >= REPORT_SECONDS:
            self.logged_at = time.monotonic()
            log.warning("%s %d of %d shards", self.task, done, total)


def admit(config: RunConfig, storage: Storage) -> dict[str, tuple[Any, Any]]:
    """Return the keys changed since the run began, key -> (old, new); ConfigError if a fixed one did (contract C4)."""
    url = join(config.folder, RUN_FILE)
    if not storage.exists(url):
        return {}
    allowed, refused = changes(parse_config(storage.read(url), url), config)
    if refused:
        differences = "\n".join(f"{path}: was {old!r}, now {new!r}" for path, (old, new) in refused.items())
        raise ConfigError(
            f"{config.folder} contains a run with other values of keys that must not change on resume:\n{differences}\n"
            "Restore the old values, or choose another `name` for the run."
        )
    return allowed


def apart(config: RunConfig, storage: Storage, output: str, name: str) -> RunConfig:
    """Return the run with its vocabulary in another folder, to be prepared without effect on it; raise as `admit`."""
    admit(config, storage)
    tokenizer, vocabulary = config.tokenizer, join(config.folder, VOCABULARY)
    if storage.exists(vocabulary):
        tokenizer = tokenizer.model_copy(update={"vocabulary": vocabulary})
    return config.model_copy(update={"output": output, "name": name, "tokenizer": tokenizer})


def check_start(stage: Stage, storage: Storage, tokenizer: Tokenizer) -> None:
    """Check that a stage's starting weights fit its model and vocabulary. Raises ConfigError or CheckpointError."""
    where = f"stages.{stage.name}.start_from: {stage.config.start_from}"
    try:
        weights = load_weights(storage, stage.config.start_from)
    except CheckpointError as error:
        raise CheckpointError(f"stages.{stage.name}.start_from: {error}") from error
    model = stage_skeleton(stage, tokenizer.size)
    try:
        state = model.resize_state(weights.tensors, weights.config.model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    trained = Tokenizer(weights.vocabulary or SPECIALS, weights.config.tokenizer.lowercase)
    if weights.vocabulary and trained.lowercase != tokenizer.lowercase:
        raise ConfigError(
            f"{where} was trained with tokenizer.lowercase {str(trained.lowercase).lower()}, "
            f"and this run has {str(tokenizer.lowercase).lower()}; set the key"
        )
    if weights.vocabulary and weights.vocabulary != list(tokenizer.lines):
        raise ConfigError(
            f"{where} was trained with another vocabulary than this run's; "
            f"set tokenizer.vocabulary to {join(weights.url, VOCABULARY)}"
        )
    check_fit(model, prepare_experts(model, state, stage.config), f"{where}: the stage", weights.absent)


def choose_tokenizer(config: RunConfig, storage: Storage) -> Tokenizer:
    """Return the run's tokenizer: with its saved vocabulary, else the configured one, else one trained on captions."""
    url, section = join(config.folder, VOCABULARY), config.tokenizer
    if storage.exists(url):
        return Tokenizer.load(storage, url, section.lowercase)
    if section.vocabulary is not None:
        try:
            tokenizer = Tokenizer.load(storage, section.vocabulary, section.lowercase)
        except NotFound as error:
            remedy = "correct it, or leave the key out to train a vocabulary from the captions"
            raise ConfigError(f"tokenizer.vocabulary: {section.vocabulary} does not exist; {remedy}") from error
        except DataError as error:
            raise DataError(f"tokenizer.vocabulary: {error}") from error
        if tokenizer.is_byte_pair and (masked := [stage.name for stage in config.stages if "mlm" in stage.objectives]):
            remedy = "give a WordPiece vocabulary (vocab.txt of BERT), or leave the key out"
            fault = f"CLIP's byte-pair vocabulary has no [MASK], and stage {masked[0]} trains mlm"
            raise ConfigError(f"tokenizer.vocabulary: {fault}; {remedy}")
        if section.lowercase is None and tokenizer.lowercase == tokenizer.is_cased:
            has = "words with capital letters" if tokenizer.lowercase else "no word with a capital letter"
            raise ConfigError(
                f"tokenizer.lowercase: {section.vocabulary} has {has}, but the tokenizer_config.json next to it has "
                f"do_lower_case {str(tokenizer.lowercase).lower()}; set the key to the value used in training"
            )
        return tokenizer
    # A run of masked image modeling alone still fixes the vocabulary of later runs that start from its weights.
    folders = _folders_with_text(config) or sorted({config.sources[s].shards for c in config.stages for s in c.sources})
    captions = (caption for url in folders for caption in itertools.islice(iter_captions(storage, url), MAX_CAPTIONS))
    first = next(captions, None) if config.model.READS_TEXT else None
    textless = all("text" not in SOURCE_INPUTS[config.source_type_of(stage)] for stage in config.stages)
    if first is None and (textless or not config.model.READS_TEXT):
        return Tokenizer(SPECIALS)  # of a run on images without captions: never used
    return Tokenizer.train(itertools.chain([first or ""], captions), section.size, section.lowercase is not False)


def _folders_with_text(config: RunConfig) -> list[str]:
    """Return the folders of shards whose texts some stage reads, without duplicates."""
    used = {name for stage in config.stages for name in stage.sources}
    return sorted({config.sources[name].shards for name in used if "text" in SOURCE_INPUTS[config.sources[name].type]})


def measure_coverage(storage: Storage, folder: str, tokenizer: Tokenizer, urls: Iterable[str]) -> dict[str, float]:
    """Return the fraction of [UNK] among the tokens of each URL's first captions, saved once for a vocabulary."""
    if (saved := load_coverage(storage, folder, tokenizer)) is not None:
        return saved
    unknown = {}
    for url in urls:
        captions = list(itertools.islice(iter_captions(storage, url), COVERAGE_CAPTIONS))
        ids = [i for tokens in tokenizer.encode_batch(captions, sys.maxsize) for i in tokens.ids[1:-1]]
        unknown[url] = round(ids.count(tokenizer.unk_id) / max(1, len(ids)), 6)
        log.info("%s: %.2f %% of the tokens of %d captions are [UNK]", url, 100 * unknown[url], len(captions))
    if alert := coverage_alert(unknown):
        log.warning("%s", alert)
    record = {"vocabulary": tokenizer.digest, "unknown": unknown}
    storage.write(join(folder, COVERAGE_FILE), json.dumps(record, indent=1).encode())
    return unknown


def load_coverage(storage: Storage, folder: str, tokenizer: Tokenizer) -> dict[str, float] | None:
    """Return what `measure_coverage` saved for this vocabulary; None if there is none or it cannot be read."""
    try:
        record = json.loads(storage.read(join(folder, COVERAGE_FILE)))
        return record["unknown"] if record["vocabulary"] == tokenizer.digest else None
    except (StorageError, ValueError, TypeError, KeyError):
        return None


def coverage_alert(unknown: dict[str, float]) -> str:
    """Return the message for a vocabulary that does not fit the captions; empty if it does."""
    worst, folder = max(((fraction, url) for url, fraction in unknown.items()), default=(0.0, ""))
    if worst <= MAX_UNKNOWN:
        return ""
    return (
        f"{worst:.1%} of the tokens of {folder}'s captions are unknown. Set tokenizer.vocabulary to one of their "
        "language, or train one: remove the key, and raise tokenizer.size"
    )
