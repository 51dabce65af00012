"""Models: named forward inputs in, named outputs out."""

from pkgutil import resolve_name

import torch

from pipeline.config.schema import TransformerConfig
from pipeline.models.model import HeadConfig, Model

_CLASSES = {  # imported when used: ImageBERT needs transformers, which takes seconds
    "vlmo": "pipeline.models.vlmo:VLMo",
    "vilt": "pipeline.models.encoders:ViLT",
    "vit": "pipeline.models.encoders:ViT",
    "dual_encoder": "pipeline.models.encoders:DualEncoder",
    "imagebert": "pipeline.models.imagebert:ImageBERT",
}


def build_model(config: TransformerConfig, vocabulary: int, heads: HeadConfig = HeadConfig(), seed: int = 0) -> Model:
    """Build the model of a config; weights depend on `seed` alone, and the global generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        model: Model = resolve_name(_CLASSES[config.kind])(config, vocabulary, heads)
    model.initialize(seed)
    return model


def skeleton(config: TransformerConfig, vocabulary: int = 1, heads: HeadConfig = HeadConfig()) -> Model:
    """Build the model on the meta device, without memory for its weights: for names, shapes and parts."""
    with torch.device("meta"):
        return resolve_name(_CLASSES[config.kind])(config, vocabulary, heads)  # type: ignore[no-any-return]
