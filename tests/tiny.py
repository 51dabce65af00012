"""A tiny run and invented batches, for tests of training that need no data plane."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.training.collectives import share

VOCABULARY = 50


def tiny_config(**engine: Any) -> RunConfig:
    """Three stages of a two-layer model; drop path on, all objectives in the last stage."""
    optimizer = {"peak_rate": 1e-3, "warmup_steps": 2, "clip_norm": 1.0}
    stages = [
        {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"masked_image": {}}, "steps": 4, "batch": 12},
        {"name": "language", "sources": {"texts": 1.0}, "objectives": {"masked_language": {}}, "steps": 4, "batch": 12},
        {
            "name": "vision_language",
            "sources": {"pairs": 1.0},
            "objectives": {"contrastive": {}, "matching": {"every": 2}, "masked_language": {}, "masked_image": {}},
            "steps": 4,
            "batch": 12,
        },
    ]
    values = {
        "name": "tiny",
        "seed": 3,
        "model": {
            "width": 32,
            "layers": 2,
            "heads": 2,
            "vision_language_layers": 1,
            "image_size": 16,
            "patch_size": 8,
            "max_text": 12,
            "drop_path": 0.1,
        },
        "sources": {
            "pairs": {"shards": "pairs"},
            "pictures": {"shards": "pairs", "use": "images"},
            "texts": {"shards": "pairs", "use": "text"},
        },
        "data": {"lanes": 2},
        "stages": [{**stage, "max_text": 12, "optimizer": optimizer} for stage in stages],
        "engine": {"precision": "float32", **engine},
    }
    return validate(values, "tiny")


def tiny_batch(config: RunConfig, step: int, rank: int, world_size: int, size: int) -> Batch:
    """This rank's rows of an invented global batch: a function of step and place alone."""
    draw = torch.Generator().manual_seed(1000 + step)
    length, patches = 10, config.model.num_patches
    side = config.model.image_size
    lengths = torch.randint(5, length + 1, (size,), generator=draw)
    keep = torch.arange(length)[None] < lengths[:, None]
    text = torch.randint(5, VOCABULARY, (size, length), generator=draw) * keep
    positions = torch.stack([torch.ones(size, dtype=torch.int64), 2 + torch.arange(size) % 3], dim=1)
    labels = text.gather(1, positions)
    labels[torch.arange(size) % 4 == 0, 1] = -100
    batch = Batch(
        step=step,
        place=torch.arange(size),
        uid=torch.arange(size) + 100 * step,
        image_id=torch.arange(size) // 2 * 2 if size > 8 else torch.arange(size),
        source=torch.zeros(size, dtype=torch.int64),
        image=torch.randint(0, 256, (size, side, side, 3), generator=draw, dtype=torch.uint8),
        patch_positions=torch.stack([torch.randperm(patches, generator=draw)[:2] for _ in range(size)]),
        text=text,
        text_keep=keep,
        masked_text=text.scatter(1, positions, 4),
        mask_positions=positions,
        mask_labels=labels,
    )
    rows = batch.rows(slice(*share(size, rank, world_size)))
    longest = int(rows.text_keep.sum(1).max())  # type: ignore[union-attr]
    return _cut_text(rows, longest)


def _cut_text(batch: Batch, length: int) -> Batch:
    from dataclasses import replace

    return replace(
        batch,
        text=batch.text[:, :length],  # type: ignore[index]
        text_keep=batch.text_keep[:, :length],  # type: ignore[index]
        masked_text=batch.masked_text[:, :length],  # type: ignore[index]
    )
