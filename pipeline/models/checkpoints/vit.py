"""ViT checkpoints of Hugging Face (ViTModel, ViTForImageClassification): their names for our parameters, and back.

A checkpoint may lack the classifier, and then has the names without their leading `vit.`; both are read, and the
full names are written. ViTModel's pooler takes no part in what a ViT computes here and is dropped. Hugging Face's
LayerNorms have an epsilon of 1e-12 (`model.norm_eps`), the JAX release's and by default ours one of 1e-6: no
hidden vector that a trained ViT normalises is small enough to tell them apart to 1e-5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ViTConfig
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import (
    BILINEAR,
    IMAGE_SIZES,
    SIZES,
    ConfigFile,
    Names,
    Shape,
    assumed_heads,
    from_named,
    layer_count,
    published_names,
    to_named,
)
from pipeline.models.model import HeadConfig

_PREFIX = "vit."
_LAYERS = f"{_PREFIX}encoder.layer."
_OUTSIDE = {
    "image_embedding.patch": f"{_PREFIX}embeddings.patch_embeddings.projection",
    "image_embedding.cls": f"{_PREFIX}embeddings.cls_token",
    "image_embedding.mask": f"{_PREFIX}embeddings.mask_token",
    "image_embedding.positions": f"{_PREFIX}embeddings.position_embeddings",
    "norm": f"{_PREFIX}layernorm",
    "classification_head.classify": "classifier",
}
_CLASSES = "classifier.bias"
_MASK, _POSITIONS = "image_embedding.mask", "image_embedding.positions"
_UNUSED = (f"{_PREFIX}pooler.dense.weight", f"{_PREFIX}pooler.dense.bias")
_UNPUBLISHED = "mim_head."  # what predicts masked patches has no name there

CONFIG = ConfigFile(
    "vit",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    computed={"hidden_act": ("gelu",), "num_channels": (3,)},
    sizes=SIZES | IMAGE_SIZES,
    resample=BILINEAR,
)


def infer_section(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a published state, by its tensors' shapes; `given` keys stand as they are.

    Raises ConfigError for a state that is no ViT's.
    """
    state = _full_names(state)
    patch, positions = state.get(f"{_OUTSIDE['image_embedding.patch']}.weight"), state.get(_OUTSIDE[_POSITIONS])
    expand = state.get(f"{_LAYERS}0.intermediate.dense.weight")
    if patch is None or positions is None or expand is None:
        raise ConfigError("no ViT checkpoint of Hugging Face: it lacks the patch projection, positions or layer 0")
    width, side = len(patch), patch.shape[-1]
    return {
        "kind": "vit",
        "width": width,
        "layers": layer_count(state, rf"{re.escape(_LAYERS)}(\d+)\."),
        "heads": assumed_heads(width, given),
        "mlp_ratio": len(expand) // width,
        "patch_size": side,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * side,
    } | dict(given)


def from_hugging_face(
    state: Mapping[str, Tensor], config: ViTConfig, allowed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Our state from a published one; CheckpointError lists every name that is missing, unexpected or wrong-shaped.

    What `allowed` names (see `require`) may differ, and is left out.
    """
    state = {name: tensor for name, tensor in _full_names(state).items() if name not in _UNUSED}
    classes = len(state[_CLASSES]) if _CLASSES in state else 0
    names, shapes = _names(config, classes, masked=_OUTSIDE[_MASK] in state)
    return from_named(state, names, shapes, config.patch_size, allowed)


def to_hugging_face(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The published form of our state, as ViTForImageClassification reads it.

    The head that predicts masked patches is left out.
    """
    head = state.get("classification_head.classify.bias")
    names, shapes = _names(config, 0 if head is None else len(head), masked=_MASK in state)
    return to_named(state, names, shapes, config.patch_size)


def _names(config: ViTConfig, classes: int, masked: bool) -> tuple[Names, dict[str, Shape]]:
    """Published names and our shapes of a ViT with so many classes, with or without a mask embedding."""
    heads = HeadConfig(image_target="mean_colour" if masked else None, classes=classes or None)
    parameters = skeleton(config, heads=heads).named_parameters()
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters if not name.startswith(_UNPUBLISHED)}
    return {name: published_names(name, _OUTSIDE, _LAYERS) for name in shapes}, shapes


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith(_PREFIX) for name in state):
        return dict(state)
    return {name if name.startswith("classifier.") else f"{_PREFIX}{name}": tensor for name, tensor in state.items()}
