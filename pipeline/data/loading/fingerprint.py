"""The hash of what a stage's steps read: equal for every world size, loader and store, or contract C1 is broken."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.builder import IGNORED
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage


def fingerprint(
    config: RunConfig,
    stage: StageConfig,
    storage: Storage,
    tokenizer: Tokenizer,
    steps: range,
    world_size: int = 1,
) -> str:
    """SHA-256 (hex) of the global batches of some steps of a stage: every row's uid, pixels, text, masks and labels.

    Rows are hashed without their padding, so that the result is the same for every `world_size`.
    """
    loaders = [Loader(config, stage, storage, tokenizer, rank, world_size) for rank in range(world_size)]
    digest = hashlib.sha256()
    try:
        streams = [loader.batches(steps.start) for loader in loaders]
        for _ in steps:
            for stream in streams:
                hash_rows(digest, next(stream))
    finally:
        for loader in loaders:
            loader.close()
    return digest.hexdigest()


def hash_rows(digest: hashlib._Hash, batch: Batch) -> None:
    """Feeds every row of the batch, without its padding, to a hash."""
    for row in range(len(batch)):
        digest.update(np.array([batch.step, batch.place[row], batch.uid[row], batch.image_id[row]]).tobytes())
        for name, tensor in _real_members(batch, row).items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())


def _real_members(batch: Batch, row: int) -> dict[str, Tensor]:
    found = {}
    for name in ("image", "second_image"):
        if (tensor := getattr(batch, name)) is not None:
            size = getattr(batch, f"{name}_size")
            height, width = tensor.shape[1:3] if size is None else size[row].tolist()
            found[name] = tensor[row, :height, :width]
    for name in ("visible_patches", "patch_positions", "patch_replacements"):
        if (tensor := getattr(batch, name)) is not None:
            counted = batch.patch_positions if name == "patch_replacements" else tensor
            assert counted is not None
            found[name] = tensor[row][counted[row] >= 0]
    for name in ("label", "answers", "answer_scores"):
        if (tensor := getattr(batch, name)) is not None:
            found[name] = tensor[row]
    for name in ("text", "masked_text"):
        if (tensor := getattr(batch, name)) is not None and batch.text_keep is not None:
            found[name] = tensor[row][batch.text_keep[row]]
    if batch.mask_positions is not None and batch.mask_labels is not None:
        is_real = batch.mask_labels[row] != IGNORED
        found["mask_positions"] = batch.mask_positions[row][is_real]
        found["mask_labels"] = batch.mask_labels[row][is_real]
    for name in ("region_features", "region_location", "region_class", "region_hidden"):
        if (tensor := getattr(batch, name)) is not None and batch.region_keep is not None:
            found[name] = tensor[row][batch.region_keep[row]]
    if batch.region_positions is not None:
        found["region_positions"] = batch.region_positions[row][batch.region_positions[row] >= 0]
    return found
