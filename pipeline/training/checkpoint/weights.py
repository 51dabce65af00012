"""What a finished stage hands over, and where the next one starts from: weights, never optimiser state.

The checkpoint of a step, such as the best that a run kept, is read as what would have been handed over there.

<run>/stages/0-vision/weights.safetensors, vocab.txt, MANIFEST.json, COMMIT.json
                      answers.json, classes.json   what the heads of fine-tuning choose among, if they were trained
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices, choices_of
from pipeline.data.storage import Storage, join, split
from pipeline.training.checkpoint.committed import (
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

WEIGHTS, VOCABULARY = "weights.safetensors", "vocab.txt"


@dataclass(frozen=True)
class Weights:
    """What a stage hands over: weights by name, never optimiser state, and what they are the weights of."""

    url: str
    config: RunConfig
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
) -> None:
    """Commit a stage's weights, its vocabulary and what its heads choose among; called on rank 0 alone."""
    weights = TensorFile(tensors)
    storage.write_parts(join(url, WEIGHTS), weights.size, weights.read)
    small = {
        VOCABULARY: "".join(f"{token}\n" for token in vocabulary).encode(),
        **{name: each.to_bytes() for name, each in (choices or {}).items()},
    }
    for name, data in small.items():
        storage.write(join(url, name), data)
    records = {WEIGHTS: weights.record(), **{name: file_record(data) for name, data in small.items()}}
    commit(storage, url, records, metadata)


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


def config_of_weights(storage: Storage, url: str) -> RunConfig:
    """The config of the run that made the weights which `load_weights` would read. Raises CheckpointError as it."""
    found = find_weights(storage, url)
    config: RunConfig = _facts(found, read_manifest(storage, found))["config"]
    return config


def load_weights(storage: Storage, url: str) -> Weights:
    """Weights of a stage's folder, of the last finished stage of a run's folder, or of the checkpoint of a step.

    Raises CheckpointError when there is none or it is damaged.
    """
    url = find_weights(storage, url)
    if step_of(split(url)[1]) is not None:
        return _of_checkpoint(storage, url)
    manifest, files = read_committed(storage, url)
    return Weights(
        **_facts(url, manifest),
        tensors=safetensors.torch.load(files[WEIGHTS]),
        vocabulary=files[VOCABULARY].decode().splitlines(),
        absent=frozenset(manifest.get("absent", ())),
        choices={
            name: Choices.from_bytes(files[name], join(url, name)) for name in (ANSWERS, CLASSES) if name in files
        },
    )


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
    config, names = facts["config"], [stage.name for stage in facts["config"].stages]
    run = split(split(url)[0])[0]
    return Weights(
        **facts,
        tensors={
            name: saved.read(name, "ema" if saved.holds(name, "ema") else "weight", 0, math.prod(shape)).view(shape)
            for name, shape in manifest["shapes"].items()
        },
        vocabulary=storage.read(join(run, VOCABULARY)).decode().splitlines(),
        choices=choices_of(config, config.stages[: names.index(facts["stage"]) + 1], storage),
    )


def _facts(url: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = RunConfig.model_validate_json(json.dumps(manifest["config"]))
    return {"url": url, "config": config, "stage": manifest["stage"], "step": manifest["step"]}


def _stage_order(name: str) -> tuple[int, str]:
    number = name.partition("-")[0]
    return (int(number) if number.isdigit() else -1, name)
