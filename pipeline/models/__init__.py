"""Models: named forward inputs in, named outputs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.config.schema import TransformerConfig
from pipeline.models.dual_encoder import DualEncoder
from pipeline.models.model import HeadConfig, Model
from pipeline.models.vilt import ViLT
from pipeline.models.vit import ViT
from pipeline.models.vlmo import VLMo


def build_model(config: TransformerConfig, vocabulary: int, heads: HeadConfig = HeadConfig(), seed: int = 0) -> Model:
    """Build the model of a config; weights depend on `seed` alone, and the global generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        model = _model_class(config)(config, vocabulary, heads)
    model.initialize(seed)
    return model


def skeleton(config: TransformerConfig, vocabulary: int = 1, heads: HeadConfig = HeadConfig()) -> Model:
    """Build the model on the meta device, without memory for its weights: for names, shapes and parts."""
    with torch.device("meta"):
        return _model_class(config)(config, vocabulary, heads)


def _model_class(config: TransformerConfig) -> Callable[[Any, int, HeadConfig], Model]:
    if config.kind == "imagebert":
        from pipeline.models.imagebert import ImageBERT  # lazily, because importing transformers takes seconds

        return ImageBERT
    kinds: dict[str, type[Model]] = {"vlmo": VLMo, "vilt": ViLT, "vit": ViT, "dual_encoder": DualEncoder}
    return kinds[config.kind]
