"""What Hugging Face's ViT, BEiT and their kin have in common: the names of an encoder layer's tensors, and their form.

Names are those of checkpoint files, which transformers keeps from version to version, and not those of its modules.
Of our tensors one may be several published ones, row upon row: query, key and value have a matrix each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pipeline.models.checkpoints.mismatch import Shape, require

Names = Mapping[str, tuple[str, ...]]  # ours -> the published tensors that, row upon row, are it

_ATTENTION = "attention.attention"
_LAYER = {
    "norm": "layernorm_before",
    "attention.projection": "attention.output.dense",
    "experts.vision.norm": "layernorm_after",
    "experts.vision.expand": "intermediate.dense",
    "experts.vision.contract": "output.dense",
}
_LAYER_TENSORS = {
    "attention.weight": tuple(f"{_ATTENTION}.{part}.weight" for part in ("query", "key", "value")),
    "attention.query_bias": (f"{_ATTENTION}.query.bias",),
    "attention.key_bias": (f"{_ATTENTION}.key.bias",),
    "attention.value_bias": (f"{_ATTENTION}.value.bias",),
    "attention_gamma": ("lambda_1",),
    "expert_gamma": ("lambda_2",),
}


def published_names(ours: str, outside: Mapping[str, str], layer_prefix: str) -> tuple[str, ...]:
    """The published names of one of our parameters; `outside` names those outside the layers, or their modules.

    KeyError where it has none.
    """
    if not ours.startswith("blocks."):
        return (translated(ours, outside),)
    _, layer, inner = ours.split(".", 2)
    names = _LAYER_TENSORS.get(inner) or (translated(inner, _LAYER),)
    return tuple(f"{layer_prefix}{layer}.{name}" for name in names)


def translated(name: str, names: Mapping[str, str]) -> str:
    """A parameter by its own entry, or by its module's."""
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}"


def from_named(
    state: Mapping[str, Tensor],
    names: Names,
    ours: Mapping[str, Shape],
    patch_size: int,
    allowed: Collection[str] = (),
    more: Mapping[str, Shape] | None = None,
) -> dict[str, Tensor]:
    """Our tensors of `names`, in the shapes `ours`; `more` are published tensors that the caller converts itself.

    Raises CheckpointError as `require`.
    """
    wanted = {published: shape for name in names for published, shape in _published(name, names, ours, patch_size)}
    found = require(state, wanted | dict(more or {}), allowed)
    converted = {}
    for name, parts in names.items():
        if found.issuperset(parts):
            pieces = [state[part] for part in parts]
            converted[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(ours[name])
    return converted


def to_named(
    state: Mapping[str, Tensor], names: Names, ours: Mapping[str, Shape], patch_size: int
) -> dict[str, Tensor]:
    """The published form of our tensors of `names`. Raises CheckpointError where one is absent or of another shape."""
    require({name: state[name] for name in names if name in state}, {name: ours[name] for name in names})
    published = {}
    for name in names:
        parts = _published(name, names, ours, patch_size)
        # Copies, because files of tensors do not hold two views of one memory.
        pieces = state[name].chunk(len(parts)) if len(parts) > 1 else [state[name]]
        for (part, shape), piece in zip(parts, pieces, strict=True):
            published[part] = piece.reshape(shape).clone() if len(parts) > 1 else piece.reshape(shape)
    return published


def _published(name: str, names: Names, ours: Mapping[str, Shape], patch_size: int) -> list[tuple[str, Shape]]:
    """Names and shapes of a parameter's published parts."""
    shape, parts = published_shape(name, ours[name], patch_size), names[name]
    return [(part, (shape[0] // len(parts), *shape[1:])) for part in parts]


def published_shape(ours: str, shape: Shape, patch_size: int) -> Shape:
    """Convolutions keep their kernel's shape, and what is one for all rows has a dimension for them."""
    if ours == "image_embedding.patch.weight":
        return (shape[0], 3, patch_size, patch_size)
    if ours in ("image_embedding.cls", "image_embedding.mask"):
        return (1, 1, *shape)
    if ours == "image_embedding.positions":
        return (1, *shape)
    return shape
