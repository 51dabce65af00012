"""What must be true before the first step, found out before a cluster is held: one process does it, once.

Everything here is idempotent, so that a restarted run goes through it again and changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.load import changes
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.manifest import ensure_indexed
from pipeline.data.samples import captions_of_source
from pipeline.data.scenes import build_synthetic
from pipeline.data.selection import select
from pipeline.data.sources import selection_url
from pipeline.data.storage import Storage, join
from pipeline.data.text import Tokenizer
from pipeline.training.checkpoint import load_weights
from pipeline.training.stages import check_stages

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
TELL_SECONDS = 5.0
MAX_CAPTIONS = 200_000  # enough to train a vocabulary from


def prepare(config: RunConfig, storage: Storage) -> Tokenizer:
    """Draw synthetic sources, index and check every source and stage, fix the vocabulary, and admit the config.

    Raises ConfigError, DataError, StorageError or CheckpointError with one message; nothing is half-written.
    """
    check_stages(config)
    admit(config, storage)
    build_synthetic(storage, config.sources)
    urls = sorted({source.shards for source in config.sources.values()})
    manifests = {url: ensure_indexed(storage, url, _Told(f"{url}: indexed")) for url in urls}
    for name, source in config.sources.items():
        told = _Told(f"sources.{name}: filtered")
        select(storage, source, manifests[source.shards], selection_url(config, name), told)
    for stage in config.stages:
        if stage.start_from not in ("previous", "random"):
            _check_start(config, stage, storage)
    tokenizer = prepare_tokenizer(config, storage)
    storage.write(join(config.folder, RUN_FILE), config.model_dump_json(indent=1).encode())
    return tokenizer


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
    before = RunConfig.model_validate_json(storage.read(url))
    allowed, refused = changes(before, config)
    if refused:
        told = "\n".join(f"{path}: was {old!r}, now {new!r}" for path, (old, new) in refused.items())
        raise ConfigError(
            f"{config.folder} holds a run begun with other values of keys that may not change on resume:\n{told}\n"
            "Give them their old values, or give the run another `name`."
        )
    for path, (old, new) in allowed.items():
        log.warning("resuming with a changed key: %s: was %r, now %r", path, old, new)
    return allowed


def _check_start(config: RunConfig, stage: StageConfig, storage: Storage) -> None:
    """A stage may only start from the same architecture, and that is known before any rank is placed."""
    found = load_weights(storage, stage.start_from)
    ours, theirs = config.model.model_dump(), found.config.model.model_dump()
    different = [key for key in ours if ours[key] != theirs[key] and key != "drop_path"]
    if different:
        told = ", ".join(f"{key} {theirs[key]!r} there, {ours[key]!r} here" for key in different)
        raise ConfigError(
            f"stages.{stage.name}.start_from: {stage.start_from} holds another architecture ({told}); "
            "give the same `model` section, or other weights"
        )


def prepare_tokenizer(config: RunConfig, storage: Storage) -> Tokenizer:
    """The run's vocabulary: as fixed at its begin, else the configured file, else trained from the captions."""
    url = join(config.folder, "vocab.txt")
    if storage.exists(url):
        return Tokenizer.load(storage, url)
    if config.tokenizer.vocabulary is not None:
        tokenizer = Tokenizer.load(storage, config.tokenizer.vocabulary)
    else:
        tokenizer = Tokenizer.train(_captions(config, storage), config.tokenizer.size)
    tokenizer.save(storage, url)
    return tokenizer


def _captions(config: RunConfig, storage: Storage) -> Iterator[str]:
    """Captions and texts of every source that a stage reads, each folder of shards once."""
    read = {name for stage in config.stages for name in stage.sources}
    folders = {config.sources[name].shards: None for name in read if config.sources[name].use != "images"}
    if not folders:  # a run of masked images alone still fixes a vocabulary for the stages that follow it
        folders = {config.sources[name].shards: None for name in read}
    for url in sorted(folders):
        for number, caption in enumerate(captions_of_source(storage, url)):
            if number >= MAX_CAPTIONS:
                break
            yield caption
