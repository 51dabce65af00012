"""A tiny run and synthetic batches, for tests of training that need no loader."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.order import share
from tests.support.trial import VOCABULARY, invented_batch

__all__ = ["VOCABULARY", "tiny_batch", "tiny_config"]


def tiny_config(optimizer: Mapping[str, Any] = {}, global_batch_size: int = 12, **engine: Any) -> RunConfig:
    """Return a run of a two-layer model with drop path; its third stage has all of VLMo's pretraining objectives."""
    shared: dict[str, Any] = {"steps": 4, "global_batch_size": global_batch_size, "max_text_length": 12}
    shared["optimizer"] = {"lr": 1e-3, "warmup_steps": 2, "max_grad_norm": 1.0, **optimizer}
    every = {"itc": {}, "itm": {"every": 2}, "mlm": {}, "mim": {}}
    random = {"sources": {"pairs": 0.5, "more_pairs": 0.5}, "objectives": {"itm": {"every": 2}, "mlm": {"every": 3}}}
    stages = [
        {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}},
        {"name": "language", "sources": {"texts": 1.0}, "objectives": {"mlm": {}}},
        {"name": "vision_language", "sources": {"pairs": 1.0}, "objectives": every},
        {"name": "random_negatives", "negatives": "random", **random},
    ]
    values = {
        "name": "tiny", "seed": 3, "data": {"streams": 2}, "engine": {"precision": "float32", **engine},
        "stages": [stage | shared for stage in stages],
        "model": {
            "width": 32, "layers": 2, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 8,
            "init_std": 0.02,
            "max_text_length": 12, "drop_path": 0.1,
        },
        "sources": {
            "pairs": {"shards": "pairs"},
            "more_pairs": {"shards": "pairs"},
            "pictures": {"shards": "pairs", "type": "images"},
            "texts": {"shards": "pairs", "type": "text"},
        },
    }  # fmt: skip
    return validate(values, "tiny")


def tiny_batch(config: RunConfig, step: int, rank: int, world_size: int, size: int) -> Batch:
    """Return this rank's examples of a synthetic global batch, which depends on `step` and `size` alone."""
    batch = invented_batch(config.model, "pairs", step, size)
    if size > 8:  # some rows show the same image
        batch = replace(batch, image_id=torch.arange(size) // 2 * 2)
    rows = batch.rows(slice(*share(size, rank, world_size)))
    longest = int(rows.text_keep.sum(1).max())  # type: ignore[union-attr]
    texts: dict[str, Any] = {n: getattr(rows, n)[:, :longest] for n in ("text", "text_keep", "masked_text")}
    return replace(rows, **texts)
