"""What a finished stage hands over, and where the next one starts from: weights, never optimiser state.

The checkpoint of a step, such as the best that a run kept, is read as what would have been handed over there.

<run>/stages/0-vision/weights.safetensors, vocab.txt, MANIFEST.json, COMMIT.json
                      answers.json, classes.json   what the heads of fine-tuning choose among, if they were trained
"""

from __future__ import annotations

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
from pipeline.config.schema import RunConfig
from pipeline.config.stored import Recorded, stored_config
from pipeline.config.urls import absolute
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.text import tokens_of
from pipeline.data.storage import Storage, join, split
from pipeline.training.checkpoint.committed import (
    MANIFEST,
    commit,
    file_record,
    is_committed,
    read_committed,
    read_manifest,
    verify,
)
from pipeline.training.checkpoint.retention import step_of
from pipeline.training.checkpoint.saved_state import SavedState
from pipeline.training.checkpoint.tensor_file import TensorFile
from pipeline.training.ownership import Ownership, Start

WEIGHTS, VOCABULARY = "weights.safetensors", "vocab.txt"
_FILE = re.compile(
    rf"(?:{'|'.join(name.partition('.')[0] for name in (WEIGHTS, VOCABULARY, ANSWERS, CLASSES, MANIFEST))})"
    r"(?:\.(?P<start>\d{4,}-[0-9a-f]{8}))?\.(?:safetensors|txt|json)"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a stage hands over: weights by name, never optimiser state, and what they are the weights of.

    `config` is as `stored_config` makes it: its folder is the one that the weights were read from.
    """

    url: str
    config: RunConfig
    recorded: Recorded
    stage: str
    step: int
    tensors: dict[str, Tensor]
    vocabulary: list[str]
    absent: frozenset[str] = frozenset()  # parts of the model that imported weights were said not to hold
    choices: Mapping[str, Choices] = field(default_factory=dict)  # what heads choose among, by file name


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
    """Commit a stage's weights, its vocabulary and what its heads choose among; called on rank 0 alone.

    Returns False, having changed nothing that is committed, when another attempt has committed the folder. Raises
    Superseded when `ownership` was lost, StorageError when the files could not be written.
    """
    start = (ownership and ownership.start) or Start(0, secrets.token_hex(4))
    taken: dict[str, str] = {}  # names that an attempt before, or beside, this one has taken -> what is written instead

    def other_name(name: str) -> str:
        stem, dot, suffix = name.partition(".")
        taken[name] = f"{stem}.{start}{dot}{suffix}"
        return taken[name]

    weights = TensorFile(tensors)
    records = {WEIGHTS: weights.record()}
    if not storage.create_parts(join(url, WEIGHTS), weights.size, weights.read):
        records[WEIGHTS]["file"] = other_name(WEIGHTS)
        storage.write_parts(join(url, taken[WEIGHTS]), weights.size, weights.read)
    small = {
        VOCABULARY: "".join(f"{token}\n" for token in vocabulary).encode(),
        **{name: each.to_bytes() for name, each in (choices or {}).items()},
    }
    for name, data in small.items():
        records[name] = file_record(data)
        if not storage.create(join(url, name), data):
            records[name]["file"] = other_name(name)
            storage.write(join(url, taken[name]), data)
    check = ownership.check if ownership else lambda: None
    is_ours = commit(storage, url, records, metadata, check, other_name)
    try:
        check()
        used = {taken.get(name, name) for name in (*records, MANIFEST)} if is_ours else set()
        _remove_leavings(storage, url, start, used)
    except StorageError as error:  # takes space, and no run down
        log.warning("%s: what an attempt left could not be removed: %s", url, error)
    return is_ours


def is_file_of_weights(name: str) -> bool:
    """Return whether `save_weights` writes a file of this name, and removes one that an earlier start left."""
    return _FILE.fullmatch(name) is not None


def _remove_leavings(storage: Storage, url: str, start: Start, used: set[str]) -> None:
    """Delete what `start` left in a committed folder; where it committed `used`, also what earlier starts left."""
    for name in storage.list(url):
        if (match := _FILE.fullmatch(name)) and name not in used:
            writer = Start.parse(match["start"]) if match["start"] else Start(0, "")
            if writer == start or (used and writer < start):
                storage.delete(join(url, name))


def find_weights(storage: Storage, url: str) -> str:
    """The folder of weights that `url` means: itself, or that of the last finished stage of the run that it names.

    Raises CheckpointError when there is none.
    """
    url = finished_stage(storage, url)
    if not is_committed(storage, url):
        raise CheckpointError(
            f"{url}: no finished stage here; give the folder of a run, of one of its stages or of a checkpoint"
        )
    return url


@dataclass(frozen=True)
class WeightsInfo:
    """What the manifest of weights says of them, without reading them."""

    url: str
    config: RunConfig
    recorded: Recorded
    stage: str
    step: int

    @property
    def is_checkpoint(self) -> bool:
        """Whether they are those of a step, and not what the stage handed over."""
        return step_of(split(self.url)[1]) is not None


def weights_info(storage: Storage, url: str) -> WeightsInfo:
    """Return what the weights that `load_weights` would read are. Raises CheckpointError as it does."""
    found = find_weights(storage, url)
    with _damage_told(found):
        return WeightsInfo(**_facts(found, read_manifest(storage, found)))


def folder_of_weights(url: str) -> str:
    """Return the folder of the run that a stage's or a checkpoint's folder lies in, else `url` itself."""
    run, kind = split(split(url)[0])
    name = split(url)[1]
    is_part = (kind == "stages" and _stage_order(name)[0] >= 0) or (kind == "checkpoints" and step_of(name) is not None)
    return run if is_part else url.rstrip("/")


def load_weights(storage: Storage, url: str) -> Weights:
    """Weights of a stage's folder, of the last finished stage of a run's folder, or of the checkpoint of a step.

    Raises CheckpointError when there is none or it is damaged.
    """
    url = find_weights(storage, url)
    if step_of(split(url)[1]) is not None:
        with _damage_told(url):
            return _of_checkpoint(storage, url)
    with _damage_told(url):
        manifest, files = read_committed(storage, url)
        return Weights(
            **_facts(url, manifest),
            tensors=safetensors.torch.load(files[WEIGHTS]),
            vocabulary=tokens_of(files[VOCABULARY]),
            absent=frozenset(manifest.get("absent", ())),
            choices={
                name: Choices.from_bytes(files[name], join(url, name)) for name in (ANSWERS, CLASSES) if name in files
            },
        )


@contextmanager
def _damage_told(url: str) -> Iterator[None]:
    """Turn whatever a manifest or file of an unexpected shape raises into a CheckpointError that names the folder."""
    try:
        yield
    except (MomeError, AssertionError):
        raise
    except Exception as error:
        raise CheckpointError(f"{url}: is damaged: {type(error).__name__}: {error}") from error


def finished_stage(storage: Storage, url: str) -> str:
    """The folder of the last finished stage where `url` is a run's; `url` itself otherwise."""
    try:
        names = [name.rstrip("/") for name in storage.list(join(url, "stages"))]
    except StorageError as error:
        raise CheckpointError(f"{url}: cannot be read: {error}") from error
    finished = [name for name in sorted(names, key=_stage_order) if is_committed(storage, join(url, "stages", name))]
    return join(url, "stages", finished[-1]) if finished else url


def _of_checkpoint(storage: Storage, url: str) -> Weights:
    """The weights in a checkpoint's fragments, or their moving average where there is one."""
    manifest = read_manifest(storage, url)
    if "shapes" not in manifest:
        raise CheckpointError(f"{url}: tells no shapes, for an older version wrote it; give a stage's folder")
    files = {name: verify(storage, url, name, record) for name, record in manifest["files"].items()}
    saved = SavedState(storage, url, files, manifest["stage_step"])
    facts = _facts(url, manifest)
    run = split(split(url)[0])[0]
    return Weights(
        **facts,
        tensors={
            name: saved.read(name, "ema" if saved.holds(name, "ema") else "weight", 0, math.prod(shape)).view(shape)
            for name, shape in manifest["shapes"].items()
        },
        vocabulary=tokens_of(storage.read(join(run, VOCABULARY))),
        choices=_choices_of_run(storage, run),
    )


def _choices_of_run(storage: Storage, run: str) -> dict[str, Choices]:
    """Return the lists that `prepare` left in the run's folder: no other file that a stored config names is read."""
    places = {name: join(run, name) for name in (ANSWERS, CLASSES)}
    return {name: Choices.from_bytes(storage.read(url), url) for name, url in places.items() if storage.exists(url)}


def _facts(url: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    stage, step, where = manifest.get("stage"), manifest.get("step"), join(url, MANIFEST)
    if not isinstance(stage, str) or not isinstance(step, int):
        raise CheckpointError(
            f"{where} is damaged: expected a stage's name and a step, got {stage!r:.60}, {step!r:.60}"
        )
    try:
        config, recorded = stored_config(manifest.get("config"), where, folder_of_weights(absolute(url)))
        config.stage_named(stage)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return {"url": url, "config": config, "recorded": recorded, "stage": stage, "step": step}


def _stage_order(name: str) -> tuple[int, str]:
    number = name.partition("-")[0]
    return (int(number) if number.isdigit() else -1, name)
