"""Models: a model reads named passes over a batch and returns their features by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.config.schema import (
    DualEncoderConfig,
    ImageBERTConfig,
    TransformerConfig,
    ViLTConfig,
    ViTConfig,
    VLMoConfig,
)
from pipeline.models.dual_encoder import DualEncoder
from pipeline.models.model import HeadConfig, Model
from pipeline.models.vilt import ViLT
from pipeline.models.vit import ViT
from pipeline.models.vlmo import VLMo

Kind = Callable[[Any, int, HeadConfig], Model]
_KINDS: dict[type[TransformerConfig], Kind] = {
    VLMoConfig: VLMo,
    ViLTConfig: ViLT,
    ViTConfig: ViT,
    DualEncoderConfig: DualEncoder,
}


def build_model(config: TransformerConfig, vocabulary: int, heads: HeadConfig = HeadConfig(), seed: int = 0) -> Model:
    """The model a config names, its weights drawn from `seed` alone (the global generator is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        model = _kind(config)(config, vocabulary, heads)
    model.initialize(seed)
    return model


def skeleton(config: TransformerConfig, vocabulary: int = 1, heads: HeadConfig = HeadConfig()) -> Model:
    """The same without memory for its weights: for names, shapes and parts."""
    with torch.device("meta"):
        return _kind(config)(config, vocabulary, heads)


def _kind(config: TransformerConfig) -> Kind:
    if isinstance(config, ImageBERTConfig):
        from pipeline.models.imagebert import ImageBERT  # here: its trunk's library takes seconds to load

        return ImageBERT
    return _KINDS[type(config)]
