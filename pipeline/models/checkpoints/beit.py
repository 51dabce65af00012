"""BEiT checkpoints as VLMo's vision stage, and back: Hugging Face's names, and those of BEiT's own release.

A BEiT provides the image embedding, attention, the vision expert and its part of the relative table, and with a head
for visual tokens that head too. Everything else of a VLMo is absent: language, the other experts, other heads.
Pretraining checkpoints have one relative table for all layers, fine-tuned ones a table for each, as VLMo does. VLMo's
image modality vector starts as zeros, and is exported by adding it to the tensors it is added to.

Position indices are dropped, as is the classifier, which reads the mean of all patches. Three names exist for the final
norm. The pooler's, in models with a classifier, was trained for that mean as well, and is the closest that they have.

Shapes: R rows of a table, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import (
    IMAGE_SIZES,
    SIZES,
    ConfigFile,
    Names,
    Shape,
    assumed,
    assumed_heads,
    from_named,
    layer_count,
    published_names,
    to_named,
)
from pipeline.models.model import HeadConfig

_PREFIX = "beit."
_LAYERS = f"{_PREFIX}encoder.layer."
_OUTSIDE = {
    "image_embedding.patch": f"{_PREFIX}embeddings.patch_embeddings.projection",
    "image_embedding.cls": f"{_PREFIX}embeddings.cls_token",
    "image_embedding.mask": f"{_PREFIX}embeddings.mask_token",
    "image_embedding.positions": f"{_PREFIX}embeddings.position_embeddings",
    "mim_head.predict": "lm_head",
}
# In BeitForMaskedImageModeling, in a BeitModel without a pooler, and in one with it.
NORMS = ("layernorm", f"{_PREFIX}layernorm", f"{_PREFIX}pooler.layernorm")
_PARTS = ("image_embedding", "attention", "vision_expert.lower", "vision_expert.upper", "norm")

_TABLE = "positions.image"
_MASK = "image_embedding.mask"
_MODALITY = "image_embedding.modality"
_TOKENS = "mim_head.predict.bias"
# The tensors to which the modality vector is added, each of which begins an image token.
_CARRIES_MODALITY = ("image_embedding.cls", "image_embedding.patch.bias", _MASK)
_UNUSED = re.compile(r"relative_position_index$|^classifier\.")

SHARED_TABLE = f"{_PREFIX}encoder.relative_position_bias.relative_position_bias_table"
LAYER_TABLE = _LAYERS + "{}.attention.attention.relative_position_bias.relative_position_bias_table"

# BEiT's release (microsoft/unilm, beit) on the left; `attn.qkv.weight` is also split in three.
_RELEASE = (
    (r"^(cls_token|mask_token)$", rf"{_PREFIX}embeddings.\1"),
    (r"^pos_embed$", f"{_PREFIX}embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", f"{_PREFIX}embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.relative_position", f"{_PREFIX}encoder.relative_position_bias.relative_position"),
    (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", f"{_PREFIX}pooler.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", _LAYERS),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
    (r"\.attn\.relative_position", ".attention.attention.relative_position_bias.relative_position"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
CONFIG = ConfigFile(
    "beit",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    computed={"hidden_act": ("gelu",), "num_channels": (3,)},
    sizes=SIZES | IMAGE_SIZES,
)
_JOINT = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.weight$")


def infer_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of the VLMo that a BEiT starts from shapes; keys in `overrides` take precedence.

    Raises ConfigError for a state of another model.
    """
    state = _full_names(state)
    patch = state.get(f"{_OUTSIDE['image_embedding.patch']}.weight")
    expand = state.get(f"{_LAYERS}0.intermediate.dense.weight")
    table = state.get(SHARED_TABLE, state.get(LAYER_TABLE.format(0)))
    positions = state.get(_OUTSIDE["image_embedding.positions"])
    if patch is None or expand is None or (table is None and positions is None):
        raise ConfigError("no BEiT checkpoint: the patch projection, layer 0 or positions are missing")
    layers = layer_count(state, rf"{re.escape(_LAYERS)}(\d+)\.")
    upper = 3 if layers > 12 else min(2, layers - 1)  # VLMo's, of base and of large
    if table is not None:
        heads, grid = table.shape[1], (round((len(table) - 3) ** 0.5) + 1) // 2
    else:
        assert positions is not None
        heads, grid = assumed_heads(len(patch), overrides), round((positions.shape[1] - 1) ** 0.5)
    return {
        "kind": "vlmo",
        "width": len(patch),
        "layers": layers,
        "heads": heads,
        "mlp_ratio": len(expand) // len(patch),
        "patch_size": patch.shape[-1],
        "image_size": grid * patch.shape[-1],
        "positions": "absolute" if table is None else "relative",
        "layer_scale": 0.1 if f"{_LAYERS}0.lambda_1" in state else None,
        "vision_language_layers": assumed("vision_language_layers", upper, f"VLMo's, for {layers} layers", overrides),
    } | dict(overrides)


def from_published(state: Mapping[str, Tensor], config: VLMoConfig, allowed: Collection[str] = ()) -> dict[str, Tensor]:
    """Convert to the vision stage's state.

    Names that match `allowed` (see `require`) may differ, and are left out. Raises CheckpointError listing every
    missing, unexpected or wrong-shaped tensor by Hugging Face's name.
    """
    state = {name: tensor for name, tensor in _full_names(state).items() if not _UNUSED.search(name)}
    tokens = len(state["lm_head.bias"]) if "lm_head.bias" in state else 0
    norm = next((name for name in NORMS if f"{name}.weight" in state), NORMS[0])
    names, shapes = _names(config, norm, tokens, masked=_OUTSIDE[_MASK] in state)
    tables = _tables(config, shared=SHARED_TABLE in state)
    converted = from_named(state, names, shapes, allowed, tables)
    if tables and all(name in state for name in tables):
        layers = [state[name] for name in tables]
        converted[_TABLE] = torch.cat(layers, dim=1) if len(layers) > 1 else layers[0].repeat(1, config.layers)
    return converted | {_MODALITY: torch.zeros(config.width)}


def to_hugging_face(
    state: Mapping[str, Tensor], config: VLMoConfig, norm: str = NORMS[1], shared: bool = False
) -> dict[str, Tensor]:
    """Convert the vision part of a VLMo to Hugging Face's BEiT, which computes the same from images.

    `norm` is one of NORMS. With `shared`, all layers have one table; CheckpointError where theirs differ.
    """
    if (modality := state.get(_MODALITY)) is not None:  # BEiT has none: fold it into the tensors it is added to
        state = {name: t + modality if name in _CARRIES_MODALITY else t for name, t in state.items()}
    tokens = len(state[_TOKENS]) if _TOKENS in state else 0
    names, shapes = _names(config, norm, tokens, masked=_MASK in state)
    published = to_named(state, names, shapes)
    if config.positions == "absolute":
        return published
    tables = state[_TABLE].chunk(config.layers, dim=1)
    if shared and not all(torch.equal(table, tables[0]) for table in tables):
        raise CheckpointError("the layers' relative tables differ and cannot be written as one; write a table for each")
    return published | {
        name: table.clone()
        for name, table in zip(_tables(config, shared), tables[:1] if shared else tables, strict=True)
    }


def to_published(state: Mapping[str, Tensor], config: VLMoConfig) -> dict[str, Tensor]:
    """Convert to a pretraining checkpoint where the state predicts visual tokens, else to a BeitModel.

    Equal relative tables are written as one, which Hugging Face's class for pretraining reads
    (`use_shared_relative_position_bias`). Tables of zeros say nothing about sharing; a BeitModel then has one per
    layer.
    """
    pretrained = _TOKENS in state
    tables = state[_TABLE].chunk(config.layers, dim=1) if _TABLE in state else ()
    shared = bool(tables) and all(torch.equal(table, tables[0]) for table in tables)
    shared = shared and (pretrained or bool(tables[0].any()))
    return to_hugging_face(state, config, NORMS[0] if pretrained else NORMS[1], shared)


def _names(config: VLMoConfig, norm: str, tokens: int, masked: bool) -> tuple[Names, dict[str, Shape]]:
    """Return the published names and our shapes of a VLMo's vision part, without its table."""
    heads = HeadConfig(image_target="visual_tokens" if masked or tokens else None, visual_tokens=tokens or 1)
    model = skeleton(config, heads=heads)
    parts = {*_PARTS, *(["positions.image"] if config.positions == "absolute" else [])}
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if (model.part_of(name) in parts and name != _MODALITY)
        or (name == _MASK and masked)
        or (name.startswith("mim_head.") and tokens)
    }
    outside = _OUTSIDE | {"norm": norm}
    return {name: published_names(name, outside, _LAYERS) for name in shapes}, shapes


def _tables(config: VLMoConfig, shared: bool) -> dict[str, Shape]:
    """Return the published relative tables with their shapes (R, H), in layer order."""
    if config.positions == "absolute":
        return {}
    names = [SHARED_TABLE] if shared else [LAYER_TABLE.format(layer) for layer in range(config.layers)]
    return dict.fromkeys(names, ((2 * config.grid - 1) ** 2 + 3, config.heads))


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Hugging Face's names with the prefix `beit.`, from those of BEiT's release too."""
    if any(name.startswith(_PREFIX) for name in state):
        return dict(state)
    if "patch_embed.proj.weight" not in state:
        return {f"{_PREFIX}{name}": tensor for name, tensor in state.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if joint := _JOINT.match(name):
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {f"{_LAYERS}{joint[1]}.attention.attention.{part}.weight": rows for part, rows in parts}
            continue
        for pattern, replacement in _RELEASE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
