"""BERT's weights (Hugging Face's BertModel, BertForPreTraining, BertForMaskedLM) as the start of ImageBERT, and back.

BERT has no regions: the parts that read or predict them, and the matching head, are absent from the result, and a stage
that starts from BERT draws them at random. BERT's pooler and next-sentence head are unused in ImageBERT and dropped.
BERT ties the masked-word decoder to the word embedding. In ImageBERT the decoder starts as a copy and is trained
separately, so that Hugging Face's classes read exported weights only with `tie_word_embeddings=False`.

Positions beyond `model.max_text_length` are cut off (BERT has 512), which is all that a round trip loses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageBERTConfig
from pipeline.models import skeleton
from pipeline.models.checkpoints.conversion import (
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
from pipeline.models.resize import cut_text_positions

_PREFIX, _PREDICTIONS = "bert.", "cls.predictions."
_HEAD = {
    "mlm_head.dense": f"{_PREDICTIONS}transform.dense",
    "mlm_head.norm": f"{_PREDICTIONS}transform.LayerNorm",
    "mlm_head.decode.weight": f"{_PREDICTIONS}decoder.weight",
    "mlm_head.decode.bias": f"{_PREDICTIONS}bias",
}
_WORDS = f"{_PREFIX}embeddings.word_embeddings.weight"
_POSITIONS = f"{_PREFIX}embeddings.position_embeddings.weight"
_DECODER, _BIAS = f"{_PREDICTIONS}decoder.weight", f"{_PREDICTIONS}bias"
_BIAS_AGAIN = f"{_PREDICTIONS}decoder.bias"  # the same tensor, saved twice by some versions of transformers
_UNUSED = (f"{_PREFIX}pooler.", "cls.seq_relationship.", f"{_PREFIX}embeddings.position_ids", _BIAS_AGAIN)
_TRUNK, _LANGUAGE = ("text_embedding.", "encoder."), "mlm_head."

MAX_TEXT = ImageBERTConfig.model_fields["max_text_length"].default

CONFIG = ConfigFile(
    "bert",
    keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    computed={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    sizes=SIZES,
)


def infer_section(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the `model` section of a published state from tensor shapes; keys in `overrides` take precedence.

    Sizes that BERT lacks, such as those of regions, are ImageBERT's defaults. Raises ConfigError for a state of another
    model.
    """
    state = _full_names(state)
    expand = state.get(f"{_PREFIX}encoder.layer.0.intermediate.dense.weight")
    if _WORDS not in state or _POSITIONS not in state or expand is None:
        raise ConfigError("no BERT checkpoint of Hugging Face: the word embedding, positions or layer 0 are missing")
    width = state[_WORDS].shape[1]
    return {
        "kind": "imagebert",
        "width": width,
        "layers": layer_count(state, r"bert\.encoder\.layer\.(\d+)\."),
        "heads": assumed_heads(width, overrides),
        "mlp_ratio": len(expand) // width,
        "max_text_length": min(len(state[_POSITIONS]), MAX_TEXT),
    } | dict(overrides)


def from_hugging_face(
    state: Mapping[str, Tensor], config: ImageBERTConfig, allowed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Convert a published state to ours.

    Names that match `allowed` (see `require`) may differ, and are left out. Raises CheckpointError listing every
    missing, unexpected or wrong-shaped tensor, ConfigError for a `max_text_length` above the number of BERT's
    positions.
    """
    state = {name: tensor for name, tensor in _full_names(state).items() if not name.startswith(_UNUSED)}
    if _BIAS in state and _WORDS in state:  # files may omit the decoder, which is tied to the word embedding
        # A copy, because files of tensors do not hold one memory twice.
        state[_DECODER] = state.get(_DECODER, state[_WORDS]).clone()
    if _POSITIONS in state:
        try:
            state[_POSITIONS] = cut_text_positions(state[_POSITIONS], config.max_text_length)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return from_named(state, *_layout(config, len(state[_WORDS]) if _WORDS in state else 1, _BIAS in state), allowed)


def to_hugging_face(state: Mapping[str, Tensor], config: ImageBERTConfig) -> dict[str, Tensor]:
    """Convert the parts that BERT has to BertForMaskedLM's names."""
    vocabulary = len(state["text_embedding.word_embeddings.weight"])
    names, shapes = _layout(config, vocabulary, any(name.startswith(_LANGUAGE) for name in state))
    published = to_named(state, names, shapes)
    return published | ({_BIAS_AGAIN: published[_BIAS].clone()} if _BIAS in published else {})


def _layout(config: ImageBERTConfig, vocabulary: int, with_head: bool) -> tuple[Names, dict[str, Shape]]:
    """Return the published names and our shapes of the parameters that BERT has."""
    parts = (*_TRUNK, _LANGUAGE) if with_head else _TRUNK
    shapes = {n: tuple(p.shape) for n, p in skeleton(config, vocabulary).named_parameters() if n.startswith(parts)}
    names = {
        name: published_names(name, _HEAD, "")
        if name.startswith(_LANGUAGE)
        else (_PREFIX + name.replace("text_embedding.", "embeddings."),)
        for name in shapes
    }
    return names, shapes


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix `bert.` that BertModel lacks, and rename older files' LayerNorm gamma and beta."""
    modern = {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): tensor for name, tensor in state.items()}
    if any(name.startswith(_PREFIX) for name in modern):
        return modern
    return {name if name.startswith("cls.") else _PREFIX + name: tensor for name, tensor in modern.items()}
