"""Models: named forward inputs in, named outputs out."""

from pkgutil import resolve_name

import torch

from pipeline.config.schema import TransformerConfig
from pipeline.models.model import HeadConfig, Model

_CLASSES = {  # imported when used, because importing transformers, which ImageBERT needs, takes seconds
    "vlmo": "pipeline.models.vlmo:VLMo",
    "vilt": "pipeline.models.vilt:ViLT",
    "vit": "pipeline.models.towers:ViT",
    "dual_encoder": "pipeline.models.towers:DualEncoder",
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
