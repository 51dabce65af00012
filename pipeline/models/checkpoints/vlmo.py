"""VLMo's published checkpoints (microsoft/unilm, vlmo): their names for our parameters, and back.

Published checkpoints differ by stage: a head, or the vision-language expert, may be wholly absent, and is then left
out of the result. What takes no part in the computation is dropped: position index tensors, and in the relative kind
the text's absolute positions. Everything else must be there, with the right shape. Tensors may share the given
state's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.config.model import VLMoConfig
from pipeline.models import skeleton

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

_WORDS = "text_embedding.word.weight"
_TEXT_POSITIONS = _OUTSIDE["text_embedding.positions"]
_TABLE = "relative_position_bias_table"
_MODALITY = "token_type_embeddings.weight"
_TABLE_PARTS = ("positions.image", "positions.cross", "positions.text")
_MODALITY_PARTS = ("text_embedding.modality", "image_embedding.modality")
_JOINED = _TABLE_PARTS + _MODALITY_PARTS
_UNUSED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
_OPTIONAL = ("vision_language_expert", "pooler", "contrastive_head", "matching_head", "masked_language_head")


Shape = tuple[int, ...]


def from_published(state: dict[str, Tensor], config: VLMoConfig) -> dict[str, Tensor]:
    """Our state from a published one; CheckpointError lists every name that is missing, unexpected or wrong-shaped.

    A DeepSpeed checkpoint's leading `module.` is ignored. The vocabulary is the one the state brings.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name not in _UNUSED}
    if config.positions == "relative":
        state.pop(_TEXT_POSITIONS, None)
    ours = _our_shapes(config, _rows_of(state, _OUTSIDE[_WORDS]))
    names = {name: _published_name(name) for name in ours}
    part_of = skeleton(config).part_of
    present = {part_of(name) for name, published in names.items() if published in state}
    kept = [name for name in ours if part_of(name) not in set(_OPTIONAL) - present]
    _require(state, _published_shapes(kept, ours, config))
    converted = {name: state[names[name]].reshape(ours[name]) for name in kept if name not in _JOINED}
    for published, parts in _joined(config).items():
        rows = state[published].split([_rows(ours[part]) for part in parts])
        # Copies, because files of tensors do not hold two views of one memory.
        converted |= {part: piece.reshape(ours[part]).clone() for part, piece in zip(parts, rows, strict=True)}
    return {name: converted[name] for name in kept}


def to_published(state: dict[str, Tensor], config: VLMoConfig) -> dict[str, Tensor]:
    """The published form of our state. The masked-image head has none and is left out."""
    part_of = skeleton(config).part_of
    state = {name: tensor for name, tensor in state.items() if part_of(name) != "masked_image_head"}
    ours = _our_shapes(config, _rows_of(state, _WORDS))
    present = {part_of(name) for name in state}
    kept = [name for name in ours if part_of(name) not in set(_OPTIONAL) - present]
    _require(state, {name: ours[name] for name in kept})
    published = {
        _published_name(name): state[name].reshape(_published_shape(name, ours[name], config))
        for name in kept
        if name not in _JOINED
    }
    for name, parts in _joined(config).items():
        published[name] = torch.cat([state[part].reshape(_rows(ours[part]), -1) for part in parts])
    return published


def _require(state: dict[str, Tensor], wanted: dict[str, Shape]) -> None:
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


def _joined(config: VLMoConfig) -> dict[str, tuple[str, ...]]:
    """The published tensors that hold several of ours, one under the other."""
    return {_MODALITY: _MODALITY_PARTS} | ({_TABLE: _TABLE_PARTS} if config.positions == "relative" else {})


def _our_shapes(config: VLMoConfig, vocabulary: int) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in skeleton(config, vocabulary).named_parameters()}


def _published_shapes(names: list[str], ours: dict[str, Shape], config: VLMoConfig) -> dict[str, Shape]:
    shapes = {_published_name(n): _published_shape(n, ours[n], config) for n in names if n not in _JOINED}
    for published, parts in _joined(config).items():
        shapes[published] = (sum(_rows(ours[part]) for part in parts), ours[parts[0]][-1])
    return shapes


def _published_name(ours: str) -> str:
    if ours in _JOINED:
        return _TABLE if ours in _TABLE_PARTS else _MODALITY
    if not ours.startswith("blocks."):
        return _translated(ours, _OUTSIDE)
    _, layer, inner = ours.split(".", 2)
    if inner.startswith("experts."):
        _, expert, module, last = inner.split(".")
        return f"transformer.blocks.{layer}.{_EXPERT[module].format(e=_EXPERTS[expert])}.{last}"
    return f"transformer.blocks.{layer}.{_translated(inner, _INSIDE)}"


def _translated(name: str, names: dict[str, str]) -> str:
    """A parameter by its own entry, or by its module's."""
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}"


def _published_shape(ours: str, shape: Shape, config: VLMoConfig) -> Shape:
    """Convolutions keep their kernel's shape, what is one for all rows a dimension for them, scalars none."""
    if ours == "image_embedding.patch.weight":
        return (shape[0], 3, config.patch_size, config.patch_size)
    if ours.startswith("contrastive_head.log_scale"):
        return ()
    if ours == "image_embedding.cls":
        return (1, 1, *shape)
    if ours == "image_embedding.positions":
        return (1, *shape)
    return shape


def _rows(shape: Shape) -> int:
    return shape[0] if len(shape) > 1 else 1


def _rows_of(state: dict[str, Tensor], name: str) -> int:
    """The vocabulary a state brings; any, where it brings none, as that is reported by name."""
    return len(state[name]) if name in state else 1
