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
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models.checkpoints.conversion import (
    MODALITIES,
    assumed,
    assumed_heads,
    from_named,
    layer_count,
    published_layout,
    published_names,
    require,
    to_named,
)

_TABLE, _MODALITY = "relative_position_bias_table", "token_type_embeddings.weight"
# Outside the layers; ours on the left. VLMo's release grew from ViLT's and has its names.
RELEASE = {
    "text_embedding.word.weight": "text_embeddings.word_embeddings.weight",
    "text_embedding.token_type": "text_embeddings.token_type_embeddings.weight",
    "text_embedding.positions": "text_embeddings.position_embeddings.weight",
    "text_embedding.norm": "text_embeddings.LayerNorm",
    "image_embedding.patch": "transformer.patch_embed.proj",
    "image_embedding.cls": "transformer.cls_token",
    "image_embedding.positions": "transformer.pos_embed",
    "positions.image": _TABLE,
    "positions.cross": _TABLE,
    "positions.text": _TABLE,
    **dict.fromkeys(MODALITIES, _MODALITY),
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
    "ranking_head.score": "rank_output",
    "vqa_head.expand": "vqa_classifier.0",
    "vqa_head.norm": "vqa_classifier.1",
    "vqa_head.classify": "vqa_classifier.3",
    "nlvr2_head.expand": "nlvr2_classifier.0",
    "nlvr2_head.norm": "nlvr2_classifier.1",
    "nlvr2_head.classify": "nlvr2_classifier.3",
}
_LAYER = {
    "norm": "norm1",
    "attention.weight": "attn.qkv.weight",
    "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias",
    "attention.projection": "attn.proj",
    "attention_gamma": "gamma_1",
    "expert_gamma": "gamma_2",
} | {
    f"experts.{ours}.{module}": name.format(theirs)
    for ours, theirs in (("vision", "imag"), ("language", "text"), ("vision_language", "vl"))
    for module, name in (("norm", "norm2_{}"), ("expand", "mlp_{}.fc1"), ("contract", "mlp_{}.fc2"))
}
release_names = partial(published_names, outside=RELEASE, layer_prefix="transformer.blocks.", layer_names=_LAYER)

_TEXT_POSITIONS = RELEASE["text_embedding.positions"]
_UNUSED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
_OPTIONAL = ("vision_language_expert", "pooler", "itc_head", "itm_head", "mlm_head", "vqa_head", "nlvr2_head")
UNPUBLISHED = ("mim_head", "classification_head")  # parts without a name in published checkpoints

PUBLISHED_MAX_TEXT = 196  # of every published relative table
PUBLISHED_FUSED_LAYERS = {12: 2, 24: 3}  # by layers
PUBLISHED_HEADS = {544: 16}  # by width, where heads are not 64 wide (base_plus)


def infer_section(state: dict[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a published state from tensor shapes; keys in `overrides` take precedence.

    Raises ConfigError where a size can be inferred neither from the shapes nor from `overrides`.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    blocks = [match for name in state if (match := re.match(r"transformer\.blocks\.(\d+)\.(\w+)", name))]
    patch = state.get("transformer.patch_embed.proj.weight")
    if not blocks or patch is None:
        raise ConfigError("no VLMo checkpoint: transformer.blocks or transformer.patch_embed are missing")
    layers, width = layer_count(state, r"transformer\.blocks\.(\d+)\."), len(patch)
    relative = _TABLE in state
    if relative:
        heads = state[_TABLE].shape[1] // layers
    elif width in PUBLISHED_HEADS:
        heads = assumed("heads", PUBLISHED_HEADS[width], f"VLMo's, for width {width}", overrides)
    else:
        heads = assumed_heads(width, overrides)
    if fused := [int(match[1]) for match in blocks if match[2] == "mlp_vl"]:
        fused_layers = layers - min(fused)
    else:
        fused_layers = PUBLISHED_FUSED_LAYERS.get(layers, 1)
        fused_layers = assumed("vision_language_layers", fused_layers, f"VLMo's, for {layers} layers", overrides)
    section: dict[str, Any] = {
        "kind": "vlmo",
        "width": width,
        "layers": layers,
        "patch_size": patch.shape[-1],
        "heads": heads,
        "vision_language_layers": fused_layers,
        "positions": "relative" if relative else "absolute",
        "layer_scale": 0.1 if "transformer.blocks.0.gamma_1" in state else None,
    }
    contrasts = {name for name in state if name.startswith(("itc_", "logit_"))}
    if contrasts and not any(name.startswith(("itc_vl_", "logit_vl_")) for name in contrasts):
        section["contrasts"] = 1  # of retrieval; pretraining has two
    expand = state.get("transformer.blocks.0.mlp_imag.fc1.weight")
    if expand is not None:
        section["mlp_ratio"] = len(expand) // width
    image, text = state.get(RELEASE["image_embedding.positions"]), state.get(_TEXT_POSITIONS)
    reach: tuple[int, int] | None = None  # grid side and longest text
    if relative:
        reach = _reach_of_table(state, overrides)
    elif image is not None and text is not None:
        reach = round((image.shape[1] - 1) ** 0.5), len(text)
    if reach is not None:
        section |= {"image_size": reach[0] * section["patch_size"], "max_text_length": reach[1]}
    return section | dict(overrides)


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
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    unused = (*_UNUSED, *((_TEXT_POSITIONS,) if config.positions == "relative" else ()))
    state = {name: tensor for name, tensor in state.items() if name not in unused}
    return from_named(state, *published_layout(config, state, release_names, _OPTIONAL), allowed)


def to_published(state: dict[str, Tensor], config: VLMoConfig) -> dict[str, Tensor]:
    """Convert our state to the published form, without `UNPUBLISHED` parts."""
    unpublished = {n for n in state if n.split(".")[0] in UNPUBLISHED or n == "image_embedding.mask"}
    state = {name: tensor for name, tensor in state.items() if name not in unpublished}
    names, shapes = published_layout(config, state, release_names, _OPTIONAL)
    require(state, shapes)
    return to_named(state, names, shapes)
