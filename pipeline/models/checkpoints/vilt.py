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
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ViLTConfig
from pipeline.models.checkpoints.conversion import (
    HUGGING_FACE_LAYER,
    IMAGE_SIZES,
    MODALITIES,
    SIZES,
    ConfigFile,
    assumed_heads,
    from_named,
    layer_count,
    published_layout,
    published_names,
    require,
    to_named,
)
from pipeline.models.checkpoints.vlmo import RELEASE
from pipeline.models.vilt import EXPERT

# Ours on the left: parameters, or their modules.
_RELEASE_LAYER = {
    "norm": "norm1",
    "attention.weight": "attn.qkv.weight",
    **{f"attention.{part}_bias": "attn.qkv.bias" for part in ("query", "key", "value")},
    "attention.projection": "attn.proj",
    f"experts.{EXPERT}.norm": "norm2",
    f"experts.{EXPERT}.expand": "mlp.fc1",
    f"experts.{EXPERT}.contract": "mlp.fc2",
}
_EMBEDDINGS, _DECODER = "vilt.embeddings", "mlm_score.decoder"
_HUGGING_FACE = {
    **{ours: f"{_EMBEDDINGS}.{theirs}" for ours, theirs in RELEASE.items() if ours.startswith("text_embedding.")},
    **dict.fromkeys(MODALITIES, f"{_EMBEDDINGS}.token_type_embeddings.weight"),
    "image_embedding.patch": f"{_EMBEDDINGS}.patch_embeddings.projection",
    "image_embedding.cls": f"{_EMBEDDINGS}.cls_token",
    "image_embedding.positions": f"{_EMBEDDINGS}.position_embeddings",
    "norm": "vilt.layernorm",
    "pooler.dense": "vilt.pooler.dense",
    "mlm_head.dense": RELEASE["mlm_head.dense"],
    "mlm_head.norm": RELEASE["mlm_head.norm"],
    "mlm_head.decode": _DECODER,
    "ranking_head.score": "rank_output",
} | {
    f"{head}.{module}": f"classifier.{number}"
    for head in ("vqa_head", "nlvr2_head")
    for module, number in (("expand", 0), ("norm", 1), ("classify", 3))
}
# The layers of ViT and ViLT have the same names.
_HUGGING_FACE_LAYER = {ours.replace("experts.vision", f"experts.{EXPERT}"): n for ours, n in HUGGING_FACE_LAYER.items()}
_release_names = partial(
    published_names, outside=RELEASE, layer_prefix="transformer.blocks.", layer_names=_RELEASE_LAYER
)
_hugging_face_names = partial(
    published_names, outside=_HUGGING_FACE, layer_prefix="vilt.encoder.layer.", layer_names=_HUGGING_FACE_LAYER
)
_UNUSED = ("text_embeddings.position_ids", f"{_EMBEDDINGS}.text_embeddings.position_ids")
# Parts that a checkpoint may lack, and those without a name in one or both formats: masked patches did not work in the
# release, and are in no checkpoint.
OPTIONAL = ("pooler", "itm_head", "mlm_head", "vqa_head", "nlvr2_head", "ranking_head")
UNPUBLISHED = ("mim_head", "image_embedding.mask")  # beginnings of names
UNPUBLISHED_BY_HUGGING_FACE = (*UNPUBLISHED, "itm_head")
LONGER_TO_SHORTER = 1333 / 800  # sides of images, in the release and in Hugging Face's processor

CONFIG = ConfigFile(
    "vilt",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "text_norm_eps": "layer_norm_eps"},
    computed={"hidden_act": ("gelu",), "num_channels": (3,), "num_images": (-1, 1, 2)},
    sizes=SIZES | IMAGE_SIZES | {"max_text_length": "max_position_embeddings"},
)


def infer_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a state with the release's names from shapes; keys in `overrides` take precedence.

    Raises ConfigError for a state of another model.
    """
    return _section(state, overrides, RELEASE, r"transformer\.blocks\.(\d+)\.mlp\.fc1\.weight")


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
    state = {name: tensor for name, tensor in state.items() if name not in _UNUSED}
    return from_named(state, *published_layout(config, state, _release_names, OPTIONAL), allowed)


def to_published(state: Mapping[str, Tensor], config: ViLTConfig) -> dict[str, Tensor]:
    """Convert to the `state_dict` of the release's Lightning file, without `UNPUBLISHED` parts."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith(UNPUBLISHED)}
    names, shapes = published_layout(config, state, _release_names, OPTIONAL)
    require(state, shapes)
    return to_named(state, names, shapes)


def from_hugging_face(
    state: Mapping[str, Tensor], config: ViLTConfig, allowed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Convert the state of a ViltModel with or without a head to ours; errors as in `from_published`."""
    state = {name: tensor for name, tensor in _full_names(state).items() if name not in _UNUSED}
    words = _HUGGING_FACE["text_embedding.word.weight"]
    if f"{_DECODER}.bias" in state and f"{_DECODER}.weight" not in state and words in state:
        # A copy, because files of tensors do not hold two views of one memory.
        state[f"{_DECODER}.weight"] = state[words].clone()
    classifier = state.get("classifier.0.weight")
    reads_two_images = classifier is not None and classifier.shape[-1] == 2 * config.width
    nameless = ("vqa_head" if reads_two_images else "nlvr2_head", "itm_head")
    return from_named(state, *published_layout(config, state, _hugging_face_names, OPTIONAL, nameless), allowed)


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
    state = {name: tensor for name, tensor in state.items() if not name.startswith(UNPUBLISHED_BY_HUGGING_FACE)}
    names, shapes = published_layout(config, state, _hugging_face_names, OPTIONAL, ("itm_head",))
    require(state, shapes)
    return to_named(state, names, shapes)


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
