"""What must be true before the first step, found out before a cluster is held: one process does it, once.

Everything here is idempotent, so that a restarted run goes through it again and changes nothing.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.load import changes, validate
from pipeline.config.schema import RunConfig
from pipeline.config.stored import parse_config
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.choices import Choices, choices_of
from pipeline.data.contents.text import SPECIALS, Tokenizer, is_cased
from pipeline.data.reading.samples import iter_captions
from pipeline.data.shards.manifest import ensure_indexed
from pipeline.data.shards.source import select, selection_url
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint import VOCABULARY, load_weights
from pipeline.training.coverage import measure_coverage
from pipeline.training.stages import check_fit, check_stages, prepare_experts, stage_skeleton

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
TEXTLESS = ("images", "labelled")  # uses of sources whose texts no stage reads
TELL_SECONDS = 5.0
MAX_CAPTIONS = 200_000  # enough to train a vocabulary from


def prepare(config: RunConfig, storage: Storage) -> Tokenizer:
    """Draw synthetic sources, index and check every source and stage, fix the vocabulary, and admit the config.

    Raises ConfigError, DataError, StorageError or CheckpointError with one message; nothing is half-written.
    """
    check_stages(config)
    for path, (old, new) in admit(config, storage).items():
        log.warning("resuming with a changed key: %s: was %r, now %r", path, old, new)
    build_synthetic(storage, config.sources)
    urls = sorted({source.shards for source in config.sources.values()})
    manifests = {url: ensure_indexed(storage, url, _Told(f"{url}: indexed")) for url in urls}
    for name, source in config.sources.items():
        told = _Told(f"sources.{name}: filtered")
        select(storage, source, manifests[source.shards], selection_url(config, name), told)
    choices = _lists(config, storage)  # a wrong list is told before a cluster is held
    tokenizer = choose_tokenizer(config, storage)
    for index, stage in enumerate(config.stages):
        if stage.start_from not in ("previous", "random"):
            _check_start(config, index, storage, tokenizer)
    tokenizer.save(storage, join(config.folder, VOCABULARY))
    if config.model.READS_TEXT:
        measure_coverage(storage, config.folder, tokenizer, _folders_with_text(config))
    for name, listed in choices.items():  # with the run, for who reads its checkpoints anywhere
        storage.write(join(config.folder, name), listed.to_bytes())
    storage.write(join(config.folder, RUN_FILE), config.model_dump_json(indent=1).encode())
    return tokenizer


def _lists(config: RunConfig, storage: Storage) -> dict[str, Choices]:
    """Return by file name what the heads choose among, where it is the same in all stages that train such a head."""
    lists = [choices_of(config, [stage], storage) for stage in config.stages]
    last = {name: listed for each in lists for name, listed in each.items()}
    return {name: listed for name, listed in last.items() if all(each.get(name, listed) == listed for each in lists)}


class _Told:
    """Progress of long work over shards: a line now and then, and none when it is done at once."""

    def __init__(self, what: str):
        self._what, self._last = what, time.monotonic()

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() - self._last >= TELL_SECONDS:
            self._last = time.monotonic()
            log.warning("%s %d of %d shards", self._what, done, total)


def admit(config: RunConfig, storage: Storage) -> dict[str, tuple[Any, Any]]:
    """Compare with the config this run folder was begun with: path -> (old, new) of what may change.

    Raises ConfigError naming every changed key that may not change on resume (contract C4).
    """
    url = join(config.folder, RUN_FILE)
    if not storage.exists(url):
        return {}
    allowed, refused = changes(parse_config(storage.read(url), url), config)
    if refused:
        told = "\n".join(f"{path}: was {old!r}, now {new!r}" for path, (old, new) in refused.items())
        raise ConfigError(
            f"{config.folder} holds a run begun with other values of keys that may not change on resume:\n{told}\n"
            "Give them their old values, or give the run another `name`."
        )
    return allowed


def apart(config: RunConfig, storage: Storage, output: str, name: str) -> RunConfig:
    """Return the same run in another folder, with the vocabulary of its own: preparing it changes nothing of the run.

    Raises ConfigError where the run itself could not be resumed with this config (`admit`).
    """
    admit(config, storage)
    values = config.model_dump(mode="json") | {"output": output, "name": name}
    vocabulary = join(config.folder, VOCABULARY)
    if storage.exists(vocabulary):
        values["tokenizer"]["vocabulary"] = vocabulary
    return validate(values, config.name)


def _check_start(config: RunConfig, index: int, storage: Storage, tokenizer: Tokenizer) -> None:
    """A stage may only start from weights that fit it, or are made to, and that is known before a rank is placed."""
    stage = config.stages[index]
    where = f"stages.{stage.name}.start_from"
    found = load_weights(storage, stage.start_from)
    model = stage_skeleton(config, index, tokenizer.size)
    try:
        state = model.resize_state(found.tensors, found.config.model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {stage.start_from}: {error}") from None
    learnt = Tokenizer(found.vocabulary or SPECIALS, found.config.tokenizer.lowercase)
    if found.vocabulary and learnt.lowercase != tokenizer.lowercase:
        raise ConfigError(
            f"{where}: {stage.start_from} was trained with tokenizer.lowercase {str(learnt.lowercase).lower()}, "
            f"and this run has {str(tokenizer.lowercase).lower()}; set the key"
        )
    if found.vocabulary and found.vocabulary != list(tokenizer.tokens):
        raise ConfigError(
            f"{where}: {stage.start_from} learnt another vocabulary than this run reads; "
            f"set tokenizer.vocabulary to {join(found.url, VOCABULARY)}"
        )
    check_fit(model, prepare_experts(model, state, stage), f"{where}: {stage.start_from}: the stage", found.absent)


def choose_tokenizer(config: RunConfig, storage: Storage) -> Tokenizer:
    """The run's vocabulary: as fixed at its begin, else the configured file, else trained from the captions."""
    url, given = join(config.folder, VOCABULARY), config.tokenizer
    if storage.exists(url):
        return Tokenizer.load(storage, url, given.lowercase)
    if given.vocabulary is not None:
        found = Tokenizer.load(storage, given.vocabulary, given.lowercase)
        if given.lowercase is None and found.lowercase == is_cased(found.tokens):
            has = "words with capital letters" if found.lowercase else "no word with a capital letter"
            raise ConfigError(
                f"tokenizer.lowercase: {given.vocabulary} has {has}, and the tokenizer_config.json beside it says "
                f"do_lower_case {str(found.lowercase).lower()}; set the key to what the weights were trained with"
            )
        return found
    texts = _captions(config, storage) if config.model.READS_TEXT else iter(())
    first = next(texts, None)
    textless = all(config.source_type_of(stage) in TEXTLESS for stage in config.stages)
    if first is None and (textless or not config.model.READS_TEXT):
        return Tokenizer(SPECIALS)  # of a run that reads pictures without captions: it is never used
    return Tokenizer.train(itertools.chain([first or ""], texts), given.size, given.lowercase is not False)


def _folders_with_text(config: RunConfig) -> list[str]:
    """The folders of shards whose texts a stage reads, each once."""
    read = {name for stage in config.stages for name in stage.sources}
    return sorted({config.sources[name].shards for name in read if config.sources[name].type not in TEXTLESS})


def _captions(config: RunConfig, storage: Storage) -> Iterator[str]:
    """Captions and texts of every source that a stage reads, each folder of shards once."""
    read = {name for stage in config.stages for name in stage.sources}
    # A run of masked images alone still fixes a vocabulary for the stages that follow it.
    for url in _folders_with_text(config) or sorted({config.sources[name].shards for name in read}):
        for number, caption in enumerate(iter_captions(storage, url)):
            if number >= MAX_CAPTIONS:
                break
            yield caption
