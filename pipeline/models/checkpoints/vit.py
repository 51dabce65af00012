"""ViT checkpoints of Hugging Face (ViTModel, ViTForImageClassification): their names for our parameters, and back.

A checkpoint without a classifier has names without the prefix `vit.`; both forms are read, and full names are written.
ViTModel's pooler is unused here and dropped. Hugging Face's LayerNorms have an epsilon of 1e-12 (`model.norm_eps`), the
JAX release's, and ours by default, 1e-6: no hidden vector of a trained ViT is small enough for a difference above 1e-5.
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

CONFIG = ConfigFile(
    "vit",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    computed={"hidden_act": ("gelu",), "num_channels": (3,)},
    sizes=SIZES | IMAGE_SIZES,
    resample=BILINEAR,
)


def infer_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a published state from shapes; keys in `overrides` take precedence.

    Raises ConfigError for a state of another model.
    """
    state = _full_names(state)
    patch, positions = state.get(f"{_OUTSIDE['image_embedding.patch']}.weight"), state.get(_OUTSIDE[_POSITIONS])
    expand = state.get(f"{_LAYERS}0.intermediate.dense.weight")
    if patch is None or positions is None or expand is None:
        raise ConfigError("no ViT checkpoint of Hugging Face: the patch projection, positions or layer 0 are missing")
    width, side = len(patch), patch.shape[-1]
    return {
        "kind": "vit",
        "width": width,
        "layers": layer_count(state, rf"{re.escape(_LAYERS)}(\d+)\."),
        "heads": assumed_heads(width, overrides),
        "mlp_ratio": len(expand) // width,
        "patch_size": side,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * side,
    } | dict(overrides)


def from_hugging_face(
    state: Mapping[str, Tensor], config: ViTConfig, allowed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Convert a published state to ours.

    Names that match `allowed` (see `require`) may differ, and are left out. Raises CheckpointError listing every
    missing, unexpected or wrong-shaped tensor.
    """
    state = {name: tensor for name, tensor in _full_names(state).items() if name not in _UNUSED}
    classes = len(state[_CLASSES]) if _CLASSES in state else 0
    names, shapes = _names(config, classes, masked=_OUTSIDE[_MASK] in state)
    return from_named(state, names, shapes, allowed)


def to_hugging_face(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Convert to the names of ViTForImageClassification; the masked-image head is left out."""
    head = state.get("classification_head.classify.bias")
    names, shapes = _names(config, 0 if head is None else len(head), masked=_MASK in state)
    return to_named(state, names, shapes)


def _names(config: ViTConfig, classes: int, masked: bool) -> tuple[Names, dict[str, Shape]]:
    """Return the published names and our shapes of a ViT with `classes` classes, with or without a mask embedding."""
    heads = HeadConfig(image_target="mean_colour" if masked else None, classes=classes or None)
    parameters = skeleton(config, heads=heads).named_parameters()
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters if not name.startswith("mim_head.")}
    return {name: published_names(name, _OUTSIDE, _LAYERS) for name in shapes}, shapes


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith(_PREFIX) for name in state):
        return dict(state)
    return {name if name.startswith("classifier.") else f"{_PREFIX}{name}": tensor for name, tensor in state.items()}
