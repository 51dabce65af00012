"""What a finished stage hands over, and where the next one starts from: weights, never optimiser state.

<run>/stages/0-vision/weights.safetensors, vocab.txt, MANIFEST.json, COMMIT.json
                      answers.json, classes.json   what the heads of fine-tuning choose among, if they were trained
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.choices import ANSWERS, CLASSES, Choices
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import commit, file_record, is_committed, read_committed
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


def load_weights(storage: Storage, url: str) -> Weights:
    """Weights of a stage's folder, or of the last finished stage of a run's folder.

    Raises CheckpointError when there is none or it is damaged.
    """
    try:
        names = [name.rstrip("/") for name in storage.list(join(url, "stages"))]
    except StorageError as error:
        raise CheckpointError(f"{url}: cannot be read: {error}") from error
    finished = [name for name in sorted(names, key=_stage_order) if is_committed(storage, join(url, "stages", name))]
    if finished:
        url = join(url, "stages", finished[-1])
    if not is_committed(storage, url):
        raise CheckpointError(f"{url}: no finished stage here; give the folder of a run or of one of its stages")
    manifest, files = read_committed(storage, url)
    return Weights(
        url=url,
        config=RunConfig.model_validate_json(json.dumps(manifest["config"])),
        stage=manifest["stage"],
        step=manifest["step"],
        tensors=safetensors.torch.load(files[WEIGHTS]),
        vocabulary=files[VOCABULARY].decode().splitlines(),
        absent=frozenset(manifest.get("absent", ())),
        choices={
            name: Choices.from_bytes(files[name], join(url, name)) for name in (ANSWERS, CLASSES) if name in files
        },
    )


def _stage_order(name: str) -> tuple[int, str]:
    number = name.partition("-")[0]
    return (int(number) if number.isdigit() else -1, name)
