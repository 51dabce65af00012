"""Model weights that a finished stage hands over, and that the next one or any user starts from.

The folder of a step's checkpoint, such as the best that a run kept, can be read in the same way.

    <run>/stages/0-vision/weights.safetensors, vocab.txt, MANIFEST.json, COMMIT.json
                          answers.json, classes.json    label lists of fine-tuned heads, if any were trained
"""

import logging
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError, MomeError, StorageError
from pipeline.config.load import RecordedLocation, stored_config
from pipeline.config.schema import RunConfig
from pipeline.config.urls import absolute
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.text import tokens_of
from pipeline.data.storage import Storage, join, split
from pipeline.training.checkpoint import committed
from pipeline.training.checkpoint.committed import MANIFEST, commit, file_record, is_committed, parse_name
from pipeline.training.checkpoint.serialization import SavedState, TensorFile
from pipeline.training.ownership import Ownership, Start

WEIGHTS, VOCABULARY = "weights.safetensors", "vocab.txt"
FILE = re.compile(  # names that `save_weights` writes, and of which it removes those of earlier starts
    rf"(?:{'|'.join(name.partition('.')[0] for name in (WEIGHTS, VOCABULARY, ANSWERS, CLASSES, MANIFEST))})"
    r"(?:\.(?P<number>\d{4,})-(?P<token>[0-9a-f]{8}))?\.(?:safetensors|txt|json)"
)

_STAGE = re.compile(r"(\d+)(?:-|$)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsInfo:
    """Metadata of weights by their manifest; the folder of `config` is the one that they were read from."""

    url: str
    config: RunConfig
    recorded: RecordedLocation
    stage: str
    step: int
    is_checkpoint: bool  # of a step; False for the final weights of a stage


@dataclass(frozen=True)
class Weights(WeightsInfo):
    """A stage's weights by name, without optimizer state, and their metadata."""

    tensors: dict[str, Tensor]
    vocabulary: list[str]
    absent: frozenset[str] = frozenset()  # parts of the model that imported weights do not include
    choices: Mapping[str, Choices] = field(default_factory=dict)  # label lists of the heads, by file name


def stage_url(config: RunConfig, index: int) -> str:
    return join(config.folder, "stages", f"{index}-{config.stages[index].name}")


def save_weights(
    storage: Storage,
    url: str,
    tensors: dict[str, Tensor],
    vocabulary: list[str],
    metadata: dict[str, Any],
    choices: Mapping[str, Choices] | None = None,
    ownership: Ownership | None = None,
) -> bool:
    """Write and commit a stage's weights, vocabulary and lists on rank 0; False if another attempt has committed."""
    start = (ownership and ownership.start) or Start(0, secrets.token_hex(4))
    lists = {VOCABULARY: "".join(f"{token}\n" for token in vocabulary).encode()}
    lists |= {name: labels.to_bytes() for name, labels in (choices or {}).items()}
    own_names = {}  # instead of those that another attempt has used
    for name in (WEIGHTS, *lists, MANIFEST):
        stem, dot, suffix = name.partition(".")
        own_names[name] = f"{stem}.{start}{dot}{suffix}"
    weights = TensorFile(tensors)
    records = {WEIGHTS: weights.record()}
    if not storage.write_parts(join(url, WEIGHTS), weights.size, weights.read, create=True):
        records[WEIGHTS]["file"] = own_names[WEIGHTS]
        storage.write_parts(join(url, own_names[WEIGHTS]), weights.size, weights.read)
    for name, data in lists.items():
        records[name] = file_record(data)
        if not storage.write(join(url, name), data, create=True):
            records[name]["file"] = own_names[name]
            storage.write(join(url, own_names[name]), data)
    manifest = commit(storage, url, records, metadata, ownership, own_names[MANIFEST])
    try:
        if ownership is not None:
            ownership.check()
        # Delete this start's files that the commit does not name and, if it is this start's, those of earlier ones.
        used = {manifest, *(record.get("file", name) for name, record in records.items())} if manifest else set()
        for name in storage.list(url):
            if (match := FILE.fullmatch(name)) and name not in used:
                writer = Start(int(match["number"] or 0), match["token"] or "")
                if writer == start or (used and writer < start):
                    storage.delete(join(url, name))
    except StorageError as error:  # costs space, but is no reason to fail the run
        log.warning("%s: files of an unfinished attempt could not be removed: %s", url, error)
    return manifest is not None


def finished_stage(storage: Storage, url: str) -> str:
    """Return the folder of the last finished stage if `url` is a run's folder, else `url` itself."""
    try:
        names = [name.rstrip("/") for name in storage.list(join(url, "stages"))]
    except StorageError as error:
        raise CheckpointError(f"{url}: cannot be read: {error}") from error
    stages = sorted((int(match[1]) if (match := _STAGE.match(name)) else -1, name) for name in names)
    finished = [name for _, name in stages if is_committed(storage, join(url, "stages", name))]
    return join(url, "stages", finished[-1]) if finished else url


def weights_info(storage: Storage, url: str) -> WeightsInfo:
    """Return the metadata of the weights that `load_weights` would read; raises as it does."""
    with _opened(storage, url) as (info, _):
        return info


def load_weights(storage: Storage, url: str) -> Weights:
    """Load the weights of a stage, of a run's last finished one, or of a checkpoint; CheckpointError without them."""
    with _opened(storage, url) as (info, manifest):
        if not info.is_checkpoint:
            folder, records = info.url, manifest["files"]
            files = {name: committed.read_verified(storage, folder, name, records[name]) for name in records}
            tensors = safetensors.torch.load(files[WEIGHTS])
        else:  # a checkpoint's fragments, or their moving average if there is one
            versions = {
                name: committed.verify(storage, info.url, name, record) for name, record in manifest["files"].items()
            }
            saved = SavedState(storage, info.url, versions, manifest["stage_step"])
            tensors = {}
            for name, shape in manifest["shapes"].items():
                kind = "ema" if (name, "ema") in saved.parts else "weight"
                tensors[name] = saved.read(name, kind, 0, math.prod(shape)).view(shape)
            # Only what `prepare` copied to the run's folder: no other file that a stored config names is read.
            folder = split(split(info.url)[0])[0]
            names = [VOCABULARY, *(name for name in (ANSWERS, CLASSES) if storage.exists(join(folder, name)))]
            files = {name: storage.read(join(folder, name)) for name in names}
        lists = [name for name in (ANSWERS, CLASSES) if name in files]
        return Weights(
            **vars(info),
            tensors=tensors,
            vocabulary=tokens_of(files[VOCABULARY]),
            absent=frozenset(manifest.get("absent", ())),
            choices={name: Choices.from_bytes(files[name], join(folder, name)) for name in lists},
        )


@contextmanager
def _opened(storage: Storage, url: str) -> Iterator[tuple[WeightsInfo, dict[str, Any]]]:
    """Yield metadata and manifest of a folder's weights; CheckpointError without any or for errors in the block."""
    url = finished_stage(storage, url)
    if not is_committed(storage, url):
        raise CheckpointError(
            f"{url}: contains no finished stage; give the folder of a run, of one of its stages or of a checkpoint"
        )
    try:
        manifest, manifest_url = committed.read_manifest(storage, url), join(url, MANIFEST)
        stage, step = manifest.get("stage"), manifest.get("step")
        if not isinstance(stage, str) or not isinstance(step, int):
            raise CheckpointError(
                f"{manifest_url} is damaged: expected a stage's name and a step, got {stage!r:.60}, {step!r:.60}"
            )
        folder = absolute(url).rstrip("/")  # of the run: two levels up from a stage or a checkpoint
        (run, kind), name = split(split(folder)[0]), split(folder)[1]
        if (kind == "stages" and _STAGE.match(name)) or (kind == "checkpoints" and parse_name(name)):
            folder = run
        try:
            config, recorded = stored_config(manifest.get("config"), manifest_url, folder)
            config.stage_named(stage)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        yield WeightsInfo(url, config, recorded, stage, step, parse_name(split(url)[1]) is not None), manifest
    except (MomeError, AssertionError):
        raise
    except Exception as error:
        raise CheckpointError(f"{url} is damaged: {type(error).__name__}: {error}") from error
