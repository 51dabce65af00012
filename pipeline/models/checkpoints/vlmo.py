"""VLMo's published checkpoints (microsoft/unilm, vlmo): their names for our parameters, and back.

Published checkpoints differ by stage: a head, or the vision-language expert, may be wholly absent, and is then left out
of the result; a model of two images (NLVR2) has a third row of modalities. Unused tensors are dropped: position
indices, which only the downloadable checkpoints have, and in the relative kind the absolute text positions. All other
tensors are required, with the right shape.

Shapes: g grid side, T longest text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pipeline.config.errors import ConfigError
from pipeline.models.checkpoints.conversion import MODALITIES, Format, State, assumed

_TABLE, _MODALITY = "relative_position_bias_table", "token_type_embeddings.weight"
_TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
# Outside the layers; ours on the left. VLMo's release grew from ViLT's and has its names.
RELEASE = {
    "text_embedding.word.weight": "text_embeddings.word_embeddings.weight",
    "text_embedding.token_type": "text_embeddings.token_type_embeddings.weight",
    "text_embedding.positions": _TEXT_POSITIONS,
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
} | {
    f"{head}_head.{module}": f"{head}_classifier.{number}"
    for head in ("vqa", "nlvr2")
    for module, number in (("expand", 0), ("norm", 1), ("classify", 3))
}
PUBLISHED_MAX_TEXT = 196  # of every published relative table
PUBLISHED_FUSED_LAYERS = {12: 2, 24: 3}  # by layers
PUBLISHED_HEADS = {544: 16}  # by width, where heads are not 64 wide (base_plus)


class VLMoFormat(Format):
    title: ClassVar = "VLMo"
    kinds: ClassVar = ("vlmo",)
    outside: ClassVar = RELEASE
    layers: ClassVar = "transformer.blocks."
    layer: ClassVar = {
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
    optional: ClassVar = (
        *("vision_language_expert", "pooler", "itc_head", "itm_head", "mlm_head", "vqa_head", "nlvr2_head"),
    )
    unused: ClassVar = r"^(text_|text_imag_)?relative_position_index$|^text_embeddings\.position_ids$"
    tables: ClassVar = (_TABLE,)

    def infer_more(self, state: State, section: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        layers, width = section["layers"], section["width"]
        more: dict[str, Any] = {}
        if _TABLE in state:
            more["heads"] = state[_TABLE].shape[1] // layers
        elif width in PUBLISHED_HEADS:
            more["heads"] = assumed("heads", PUBLISHED_HEADS[width], f"VLMo's, for width {width}", overrides)
        fused = [int(match[1]) for name in state if (match := re.match(r"transformer\.blocks\.(\d+)\.mlp_vl\.", name))]
        more["vision_language_layers"] = (
            layers - min(fused)
            if fused
            else assumed(
                "vision_language_layers",
                PUBLISHED_FUSED_LAYERS.get(layers, 1),
                f"VLMo's, for {layers} layers",
                overrides,
            )
        )
        contrasts = {name for name in state if name.startswith(("itc_", "logit_"))}
        if contrasts and not any(name.startswith(("itc_vl_", "logit_vl_")) for name in contrasts):
            more["contrasts"] = 1  # of retrieval; pretraining has two
        if _TABLE not in state:
            return more
        # The rows of the table are (2g - 1)² + 3 of images and 2 T + 2 of texts, which do not show both sizes.
        texts = [PUBLISHED_MAX_TEXT]
        texts += [len(state[name]) for name in ("text_relative_position_index", _TEXT_POSITIONS) if name in state]
        for text in [overrides["max_text_length"]] if "max_text_length" in overrides else texts:
            distances = len(state[_TABLE]) - 5 - 2 * text
            side = round(max(distances, 0) ** 0.5)
            if side % 2 and side**2 == distances:
                return more | {"image_size": (side + 1) // 2 * section["patch_size"], "max_text_length": text}
        if {"image_size", "max_text_length"} <= overrides.keys():
            return more
        raise ConfigError(
            f"{_TABLE} has {len(state[_TABLE])} rows, which fit several text lengths and image sizes; "
            "give image_size=… and max_text_length=…"
        )

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        if config.positions == "relative":
            state = {name: tensor for name, tensor in state.items() if name != _TEXT_POSITIONS}
        return super().read(state, config, allowed)
