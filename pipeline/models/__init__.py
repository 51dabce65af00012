"""Models: a model reads named passes over a batch and returns their features by name."""

from __future__ import annotations

import torch

from pipeline.config.schema import ModelConfig
from pipeline.models.vlmo import ImageTarget, VLMo


def build_model(config: ModelConfig, vocabulary: int, image_target: ImageTarget | None = None, seed: int = 0) -> VLMo:
    """The model a config names, its weights drawn from `seed` alone (the global generator is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        model = VLMo(config, vocabulary, image_target)
    model.initialize(seed)
    return model
