"""ViLT's published checkpoints: conversions between the release's names (dandelin/ViLT), Hugging Face's, and ours.

Each task has its own checkpoint: a head that is wholly absent is left out of the result, and so is the second image's
modality vector, which only NLVR2's has. BERT's second sentence type is never used, but kept for an exact round trip.

Hugging Face has one name, `classifier`, for the VQA and NLVR2 heads, and none for the matching head. Its
ViltForMaskedLM ties the decoder to the word embedding, which a file without a decoder implies. The epsilon of its norms
is in its config (`norm_eps` and `text_norm_eps` here). Both formats limit the longer side of images to int(1333 / 800 *
shorter side), which is 639 for 384; the paper's 640 is our default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ViLTConfig
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import (
    IMAGE_SIZES,
    SIZES,
    ConfigFile,
    Names,
    Shape,
    assumed_heads,
    from_named,
    layer_count,
    published_names,
    require,
    to_named,
    translated,
)
from pipeline.models.model import HeadConfig
from pipeline.models.vilt import EXPERT

# Ours on the left: parameters, or their modules.
_RELEASE = {
    "text_embedding.word.weight": "text_embeddings.word_embeddings.weight",
    "text_embedding.token_type": "text_embeddings.token_type_embeddings.weight",
    "text_embedding.positions": "text_embeddings.position_embeddings.weight",
    "text_embedding.norm": "text_embeddings.LayerNorm",
    "image_embedding.patch": "transformer.patch_embed.proj",
    "image_embedding.cls": "transformer.cls_token",
    "image_embedding.positions": "transformer.pos_embed",
    "norm": "transformer.norm",
    "pooler.dense": "pooler.dense",
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
_RELEASE_LAYER = {
    "norm": "norm1",
    "attention.weight": "attn.qkv.weight",
    "attention.projection": "attn.proj",
    f"experts.{EXPERT}.norm": "norm2",
    f"experts.{EXPERT}.expand": "mlp.fc1",
    f"experts.{EXPERT}.contract": "mlp.fc2",
}
_EMBEDDINGS = "vilt.embeddings"
_TEXT = f"{_EMBEDDINGS}.text_embeddings"
_DECODER = "mlm_score.decoder"
_HUGGING_FACE = {
    "text_embedding.word.weight": f"{_TEXT}.word_embeddings.weight",
    "text_embedding.token_type": f"{_TEXT}.token_type_embeddings.weight",
    "text_embedding.positions": f"{_TEXT}.position_embeddings.weight",
    "text_embedding.norm": f"{_TEXT}.LayerNorm",
    "image_embedding.patch": f"{_EMBEDDINGS}.patch_embeddings.projection",
    "image_embedding.cls": f"{_EMBEDDINGS}.cls_token",
    "image_embedding.positions": f"{_EMBEDDINGS}.position_embeddings",
    "norm": "vilt.layernorm",
    "pooler.dense": "vilt.pooler.dense",
    "mlm_head.dense": "mlm_score.transform.dense",
    "mlm_head.norm": "mlm_score.transform.LayerNorm",
    "mlm_head.decode": _DECODER,
    "ranking_head.score": "rank_output",
} | {
    f"{head}.{module}": f"classifier.{number}"
    for head in ("vqa_head", "nlvr2_head")
    for module, number in (("expand", 0), ("norm", 1), ("classify", 3))
}
_UNUSED = ("text_embeddings.position_ids",)
_SECOND = "image_embedding.second"
_MODALITIES = ("text_embedding.modality", "image_embedding.modality", _SECOND)
_MODALITY = "token_type_embeddings.weight"
_BIASES = ("attention.query_bias", "attention.key_bias", "attention.value_bias")
# Parts that a checkpoint may lack, and those without a name in one or both formats: masked patches did not work in the
# release, and are in no checkpoint.
OPTIONAL = ("pooler", "itm_head", "mlm_head", "vqa_head", "nlvr2_head", "ranking_head")
UNPUBLISHED = ("mim_head",)
UNPUBLISHED_BY_HUGGING_FACE = (*UNPUBLISHED, "itm_head")
LONGER_TO_SHORTER = 1333 / 800  # sides of images, in the release and in Hugging Face's processor

CONFIG = ConfigFile(
    "vilt",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "text_norm_eps": "layer_norm_eps"},
    computed={"hidden_act": ("gelu",), "num_channels": (3,), "num_images": (-1, 1, 2)},
    sizes=SIZES | IMAGE_SIZES | {"max_text_length": "max_position_embeddings"},
)


T = TypeVar("T")
Naming = Callable[[str], tuple[str, ...]]  # one of our parameters -> the published tensors it is, row upon row


def infer_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a state with the release's names from shapes; keys in `overrides` take precedence.

    Raises ConfigError for a state of another model.
    """
    return _section(state, overrides, _RELEASE, r"transformer\.blocks\.(\d+)\.mlp\.fc1\.weight")


def infer_hugging_face_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a state with Hugging Face's names, as `infer_section` does."""
    return _section(
        _full_names(state), overrides, _HUGGING_FACE, r"vilt\.encoder\.layer\.(\d+)\.intermediate.dense.weight"
    )


def from_published(state: Mapping[str, Tensor], config: ViLTConfig, allowed: Collection[str] = ()) -> dict[str, Tensor]:
    """Convert the `state_dict` of the release's Lightning file to our state.

    The numbers of words and answers are the state's own. Names that match `allowed` (see `require`) may differ, and are
    left out. Raises CheckpointError listing every missing, unexpected or wrong-shaped tensor.
    """
    shapes = _shapes(config, state, _RELEASE, "vqa_classifier.3.bias", _has_second(state, _MODALITY))
    return _read(_used(state), shapes, _release_names, config, allowed)


def to_published(state: Mapping[str, Tensor], config: ViLTConfig) -> dict[str, Tensor]:
    """Convert to the `state_dict` of the release's Lightning file, without `UNPUBLISHED` parts."""
    return _write(_without(state, UNPUBLISHED), _release_names, config)


def from_hugging_face(
    state: Mapping[str, Tensor], config: ViLTConfig, allowed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Convert the state of a ViltModel with or without a head to ours; errors as in `from_published`."""
    state = _full_names(_used(state))
    words = _HUGGING_FACE["text_embedding.word.weight"]
    if f"{_DECODER}.bias" in state and f"{_DECODER}.weight" not in state and words in state:
        # A copy, because files of tensors do not hold two views of one memory.
        state[f"{_DECODER}.weight"] = state[words].clone()
    classifier = state.get("classifier.0.weight")
    reasons = classifier is not None and classifier.shape[-1] == 2 * config.width
    second = _has_second(state, f"{_EMBEDDINGS}.{_MODALITY}")
    shapes = _shapes(config, state, _HUGGING_FACE, "classifier.3.bias", second)
    nameless = ("vqa_head" if reasons else "nlvr2_head", *UNPUBLISHED_BY_HUGGING_FACE)
    return _read(state, _without(shapes, nameless), _hugging_face_names, config, allowed)


def to_hugging_face(state: Mapping[str, Tensor], config: ViLTConfig) -> dict[str, Tensor]:
    """Convert to Hugging Face's names, without `UNPUBLISHED_BY_HUGGING_FACE` parts.

    Raises CheckpointError for a state with both the VQA and the NLVR2 head, which share one name there.
    """
    heads = {name.split(".")[0] for name in state} & {"vqa_head", "nlvr2_head"}
    if len(heads) > 1:
        raise CheckpointError(
            "Hugging Face's ViLT has one classifier, and these weights have both a VQA and an NLVR2 head; "
            "export them in the release's format"
        )
    return _write(_without(state, UNPUBLISHED_BY_HUGGING_FACE), _hugging_face_names, config)


def _read(
    state: Mapping[str, Tensor],
    shapes: dict[str, Shape],
    naming: Naming,
    config: ViLTConfig,
    allowed: Collection[str],
) -> dict[str, Tensor]:
    """Convert the tensors of `shapes`, without the heads that are wholly absent from the published state."""
    absent = set(OPTIONAL) - {n.split(".")[0] for n in shapes if not state.keys().isdisjoint(naming(n))}
    shapes = _without(shapes, tuple(absent))
    names, joined = _layout(shapes, naming)
    joined_shapes = {published: _joined_shape(parts, shapes) for published, parts in joined.items()}
    converted = from_named(state, names, shapes, config.patch_size, allowed, joined_shapes)
    for published, parts in joined.items():
        if published in state and tuple(state[published].shape) == joined_shapes[published]:
            # Copies, because files of tensors do not hold two views of one memory.
            pieces = state[published].chunk(len(parts))
            converted |= {p: piece.reshape(shapes[p]).clone() for p, piece in zip(parts, pieces, strict=True)}
    return {name: converted[name] for name in shapes if name in converted}


def _write(state: Mapping[str, Tensor], naming: Naming, config: ViLTConfig) -> dict[str, Tensor]:
    shapes = _shapes(config, state, {}, "vqa_head.classify.bias", _SECOND in state)
    present = {name.split(".")[0] for name in state}
    shapes = _without(shapes, tuple(set(OPTIONAL) - present))
    require(state, shapes)
    names, joined = _layout(shapes, naming)
    published = to_named(state, names, shapes, config.patch_size)
    for name, parts in joined.items():
        published[name] = torch.cat([state[part] for part in parts]).reshape(_joined_shape(parts, shapes))
    return published


def _layout(shapes: Mapping[str, Shape], naming: Naming) -> tuple[Names, dict[str, list[str]]]:
    """Return published names of our parameters, and the published tensors that hold several of them as rows."""
    named = {name: naming(name) for name in shapes}
    holding: dict[str, list[str]] = {}
    for name, published in named.items():
        holding.setdefault(published[0], []).append(name)
    joined = {published: sorted(names, key=_row) for published, names in holding.items() if len(names) > 1}
    return {name: published for name, published in named.items() if published[0] not in joined}, joined


def _row(name: str) -> int:
    """Return the row of a parameter in its joined tensor."""
    return _MODALITIES.index(name) if name in _MODALITIES else [name.endswith(bias) for bias in _BIASES].index(True)


def _joined_shape(parts: list[str], shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape of a joined tensor: modalities are rows of a table, biases are concatenated."""
    (width,) = shapes[parts[0]]
    return (len(parts), width) if parts[0] in _MODALITIES else (len(parts) * width,)


def _release_names(parameter: str) -> tuple[str, ...]:
    if parameter in _MODALITIES:
        return (_MODALITY,)
    if not parameter.startswith("blocks."):
        return (translated(parameter, _RELEASE),)
    _, layer, inner = parameter.split(".", 2)
    name = "attn.qkv.bias" if inner in _BIASES else translated(inner, _RELEASE_LAYER)
    return (f"transformer.blocks.{layer}.{name}",)


def _hugging_face_names(parameter: str) -> tuple[str, ...]:
    if parameter in _MODALITIES:
        return (f"{_EMBEDDINGS}.{_MODALITY}",)
    # The layers of ViT and ViLT have the same names.
    return published_names(
        parameter.replace(f"experts.{EXPERT}", "experts.vision"), _HUGGING_FACE, "vilt.encoder.layer."
    )


def _shapes(
    config: ViLTConfig, state: Mapping[str, Tensor], names: Mapping[str, str], answers: str, second: bool
) -> dict[str, Shape]:
    """Return our shapes with every optional head, with the numbers of words and answers in `state` (default 1).

    `second` says whether the checkpoint has the second image's modality vector.
    """
    words = names.get("text_embedding.word.weight", "text_embedding.word.weight")
    num_words, num_answers = (len(state[name]) if name in state else 1 for name in (words, answers))
    model = skeleton(config, num_words, HeadConfig(answers=num_answers, reasoning=True, ranking=True))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes if second else {name: shape for name, shape in shapes.items() if name != _SECOND}


def _has_second(state: Mapping[str, Tensor], modality: str) -> bool:
    return modality in state and len(state[modality]) == len(_MODALITIES)


def _without(named: Mapping[str, T], parts: Collection[str]) -> dict[str, T]:
    """Return the entries of all other parts. The mask embedding belongs to the masked-image head."""
    hidden = {"image_embedding.mask"} if "mim_head" in parts else set()
    return {name: value for name, value in named.items() if name.split(".")[0] not in parts and name not in hidden}


def _used(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.removeprefix("vilt.embeddings.") not in _UNUSED}


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix `vilt.` that ViltModel lacks, and drop the duplicate decoder bias of older MaskedLM files."""
    if any(name.startswith("vilt.") for name in state):
        state = dict(state)
        if (bias := state.pop("mlm_score.bias", None)) is not None:
            state.setdefault(f"{_DECODER}.bias", bias)
        return state
    return {f"vilt.{name}": tensor for name, tensor in state.items()}


def _section(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any], names: Mapping[str, str], expand: str
) -> dict[str, Any]:
    """Infer the `model` section; `expand` matches the names of the first feed-forward matrices."""
    patch = state.get(f"{names['image_embedding.patch']}.weight")
    positions, texts = (state.get(names[f"{modality}_embedding.positions"]) for modality in ("image", "text"))
    first = next((state[name] for name in state if re.fullmatch(expand, name)), None)
    if patch is None or positions is None or texts is None or first is None:
        raise ConfigError("no ViLT checkpoint: the patch projection, positions or layers are missing")
    width, side = len(patch), patch.shape[-1]
    section = {
        "kind": "vilt",
        "width": width,
        "layers": layer_count(state, expand),
        "heads": assumed_heads(width, overrides),
        "mlp_ratio": len(first) // width,
        "patch_size": side,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * side,
        "max_text_length": len(texts),
    } | dict(overrides)
    return {"longest_side": int(LONGER_TO_SHORTER * section["image_size"])} | section
