"""ViLT's published checkpoints: conversions between the release's names (dandelin/ViLT), Hugging Face's, and ours.

Each task has its own checkpoint: a head that is wholly absent is left out of the result, and so is the second image's
modality vector, which only NLVR2's has. BERT's second sentence type is never used, but kept for an exact round trip.
Masked patches did not work in the release, and are in no checkpoint.

Hugging Face has one name, `classifier`, for the VQA and NLVR2 heads, and none for the matching head. Its
ViltForMaskedLM ties the decoder to the word embedding, which a file without a decoder implies. The epsilon of its norms
is in its config (`norm_eps` and `text_norm_eps` here). Both formats limit the longer side of images to int(1333 / 800 *
shorter side), which is 639 for 384; the paper's 640 is our default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pipeline.config.errors import CheckpointError
from pipeline.models.checkpoints import conversion
from pipeline.models.checkpoints.conversion import MASK, Format, State
from pipeline.models.checkpoints.vlmo import RELEASE
from pipeline.models.vilt import EXPERT

LONGER_TO_SHORTER = 1333 / 800  # sides of images, in the release and in Hugging Face's processor
_DECODER = "mlm_score.decoder"
_WORDS = f"vilt.embeddings.{RELEASE['text_embedding.word.weight']}"


class ViLTFormat(Format):
    """The `state_dict` of the release's Lightning file."""

    title: ClassVar = "ViLT"
    kinds: ClassVar = ("vilt",)
    outside: ClassVar = RELEASE
    layers: ClassVar = "transformer.blocks."
    layer: ClassVar = {
        "norm": "norm1",
        "attention.weight": "attn.qkv.weight",
        **{f"attention.{part}_bias": "attn.qkv.bias" for part in ("query", "key", "value")},
        "attention.projection": "attn.proj",
        f"experts.{EXPERT}.norm": "norm2",
        f"experts.{EXPERT}.expand": "mlp.fc1",
        f"experts.{EXPERT}.contract": "mlp.fc2",
    }
    expert: ClassVar = EXPERT
    optional: ClassVar = ("pooler", "itm_head", "mlm_head", "vqa_head", "nlvr2_head", "ranking_head")
    unused: ClassVar = r"text_embeddings\.position_ids$"

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        section = super().infer(state, overrides)
        return {"longest_side": int(LONGER_TO_SHORTER * section["image_size"])} | section


class ViLTHuggingFaceFormat(ViLTFormat):
    """The state of a ViltModel with or without a head."""

    config: ClassVar = conversion.ConfigFile(
        "vilt",
        keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "text_norm_eps": "layer_norm_eps"},
        computed={"hidden_act": ("gelu",), "num_channels": (3,), "num_images": (-1, 1, 2)},
        sizes=conversion.SIZES | conversion.IMAGE_SIZES | {"max_text_length": "max_position_embeddings"},
    )
    outside: ClassVar = {
        **{n: f"vilt.embeddings.{theirs}" for n, theirs in RELEASE.items() if n.startswith("text_embedding.")},
        **dict.fromkeys(conversion.MODALITIES, "vilt.embeddings.token_type_embeddings.weight"),
        **{n: t for n, t in conversion.hugging_face_image_names("vilt.embeddings").items() if n != MASK},
        "norm": "vilt.layernorm",
        "pooler.dense": "vilt.pooler.dense",
        "mlm_head.dense": RELEASE["mlm_head.dense"],
        "mlm_head.norm": RELEASE["mlm_head.norm"],
        "mlm_head.decode": _DECODER,
        "ranking_head.score": "rank_output",
        **{n: f"classifier.{t[-1]}" for n, t in RELEASE.items() if n.startswith(("vqa_head.", "nlvr2_head."))},
    }
    layers: ClassVar = "vilt.encoder.layer."
    prefix: ClassVar = "vilt."
    layer: ClassVar = {  # those of ViT
        name.replace("experts.vision", f"experts.{EXPERT}"): published
        for name, published in conversion.HUGGING_FACE_LAYER.items()
    }

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        state = self.prepare(state)
        if f"{_DECODER}.bias" in state and f"{_DECODER}.weight" not in state and _WORDS in state:
            # A copy, because files of tensors do not hold two views of one memory.
            state[f"{_DECODER}.weight"] = state[_WORDS].clone()
        return super().read(state, config, allowed)

    def write(self, state: State, config: Any) -> State:
        """Convert as for every format; CheckpointError for both the VQA and the NLVR2 head, which share one name."""
        if len({name.split(".")[0] for name in state} & {"vqa_head", "nlvr2_head"}) > 1:
            raise CheckpointError(
                "Hugging Face's ViLT has one classifier, and these weights have both a VQA and an NLVR2 head; "
                "export them in the release's format"
            )
        return super().write(state, config)

    def prepare(self, state: State) -> State:
        """Prepare as for every format, and drop the duplicate decoder bias of older MaskedLM files."""
        state = super().prepare(state)
        if (bias := state.pop("mlm_score.bias", None)) is not None:
            state.setdefault(f"{_DECODER}.bias", bias)
        return state

    def layout(self, config: Any, state: State) -> tuple[conversion.Names, dict[str, conversion.Shape]]:
        """Return the layout without the head that a published classifier is not: NLVR2's reads twice the width."""
        names, shapes = super().layout(config, state)
        if any(name.startswith("classifier.") for name in state):
            classifier = state.get("classifier.0.weight")
            is_nlvr2 = classifier is not None and classifier.shape[-1] == 2 * config.width
            other = "vqa_head." if is_nlvr2 else "nlvr2_head."
            names = {name: parts for name, parts in names.items() if not name.startswith(other)}
        return names, {name: shapes[name] for name in names}
