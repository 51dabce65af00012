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
from typing import Any, ClassVar

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageBERTConfig
from pipeline.models.checkpoints.conversion import SIZES, ConfigFile, Format, State, assumed_heads, layer_count
from pipeline.models.resize import cut_text_positions

_WORDS, _POSITIONS = (f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
_DECODER, _BIAS = "cls.predictions.decoder.weight", "cls.predictions.bias"
_BIAS_AGAIN = "cls.predictions.decoder.bias"  # the same tensor, saved twice by some versions of transformers
MAX_TEXT = ImageBERTConfig.model_fields["max_text_length"].default


class BERTFormat(Format):
    title: ClassVar = "BERT"
    kinds: ClassVar = ("imagebert",)
    config: ClassVar = ConfigFile(
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
    outside: ClassVar = {
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.norm": "cls.predictions.transform.LayerNorm",
        "mlm_head.decode.weight": _DECODER,
        "mlm_head.decode.bias": _BIAS,
    }
    layers: ClassVar = "bert.encoder.layer."
    optional: ClassVar = ("mlm_head",)
    prefix: ClassVar = "bert."
    unprefixed: ClassVar = ("cls.",)
    unused: ClassVar = (
        r"^bert\.pooler\.|^cls\.seq_relationship\.|^bert\.embeddings\.position_ids|^cls\.predictions\.decoder\.bias$"
    )

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Infer the sizes that BERT has; those that it lacks, such as regions', are ImageBERT's defaults."""
        state = self.prepare(state)
        expand = state.get(f"{self.layers}0.intermediate.dense.weight")
        if _WORDS not in state or _POSITIONS not in state or expand is None:
            raise ConfigError("no BERT checkpoint: the word embedding, positions or layer 0 are missing")
        width = state[_WORDS].shape[1]
        return {
            "kind": "imagebert",
            "width": width,
            "layers": layer_count(state, self.layers),
            "heads": assumed_heads(width, overrides),
            "mlp_ratio": len(expand) // width,
            "max_text_length": min(len(state[_POSITIONS]), MAX_TEXT),
        } | dict(overrides)

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        """Convert as for every format; ConfigError for a `max_text_length` above the number of BERT's positions."""
        state = self.prepare(state)
        if _BIAS in state and _WORDS in state:  # files may omit the decoder, which is tied to the word embedding
            # A copy, because files of tensors do not hold one memory twice.
            state[_DECODER] = state.get(_DECODER, state[_WORDS]).clone()
        if _POSITIONS in state:
            state[_POSITIONS] = cut_text_positions(state[_POSITIONS], config.max_text_length)
        return super().read(state, config, allowed)

    def write(self, state: State, config: Any) -> State:
        published = super().write(state, config)
        return published | ({_BIAS_AGAIN: published[_BIAS].clone()} if _BIAS in published else {})

    def prepare(self, state: State) -> State:
        """Prepare as for every format, and rename older files' LayerNorm gamma and beta."""
        state = super().prepare(state)
        return {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): state[name] for name in state}

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return the published names: ImageBERT's encoder and text embedding are Hugging Face's own modules."""
        if parameter.startswith(("text_embedding.", "encoder.")):
            return ("bert." + parameter.replace("text_embedding.", "embeddings."),)
        return super().names(parameter)
