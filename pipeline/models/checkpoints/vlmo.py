"""VLMo's published checkpoints (microsoft/unilm, vlmo): their names for our parameters, and back.

Published checkpoints differ by stage: a head, or the vision-language expert, may be wholly absent, and is then left out
of the result; a model of two images (NLVR2) has a third row of modalities. Unused tensors are dropped: position
indices, which only the downloadable checkpoints have, and in the relative kind the absolute text positions. All other
tensors are required, with the right shape. Results may share memory with the given state.

Shapes: g grid side, T longest text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import Shape, assumed, assumed_heads, layer_count, require
from pipeline.models.model import HeadConfig, Model

# Ours on the left. `{n}` is the layer.
_OUTSIDE = {
    "text_embedding.word.weight": "text_embeddings.word_embeddings.weight",
    "text_embedding.token_type": "text_embeddings.token_type_embeddings.weight",
    "text_embedding.positions": "text_embeddings.position_embeddings.weight",
    "text_embedding.norm": "text_embeddings.LayerNorm",
    "image_embedding.patch": "transformer.patch_embed.proj",
    "image_embedding.cls": "transformer.cls_token",
    "image_embedding.positions": "transformer.pos_embed",
    "norm": "transformer.norm",
    "pooler.dense": "pooler.dense",
    "itc_head.image": "itc_image_proj.fc",
    "itc_head.text": "itc_text_proj.fc",
    "itc_head.image_vl": "itc_vl_image_proj.fc",
    "itc_head.text_vl": "itc_vl_text_proj.fc",
    "itc_head.log_scale": "logit_scale",
    "itc_head.log_scale_vl": "logit_vl_scale",
    "itm_head.classify": "itm_score.fc",
    "mlm_head.dense": "mlm_score.transform.dense",
    "mlm_head.norm": "mlm_score.transform.LayerNorm",
    "mlm_head.decode.weight": "mlm_score.decoder.weight",
    "mlm_head.decode.bias": "mlm_score.bias",
    "vqa_head.expand": "vqa_classifier.0",
    "vqa_head.norm": "vqa_classifier.1",
    "vqa_head.classify": "vqa_classifier.3",
    "nlvr2_head.expand": "nlvr2_classifier.0",
    "nlvr2_head.norm": "nlvr2_classifier.1",
    "nlvr2_head.classify": "nlvr2_classifier.3",
}
_INSIDE = {
    "norm": "norm1",
    "attention.weight": "attn.qkv.weight",
    "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias",
    "attention.projection": "attn.proj",
    "attention_gamma": "gamma_1",
    "expert_gamma": "gamma_2",
}
_EXPERTS = {"vision": "imag", "language": "text", "vision_language": "vl"}
_EXPERT = {"norm": "norm2_{e}", "expand": "mlp_{e}.fc1", "contract": "mlp_{e}.fc2"}

_WORDS = "text_embedding.word.weight"
_ANSWERS = "vqa_head.classify.bias"
_SECOND = "image_embedding.second"
_TEXT_POSITIONS = _OUTSIDE["text_embedding.positions"]
_TABLE = "relative_position_bias_table"
_MODALITY = "token_type_embeddings.weight"
_TABLE_PARTS = ("positions.image", "positions.cross", "positions.text")
_MODALITY_PARTS = ("text_embedding.modality", "image_embedding.modality", _SECOND)
_JOINED = _TABLE_PARTS + _MODALITY_PARTS
_UNUSED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
_OPTIONAL = (
    "vision_language_expert",
    "pooler",
    "itc_head",
    "itm_head",
    "mlm_head",
    "vqa_head",
    "nlvr2_head",
)
UNPUBLISHED = ("mim_head", "classification_head")  # parts without a name in published checkpoints

PUBLISHED_MAX_TEXT = 196  # of every published relative table
PUBLISHED_VISION_LANGUAGE_LAYERS = {12: 2, 24: 3}  # by layers
PUBLISHED_HEADS = {544: 16}  # by width, where heads are not 64 wide (base_plus)


def infer_section(state: dict[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a published state from tensor shapes; keys in `overrides` take precedence.

    Raises ConfigError where a size can be inferred neither from the shapes nor from `overrides`.
    """
    state = _without_leading_module(state)
    blocks = [match for name in state if (match := re.match(r"transformer\.blocks\.(\d+)\.(\w+)", name))]
    patch = state.get("transformer.patch_embed.proj.weight")
    if not blocks or patch is None:
        raise ConfigError("no VLMo checkpoint: transformer.blocks or transformer.patch_embed are missing")
    layers, width = layer_count(state, r"transformer\.blocks\.(\d+)\."), len(patch)
    upper = [int(match[1]) for match in blocks if match[2] == "mlp_vl"]
    relative = _TABLE in state
    section: dict[str, Any] = {
        "kind": "vlmo",
        "width": width,
        "layers": layers,
        "patch_size": patch.shape[-1],
        "heads": state[_TABLE].shape[1] // layers if relative else _published_heads(width, overrides),
        "vision_language_layers": layers - min(upper) if upper else _published_upper(layers, overrides),
        "positions": "relative" if relative else "absolute",
        "layer_scale": 0.1 if "transformer.blocks.0.gamma_1" in state else None,
    }
    contrasts = {name for name in state if name.startswith(("itc_", "logit_"))}
    if contrasts and not any(name.startswith(("itc_vl_", "logit_vl_")) for name in contrasts):
        section["contrasts"] = 1  # of retrieval; pretraining has two
    expand = state.get("transformer.blocks.0.mlp_imag.fc1.weight")
    if expand is not None:
        section["mlp_ratio"] = len(expand) // width
    image, text = state.get(_OUTSIDE["image_embedding.positions"]), state.get(_TEXT_POSITIONS)
    reach: tuple[int, int] | None = None  # grid side and longest text
    if relative:
        reach = _reach_of_table(state, overrides)
    elif image is not None and text is not None:
        reach = round((image.shape[1] - 1) ** 0.5), len(text)
    if reach is not None:
        section |= {"image_size": reach[0] * section["patch_size"], "max_text_length": reach[1]}
    return section | dict(overrides)


def _published_heads(width: int, overrides: Mapping[str, Any]) -> int:
    if width in PUBLISHED_HEADS:
        return assumed("heads", PUBLISHED_HEADS[width], f"VLMo's, for width {width}", overrides)
    return assumed_heads(width, overrides)


def _published_upper(layers: int, overrides: Mapping[str, Any]) -> int:
    upper = PUBLISHED_VISION_LANGUAGE_LAYERS.get(layers, 1)
    return assumed("vision_language_layers", upper, f"VLMo's, for {layers} layers", overrides)


def _reach_of_table(state: dict[str, Tensor], overrides: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the grid side and longest text that make up the rows of the table, (2g - 1)² + 3 and 2 T + 2."""
    texts = [PUBLISHED_MAX_TEXT]
    texts += [len(state[name]) for name in ("text_relative_position_index", _TEXT_POSITIONS) if name in state]
    for text in [overrides["max_text_length"]] if "max_text_length" in overrides else texts:
        distances = len(state[_TABLE]) - 5 - 2 * text
        side = round(max(distances, 0) ** 0.5)
        if side % 2 and side**2 == distances:
            return (side + 1) // 2, text
    if {"image_size", "max_text_length"} <= overrides.keys():
        return None
    raise ConfigError(
        f"{_TABLE} has {len(state[_TABLE])} rows, which fit several text lengths and image sizes; "
        "give image_size=… and max_text_length=…"
    )


def from_published(state: dict[str, Tensor], config: VLMoConfig, allowed: Collection[str] = ()) -> dict[str, Tensor]:
    """Convert a published state to ours, with its own vocabulary.

    A DeepSpeed checkpoint's prefix `module.` is ignored. Names that match `allowed` (see `require`) may differ, and are
    left out. Raises CheckpointError listing every missing, unexpected or wrong-shaped tensor.
    """
    state = {name: tensor for name, tensor in _without_leading_module(state).items() if name not in _UNUSED}
    if config.positions == "relative":
        state.pop(_TEXT_POSITIONS, None)
    model = _model_of(config, state, {name: _published_name(name) for name in (_WORDS, _ANSWERS)})
    shapes = _shapes(model)
    if _MODALITY in state and len(state[_MODALITY]) < len(_MODALITY_PARTS):
        shapes.pop(_SECOND, None)
    names = {name: _published_name(name) for name in shapes}
    kept = _of_present_parts(model, shapes, {n for n in shapes if names[n] in state})
    published_shapes = {names[n]: _published_shape(n, shapes[n], config) for n in kept if n not in _JOINED}
    for published, parts in _joined(kept).items():
        published_shapes[published] = (sum(_rows(shapes[part]) for part in parts), shapes[parts[0]][-1])
    fitting = require(state, published_shapes, allowed)
    converted = {n: state[names[n]].reshape(shapes[n]) for n in kept if n not in _JOINED and names[n] in fitting}
    for published, parts in _joined(kept).items():
        if published in fitting:
            rows = state[published].split([_rows(shapes[part]) for part in parts])
            # Copies, because files of tensors do not hold two views of one memory.
            converted |= {part: piece.reshape(shapes[part]).clone() for part, piece in zip(parts, rows, strict=True)}
    return {name: converted[name] for name in kept if name in converted}


def to_published(state: dict[str, Tensor], config: VLMoConfig) -> dict[str, Tensor]:
    """Convert our state to the published form, without `UNPUBLISHED` parts."""
    model = _model_of(config, state, {name: name for name in (_WORDS, _ANSWERS)})
    unpublished = {n for n in state if n.split(".")[0] in UNPUBLISHED or n == "image_embedding.mask"}
    state = {name: tensor for name, tensor in state.items() if name not in unpublished}
    shapes = _shapes(model)
    kept = _of_present_parts(model, shapes, state.keys() & shapes.keys())
    require(state, {name: shapes[name] for name in kept})
    published = {
        _published_name(name): state[name].reshape(_published_shape(name, shapes[name], config))
        for name in kept
        if name not in _JOINED
    }
    for name, parts in _joined(kept).items():
        published[name] = torch.cat([state[part].reshape(_rows(shapes[part]), -1) for part in parts])
    return published


def published_name(name: str) -> str | None:
    """Return the release's name of a parameter, or of the tensor it is rows of; None where it has none."""
    try:
        return _published_name(name)
    except KeyError:
        return None


def _without_leading_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _model_of(config: VLMoConfig, state: Mapping[str, Tensor], names: dict[str, str]) -> Model:
    """Build a skeleton with every optional head, with the numbers of words and answers in `state` (default 1)."""
    words, answers = (len(state[names[name]]) if names[name] in state else 1 for name in (_WORDS, _ANSWERS))
    return skeleton(config, words, HeadConfig(answers=answers, reasoning=True))


def _of_present_parts(model: Model, shapes: dict[str, Shape], present: Collection[str]) -> list[str]:
    """Return our names without the optional parts that are wholly absent."""
    # The second image's modality vector belongs to a head, but is published in the table of modalities.
    absent = set(_OPTIONAL) - {model.part_of(name) for name in present if name != _SECOND}
    return [n for n in shapes if (n in present if n == _SECOND else model.part_of(n) not in absent)]


def _shapes(model: Model) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _joined(names: list[str]) -> dict[str, list[str]]:
    """Return the published tensors that hold several of these parameters as rows, with the parameters."""
    joined = {_MODALITY: _MODALITY_PARTS, _TABLE: _TABLE_PARTS}
    present = {published: [part for part in parts if part in names] for published, parts in joined.items()}
    return {published: parts for published, parts in present.items() if parts}


def _published_name(name: str) -> str:
    if name in _JOINED:
        return _TABLE if name in _TABLE_PARTS else _MODALITY
    if not name.startswith("blocks."):
        return _translated(name, _OUTSIDE)
    _, layer, inner = name.split(".", 2)
    if inner.startswith("experts."):
        _, expert, module, last = inner.split(".")
        return f"transformer.blocks.{layer}.{_EXPERT[module].format(e=_EXPERTS[expert])}.{last}"
    return f"transformer.blocks.{layer}.{_translated(inner, _INSIDE)}"


def _translated(name: str, names: dict[str, str]) -> str:
    """A parameter by its own entry, or by its module's."""
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}"


def _published_shape(name: str, shape: Shape, config: VLMoConfig) -> Shape:
    """Return the published shape: kernels of convolutions, a leading batch dimension, 0-d scalars."""
    if name == "image_embedding.patch.weight":
        return (shape[0], 3, config.patch_size, config.patch_size)
    if name.startswith("itc_head.log_scale"):
        return ()
    if name == "image_embedding.cls":
        return (1, 1, *shape)
    if name == "image_embedding.positions":
        return (1, *shape)
    return shape


def _rows(shape: Shape) -> int:
    return shape[0] if len(shape) > 1 else 1
