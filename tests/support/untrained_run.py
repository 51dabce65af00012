"""Final weights of an untrained stage, for tests of what reads weights."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.objectives import head_config
from pipeline.training.checkpoint import save_weights, stage_url
from tests.support.short_run import short_config


def untrained_weights(folder: Path) -> tuple[RunConfig, str]:
    """Write the untrained weights of the second stage and its drawn scenes; return the config and the weights' URL."""
    config, storage = (
        short_config(str(folder), evaluation={"source": "scenes", "max_images": 22, "batch_size": 5}),
        Storage(),
    )
    build_synthetic(storage, config.sources)
    tokenizer = Tokenizer.train(iter_captions(storage, config.sources["scenes"].shards), 300)
    model = build_model(config.model, tokenizer.size, head_config(config, 1), seed=5)
    metadata = {"config": config.model_dump(mode="json"), "stage": "pairs", "step": 16}
    save_weights(storage, stage_url(config, 1), model.state_dict(), list(tokenizer.tokens), metadata)
    return config, stage_url(config, 1)
