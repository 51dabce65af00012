"""VLMo's published checkpoints (microsoft/unilm, vlmo): their names for our parameters, and back.

Published checkpoints differ by stage: a head, or the vision-language expert, may be wholly absent, and is then left
out of the result. What takes no part in the computation is dropped: position index tensors, and in the relative kind
the text's absolute positions. Everything else must be there, with the right shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import ModelConfig
from pipeline.models.vlmo import VLMo, part_of

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
    "contrastive_head.image": "itc_image_proj.fc",
    "contrastive_head.text": "itc_text_proj.fc",
    "contrastive_head.image_vl": "itc_vl_image_proj.fc",
    "contrastive_head.text_vl": "itc_vl_text_proj.fc",
    "contrastive_head.log_scale": "logit_scale",
    "contrastive_head.log_scale_vl": "logit_vl_scale",
    "matching_head.classify": "itm_score.fc",
    "masked_language_head.dense": "mlm_score.transform.dense",
    "masked_language_head.norm": "mlm_score.transform.LayerNorm",
    "masked_language_head.decode.weight": "mlm_score.decoder.weight",
    "masked_language_head.decode.bias": "mlm_score.bias",
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

_TABLE = "relative_position_bias_table"
_MODALITY = "token_type_embeddings.weight"
_TABLE_PARTS = ("positions.image", "positions.cross", "positions.text")
_MODALITY_PARTS = ("text_embedding.modality", "image_embedding.modality")
_UNUSED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
_OPTIONAL = ("vision_language_expert", "pooler", "contrastive_head", "matching_head", "masked_language_head")


def from_published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state from a published one; CheckpointError lists every name that is missing, unexpected or wrong-shaped.

    A DeepSpeed checkpoint's leading `module.` is ignored. The vocabulary is the one the state brings.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name not in _UNUSED}
    if config.positions == "relative":
        state.pop("text_embeddings.position_embeddings.weight", None)
    shapes = _published_shapes(config, _vocabulary(state))
    present = {part for name, part in _published_parts(config).items() if name in state}
    absent = {part for part in _OPTIONAL if part not in present}
    wanted = {name: shape for name, shape in shapes.items() if _published_parts(config)[name] not in absent}
    _require(state, wanted)
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours.update(_to_ours(name, tensor, config))
    return ours


def to_published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The published form of our state. The masked-image head has none and is left out."""
    known = {name: shape for name, shape in _our_shapes(config, _our_vocabulary(state)).items()}
    state = {name: tensor for name, tensor in state.items() if part_of(name, config) != "masked_image_head"}
    present = {part_of(name, config) for name in state}
    wanted = {n: shape for n, shape in known.items() if part_of(n, config) not in set(_OPTIONAL) - present}
    _require(state, wanted)
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in _TABLE_PARTS + _MODALITY_PARTS:
            published[_published_name(name)] = tensor.reshape(_published_shape(name, known[name], config))
    published[_MODALITY] = torch.stack([state[name] for name in _MODALITY_PARTS])
    if config.positions == "relative":
        published[_TABLE] = torch.cat([state[name] for name in _TABLE_PARTS])
    return published


def _to_ours(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    shapes = _our_shapes(config, 1)
    if name == _MODALITY:
        return {part: row.clone() for part, row in zip(_MODALITY_PARTS, tensor, strict=True)}
    if name == _TABLE:
        rows = tensor.split([shapes[part][0] for part in _TABLE_PARTS])
        return {part: piece.clone() for part, piece in zip(_TABLE_PARTS, rows, strict=True)}
    ours = _names(config)[name]
    return {ours: tensor.reshape(shapes.get(ours) if ours in _RESHAPED else tensor.shape)}


def _require(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    faults = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "wrong shape": [
            f"{name} (is {tuple(state[name].shape)}, must be {shape})"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    if any(faults.values()):
        lines = [f"  {kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names]
        message = "the checkpoint does not fit the model; compare its sizes with the config's model section"
        raise CheckpointError("\n".join([message, *lines]))


def _names(config: ModelConfig) -> dict[str, str]:
    """Published name -> ours, for the parameters that are one tensor on both sides."""
    joined = _TABLE_PARTS + _MODALITY_PARTS
    return {_published_name(name): name for name in _our_shapes(config, 1) if name not in joined}


def _published_parts(config: ModelConfig) -> dict[str, str]:
    parts = {published: part_of(ours, config) for published, ours in _names(config).items()}
    parts[_MODALITY] = "text_embedding"
    if config.positions == "relative":
        parts[_TABLE] = "positions.text"
    return parts


def _published_shapes(config: ModelConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    ours = _our_shapes(config, vocabulary)
    shapes = {published: _published_shape(name, ours[name], config) for published, name in _names(config).items()}
    shapes[_MODALITY] = (2, config.width)
    if config.positions == "relative":
        shapes[_TABLE] = (sum(ours[part][0] for part in _TABLE_PARTS), config.heads * config.layers)
    return shapes


def _our_shapes(config: ModelConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = VLMo(config, vocabulary)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _published_name(ours: str) -> str:
    stem, _, last = ours.rpartition(".")
    if not ours.startswith("blocks."):
        return _OUTSIDE[ours] if ours in _OUTSIDE else f"{_OUTSIDE[stem]}.{last}"
    _, layer, inner = ours.split(".", 2)
    prefix = f"transformer.blocks.{layer}"
    if inner.startswith("experts."):
        _, expert, module, last = inner.split(".")
        return f"{prefix}.{_EXPERT[module].format(e=_EXPERTS[expert])}.{last}"
    if inner in _INSIDE:
        return f"{prefix}.{_INSIDE[inner]}"
    stem, _, last = inner.rpartition(".")
    return f"{prefix}.{_INSIDE[stem]}.{last}"


def _published_shape(ours: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """A convolution's weight stays a convolution's, and what is one for all rows keeps a dimension for them."""
    if ours == "image_embedding.patch.weight":
        return (shape[0], 3, config.patch_size, config.patch_size)
    if ours == "image_embedding.cls":
        return (1, 1, *shape)
    if ours == "image_embedding.positions":
        return (1, *shape)
    if ours.startswith("contrastive_head.log_scale"):
        return ()
    return shape


def _vocabulary(state: dict[str, Tensor]) -> int:
    words = state.get(_OUTSIDE["text_embedding.word.weight"])
    return 1 if words is None else len(words)


def _our_vocabulary(state: dict[str, Tensor]) -> int:
    words = state.get("text_embedding.word.weight")
    return 1 if words is None else len(words)
