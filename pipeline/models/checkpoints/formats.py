"""Published checkpoint formats by the names that `mome import` and `mome export` know them by.

Shapes: R rows of a table, H heads, g grid side, T longest text.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import count, takewhile
from typing import Any, ClassVar

import torch

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageBERTConfig
from pipeline.models.checkpoints import conversion
from pipeline.models.checkpoints.conversion import (
    HEAD_WIDTH,
    MASK,
    MODALITIES,
    SECOND,
    Format,
    Names,
    Shape,
    State,
    Table,
)
from pipeline.models.encoders import VILT_EXPERT

log = logging.getLogger(__name__)

HEADS = (("heads", "width"), ("text_heads", "text_width"))  # of CLIP's towers
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
# VLMo's release (microsoft/unilm, vlmo) outside the layers, which grew from ViLT's (dandelin/ViLT); ours on the left.
RELEASE = {
    "text_embedding.word": "text_embeddings.word_embeddings",
    "text_embedding.token_type": "text_embeddings.token_type_embeddings.weight",
    "text_embedding.positions": TEXT_POSITIONS,
    "text_embedding.norm": "text_embeddings.LayerNorm",
    "image_embedding.patch": "transformer.patch_embed.proj",
    "image_embedding.cls": "transformer.cls_token",
    "image_embedding.positions": "transformer.pos_embed",
    **dict.fromkeys(("positions.image", "positions.cross", "positions.text"), "relative_position_bias_table"),
    **dict.fromkeys(MODALITIES, "token_type_embeddings.weight"),
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
    "mlm_head.decode": "mlm_score.decoder",
    "mlm_head.decode.bias": "mlm_score.bias",
    "ranking_head.score": "rank_output",
} | {
    f"{head}_head.{module}": f"{head}_classifier.{number}"
    for head in ("vqa", "nlvr2")
    for module, number in (("expand", 0), ("norm", 1), ("classify", 3))
}
HUGGING_FACE_IMAGE = {  # the image embedding of its ViT, BEiT and ViLT
    "image_embedding.patch": "embeddings.patch_embeddings.projection",
    "image_embedding.cls": "embeddings.cls_token",
    MASK: "embeddings.mask_token",
    "image_embedding.positions": "embeddings.position_embeddings",
}


class VLMoFormat(Format):
    """VLMo's release; position indices and, with a relative table, the absolute text positions are unused."""

    title: ClassVar = "VLMo"
    kinds: ClassVar = ("vlmo",)
    outside: ClassVar[Table] = RELEASE
    layers: ClassVar = "transformer.blocks."
    layer: ClassVar[Table] = {
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
        "vision_language_expert", "pooler", "itc_head", "itm_head", "mlm_head", "vqa_head", "nlvr2_head",
    )  # fmt: skip
    unused: ClassVar = r"^(text_|text_imag_)?relative_position_index$|^text_embeddings\.position_ids$"
    tables: ClassVar = (RELEASE["positions.image"],)

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        section = super().infer(state, overrides)
        contrasts = [name for name in state if name.startswith(("itc_", "logit_"))]
        if contrasts and not any(name.startswith(("itc_vl_", "logit_vl_")) for name in contrasts):
            section["contrasts"] = 1  # of retrieval; pretraining has two
        table = state.get(self.tables[0])
        if table is None or {"image_size", "max_text_length"} <= overrides.keys():
            return section | dict(overrides)
        # The rows of the table are (2g - 1)² + 3 of images and 2 T + 2 of texts, which do not show both sizes.
        texts = [196]  # of every published relative table
        texts += [len(state[name]) for name in ("text_relative_position_index", TEXT_POSITIONS) if name in state]
        for text in [overrides["max_text_length"]] if "max_text_length" in overrides else texts:
            distances = len(table) - 5 - 2 * text
            side = round(max(distances, 0) ** 0.5)
            if side % 2 and side**2 == distances:
                sizes = {"image_size": (side + 1) // 2 * section["patch_size"], "max_text_length": text}
                return section | sizes | dict(overrides)
        raise ConfigError(
            f"{self.tables[0]} has {len(table)} rows, which fit several text lengths and image sizes; "
            "give image_size=… and max_text_length=…"
        )

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        if config.positions == "relative":
            state = {name: tensor for name, tensor in state.items() if name != TEXT_POSITIONS}
        return super().read(state, config, allowed)


class ViLTFormat(Format):
    """The `state_dict` of the release's Lightning file.

    Masked patches did not work in the release, and are in no checkpoint. The longer side of images is at most int(1333
    / 800 * shorter side), which is 639 for 384, as in Hugging Face's processor; the paper's 640 is our default.
    """

    title: ClassVar = "ViLT"
    kinds: ClassVar = ("vilt",)
    outside: ClassVar[Table] = RELEASE
    layers: ClassVar = "transformer.blocks."
    layer: ClassVar[Table] = {
        "norm": "norm1",
        "attention.weight": "attn.qkv.weight",
        **{f"attention.{part}_bias": "attn.qkv.bias" for part in ("query", "key", "value")},
        "attention.projection": "attn.proj",
        f"experts.{VILT_EXPERT}.norm": "norm2",
        f"experts.{VILT_EXPERT}.expand": "mlp.fc1",
        f"experts.{VILT_EXPERT}.contract": "mlp.fc2",
    }
    shown: ClassVar = (*conversion.POSITIONED, f"blocks.0.experts.{VILT_EXPERT}.expand.weight")
    optional: ClassVar = ("pooler", "itm_head", "mlm_head", "vqa_head", "nlvr2_head", "ranking_head")
    unused: ClassVar = r"text_embeddings\.position_ids$"


class ViLTHuggingFaceFormat(ViLTFormat):
    """The state of a ViltModel with or without a head: `classifier` is VQA's or NLVR2's; matching has no name."""

    outside: ClassVar[Table] = {
        **{n: f"embeddings.{theirs}" for n, theirs in RELEASE.items() if n.startswith("text_embedding.")},
        **dict.fromkeys(MODALITIES, "embeddings.token_type_embeddings.weight"),
        **{n: theirs for n, theirs in HUGGING_FACE_IMAGE.items() if n != MASK},
        "norm": "layernorm",
        **{n: RELEASE[n] for n in ("pooler.dense", "ranking_head.score", "mlm_head.dense", "mlm_head.norm")},
        "mlm_head.decode": RELEASE["mlm_head.decode"],
        **{n: f"classifier.{t[-1]}" for n, t in RELEASE.items() if n.startswith(("vqa_head.", "nlvr2_head."))},
    }
    layers: ClassVar = Format.layers
    prefix: ClassVar = "vilt."
    model_type: ClassVar = "vilt"
    image_processor: ClassVar = "ViltImageProcessor"
    classes: ClassVar = {
        "": "ViltModel",
        "mlm_head": "ViltForMaskedLM",
        "vqa_head": "ViltForQuestionAnswering",
        "nlvr2_head": "ViltForImagesAndTextClassification",
        "ranking_head": "ViltForImageAndTextRetrieval",
    }
    unprefixed: ClassVar = ("mlm_score.", "rank_output.", "classifier.")
    layer: ClassVar[Table] = {
        name.replace("experts.vision", f"experts.{VILT_EXPERT}"): theirs for name, theirs in Format.layer.items()
    }
    keys: ClassVar = Format.keys | {"text_norm_eps": "layer_norm_eps"}
    computed: ClassVar = Format.computed | {"num_images": (-1, 1, 2)}
    sizes: ClassVar = Format.sizes | {"max_text_length": "max_position_embeddings"}
    older: ClassVar = ((r"^mlm_score\.bias$", "mlm_score.decoder.bias"),)
    is_tied: ClassVar = True

    def layout(self, config: Any, state: State) -> tuple[Names, dict[str, Shape]]:
        """Return the layout without the head that a published classifier is not: NLVR2's reads twice the width.

        CheckpointError for a state of ours with both the VQA and the NLVR2 head, which share one name.
        """
        if len({name.split(".")[0] for name in state} & {"vqa_head", "nlvr2_head"}) > 1:
            raise CheckpointError(
                "Hugging Face's ViLT has one classifier, and these weights have both a VQA and an NLVR2 head; "
                "export them in the release's format"
            )
        names, shapes = super().layout(config, state)
        if any(name.startswith("classifier.") for name in state):
            classifier = state.get("classifier.0.weight")
            is_nlvr2 = classifier is not None and classifier.shape[-1] == 2 * config.width
            other = "vqa_head." if is_nlvr2 else "nlvr2_head."
            names = {name: parts for name, parts in names.items() if not name.startswith(other)}
        return names, {name: shapes[name] for name in names}

    def hugging_face_config(self, state: State, config: Any, num_words: int, labels: Sequence[str]) -> dict[str, Any]:
        written = super().hugging_face_config(state, config, num_words, labels)
        num_images = 2 if "nlvr2_head.expand.weight" in state else 1
        return written | {"num_images": num_images, "modality_type_vocab_size": 2 + (SECOND in state)}


class ViTFormat(Format):
    """Hugging Face's ViTModel and ViTForImageClassification; the pooler is unused.

    Its LayerNorms have an epsilon of 1e-12 (`model.norm_eps`), the JAX release's and our default 1e-6: outputs of a
    trained ViT differ by less than 1e-5.
    """

    title: ClassVar = "ViT"
    kinds: ClassVar = ("vit",)
    outside: ClassVar[Table] = HUGGING_FACE_IMAGE | {"norm": "layernorm", "classification_head.classify": "classifier"}
    optional: ClassVar = ("classification_head",)
    prefix: ClassVar = "vit."
    model_type: ClassVar = "vit"
    image_processor: ClassVar = "ViTImageProcessor"
    classes: ClassVar = {"": "ViTModel", "classification_head": "ViTForImageClassification"}
    unprefixed: ClassVar = ("classifier.",)
    unused: ClassVar = r"^vit\.pooler\.dense\."
    resample: ClassVar = conversion.BILINEAR


# The final norm's names in a BeitModel without a pooler, in BeitForMaskedImageModeling, and in a BeitModel with one.
NORMS = ("beit.layernorm", "layernorm", "beit.pooler.layernorm")
SHARED_TABLE = "beit.encoder.relative_position_bias.relative_position_bias_table"
LAYER_TABLE = "beit.encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table"
MODALITY = "image_embedding.modality"
# BEiT's release (microsoft/unilm, beit) on the left, where query, key and value are one matrix.
BEIT_RELEASE = (
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"),
    (r"^pos_embed$", "beit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.relative_position", "beit.encoder.relative_position_bias.relative_position"),
    (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "beit.pooler.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", "beit.encoder.layer."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.qkv\.weight$", ".attention.attention.joint.weight"),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
    (r"\.attn\.relative_position", ".attention.attention.relative_position_bias.relative_position"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


class BEiTFormat(Format):
    """BEiT as VLMo's vision stage, and back: Hugging Face's names, and those of BEiT's own release.

    Pretraining checkpoints have one relative table (R, H) for all layers, fine-tuned ones a table for each, as VLMo
    does. The image modality vector starts as zeros, and is exported by adding it to the tensors it is added to. The
    classifier of the mean patch is dropped; the pooler's norm, trained for that mean, is read as the final norm.
    """

    title: ClassVar = "BEiT"
    kinds: ClassVar = ("vlmo",)
    exact: ClassVar = False
    image_target: ClassVar = "visual_tokens"
    outside: ClassVar[Table] = HUGGING_FACE_IMAGE | {"norm": "layernorm", "mim_head.predict": "lm_head"}
    optional: ClassVar = ("mim_head",)
    prefix: ClassVar = "beit."
    model_type: ClassVar = "beit"
    unprefixed: ClassVar = ("lm_head",)
    unused: ClassVar = r"relative_position_index$|^classifier\."
    tables: ClassVar = (SHARED_TABLE, LAYER_TABLE.format(0))
    older: ClassVar = BEIT_RELEASE

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        converted = super().read(state, config, allowed)
        if (table := converted.get("positions.image")) is not None:  # a shared one serves every layer
            converted["positions.image"] = table.repeat(1, config.layers * config.heads // table.shape[1])
        return converted | {MODALITY: torch.zeros(config.width)}

    def write(self, state: State, config: Any) -> State:
        """Convert the vision part to a BEiT: with a head for visual tokens a pretraining checkpoint, else a BeitModel.

        Equal relative tables are written as one (`use_shared_relative_position_bias`), except zeros of a BeitModel.
        """
        if (modality := state.get(MODALITY)) is not None:  # BEiT has none: fold it into what begins an image token
            folded = ("image_embedding.cls", "image_embedding.patch.bias", MASK)
            state = {name: t + modality if name in folded else t for name, t in state.items()}
        published = super().write(state, config)
        is_pretrained = "mim_head.predict.bias" in state
        if is_pretrained:
            for last in ("weight", "bias"):
                published[f"{NORMS[1]}.{last}"] = published.pop(f"{NORMS[0]}.{last}")
        names = [name for layer in range(config.layers) if (name := LAYER_TABLE.format(layer)) in published]
        is_shared = all(torch.equal(published[name], published[names[0]]) for name in names)
        if names and is_shared and (is_pretrained or published[names[0]].any()):
            return {n: t for n, t in published.items() if n not in names} | {SHARED_TABLE: published[names[0]]}
        return published

    def prepare(self, state: State) -> State:
        """Return Hugging Face's names, one of them for the final norm, of every form."""
        state = super().prepare(state)
        for name in [name for name in state if name.endswith(".attention.joint.weight")]:
            parts = [name.replace("joint", part) for part in ("query", "key", "value")]
            state |= zip(parts, state.pop(name).chunk(3), strict=True)
        norm = next((name for name in NORMS if f"{name}.weight" in state), NORMS[0])
        return {re.sub(rf"^{re.escape(norm)}\.", f"{NORMS[0]}.", name): tensor for name, tensor in state.items()}

    def layout(self, config: Any, state: State) -> tuple[Names, dict[str, Shape]]:
        """Return the layout with one table (R, H) for all layers, or one for each; side by side they are VLMo's."""
        names, shapes = super().layout(config, state)
        if config.positions == "relative":
            tables = tuple(LAYER_TABLE.format(layer) for layer in range(config.layers))
            names["positions.image"] = tables = (SHARED_TABLE,) if SHARED_TABLE in state else tables
            shapes["positions.image"] = ((2 * config.grid - 1) ** 2 + 3, len(tables) * config.heads)
        return names, shapes


class BEiT3Format(Format):
    """BEiT-3's release (microsoft/unilm, beit3, on torchscale) as a VLMo with routed attention, and back.

    Its A is vision and its B language; the first two positions of each are never read. Equal are the encoder over
    images, texts and both, and the contrastive head. Dropped are the mask token and the heads that compute otherwise:
    masked words and captions from one matrix, visual tokens, classes from the mean patch, answers from the image's
    [CLS], and NLVR2 from four vectors; ours are drawn. Fine-tuned classifiers have no final norm, and are refused.
    """

    title: ClassVar = "BEiT-3"
    kinds: ClassVar = ("vlmo",)
    outside: ClassVar[Table] = {
        "text_embedding.word": "text_embed",
        "text_embedding.positions": "encoder.embed_positions.B.weight",
        "image_embedding.patch": "vision_embed.proj",
        "image_embedding.cls": "vision_embed.cls_token",
        "image_embedding.positions": "encoder.embed_positions.A.weight",
        "norm.vision": "encoder.layer_norm.A",
        "norm.language": "encoder.layer_norm.B",
        "itc_head.image": "vision_head",
        "itc_head.text": "language_head",
        "itc_head.log_scale": "logit_scale",
    }
    layers: ClassVar = "encoder.layers."
    layer: ClassVar[Table] = {
        ours.format(expert): name.format(letter) if "{1}" not in name else tuple(name.format(letter, p) for p in "qkv")
        for expert, letter in (("vision", "A"), ("language", "B"))
        for ours, name in (
            ("norm.{}", "self_attn_layer_norm.{}"),
            ("attention.joint.{}.weight", "self_attn.{1}_proj.{0}.weight"),
            ("attention.joint.{}.bias", "self_attn.{1}_proj.{0}.bias"),
            ("attention.projection.{}.norm", "self_attn.inner_attn_ln.{}"),
            ("attention.projection.{}.linear", "self_attn.out_proj.{}"),
            ("experts.{}.norm", "final_layer_norm.{}"),
            ("experts.{}.expand", "ffn.{}.fc1"),
            ("experts.{}.inner_norm", "ffn.{}.ffn_layernorm"),
            ("experts.{}.contract", "ffn.{}.fc2"),
        )
    }
    optional: ClassVar = ("itc_head",)
    prefix: ClassVar = "beit3."
    unprefixed: ClassVar = ("vision_head.", "language_head.", "logit_scale")
    unused: ClassVar = r"^(mlm_head|mim_head|head|fc_norm|pooler)\.|^beit3\.vision_embed\.mask_token$"
    max_text_length: ClassVar = 1022  # of the 1024 rows of every published table
    architecture: ClassVar[dict[str, Any]] = {
        "attention": "routed", "sub_norm": True, "embeddings": "plain", "positions": "absolute", "layer_scale": None,
        "vision_language_layers": 0, "contrasts": 1, "norm_eps": 1e-5,
    }  # fmt: skip
    position_tables: ClassVar = ("beit3.encoder.embed_positions.A.weight", "beit3.encoder.embed_positions.B.weight")

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        return super().infer(self.used_positions(state), self.architecture | dict(overrides))

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        if not any(name.startswith("beit3.encoder.layer_norm.") for name in state):
            raise CheckpointError(
                "the checkpoint has no final norm (beit3.encoder.layer_norm), as BEiT-3 fine-tuned for ImageNet and "
                "VQAv2; expected a pretrained one, or one fine-tuned for retrieval. Import that, and fine-tune it"
            )
        if dropped := sorted({name.split(".")[0] for name in state if re.search(self.unused, name)} - {"beit3"}):
            log.warning("%s: dropped, because mome's heads of that kind compute otherwise", ", ".join(dropped))
        return super().read(self.used_positions(state), config, allowed)

    def write(self, state: State, config: Any) -> State:
        """Convert to the release's names, with zeros for the positions and the mask token that are never read."""
        published = super().write(state, config)
        for name, rows in zip(self.position_tables, (config.grid**2 + 3, self.max_text_length + 2), strict=True):
            table = published[name].reshape(-1, config.width)
            padded = table.new_zeros(max(rows, len(table) + 2), config.width)
            padded[2 : len(table) + 2] = table
            published[name] = padded
        return published | {"beit3.vision_embed.mask_token": torch.zeros(1, 1, config.width)}

    def used_positions(self, state: State) -> State:
        """Return a published state with the positions that are read: (1, 1 + P, D) of images and (T, D) of texts."""
        image, text = self.position_tables
        used = {name: state[name][2:] for name in (image, text) if name in state and state[name].dim() == 2}
        return dict(state) | used | ({image: used[image].unsqueeze(0)} if image in used else {})


class BERTFormat(Format):
    """Hugging Face's BertModel, BertForPreTraining or BertForMaskedLM as the start of ImageBERT, and back.

    The parts for regions and the matching head are absent from the result; BERT's pooler and next-sentence head are
    dropped. BERT ties the masked-word decoder to the word embedding; ImageBERT's starts as a copy and is trained
    separately, so that Hugging Face's classes read exported weights only with `tie_word_embeddings=False`. Positions
    beyond `model.max_text_length` are cut off, which is all that a round trip loses.
    """

    title: ClassVar = "BERT"
    kinds: ClassVar = ("imagebert",)
    outside: ClassVar[Table] = {  # ImageBERT's encoder and text embedding are Hugging Face's own modules
        "text_embedding": "embeddings",
        "encoder": "encoder",
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.norm": "cls.predictions.transform.LayerNorm",
        "mlm_head.decode.weight": "cls.predictions.decoder.weight",
        "mlm_head.decode.bias": "cls.predictions.bias",
    }
    optional: ClassVar = ("mlm_head",)
    prefix: ClassVar = "bert."
    model_type: ClassVar = "bert"
    classes: ClassVar = {"": "BertModel", "mlm_head": "BertForMaskedLM"}
    unprefixed: ClassVar = ("cls.",)
    unused: ClassVar = (
        r"^bert\.pooler\.|^cls\.seq_relationship\.|^bert\.embeddings\.position_ids|^cls\.predictions\.decoder\.bias$"
    )
    computed: ClassVar = {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    sizes: ClassVar = conversion.SIZES  # those that it lacks, such as regions', are ImageBERT's defaults
    shown: ClassVar = (
        *("text_embedding.word_embeddings.weight", "", "text_embedding.position_embeddings.weight"),
        "encoder.layer.0.intermediate.dense.weight",
    )
    max_text_length: ClassVar = ImageBERTConfig.model_fields["max_text_length"].default
    older: ClassVar = ((r"gamma$", "weight"), (r"beta$", "bias"))
    is_tied: ClassVar = True
    copies: ClassVar = {"cls.predictions.decoder.bias": "cls.predictions.bias"}  # read by some versions of transformers

    def hugging_face_config(self, state: State, config: Any, num_words: int, labels: Sequence[str]) -> dict[str, Any]:
        written = super().hugging_face_config(state, config, num_words, labels)
        length = len(state["text_embedding.position_embeddings.weight"])
        return written | {"max_position_embeddings": length, "tie_word_embeddings": False}


class CLIPFormat(Format):
    """Hugging Face's CLIPModel: the dual encoder as OpenAI and open_clip train it.

    Its attention masks padding only by causality, as ours does beyond the end token, so all outputs agree.
    """

    title: ClassVar = "CLIP"
    kinds: ClassVar = ("dual_encoder",)
    model_type: ClassVar = "clip"
    image_processor: ClassVar = "CLIPImageProcessor"
    classes: ClassVar = {"": "CLIPModel"}
    is_batched: ClassVar = False
    towers: ClassVar[dict[str, str]] = {"image_tower": "vision_model.", "text_tower": "text_model."}
    layers: ClassVar = "encoder.layers."
    layer: ClassVar[Table] = {
        "norm": "layer_norm1",
        "attention.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
        "attention.query_bias": "self_attn.q_proj.bias",
        "attention.key_bias": "self_attn.k_proj.bias",
        "attention.value_bias": "self_attn.v_proj.bias",
        "attention.projection": "self_attn.out_proj",
        "experts.vision.norm": "layer_norm2",
        "experts.vision.expand": "mlp.fc1",
        "experts.vision.contract": "mlp.fc2",
    }
    outside: ClassVar[Table] = {
        "image_embedding.patch": "vision_model.embeddings.patch_embedding",
        "image_embedding.cls": "vision_model.embeddings.class_embedding",
        "image_embedding.positions": "vision_model.embeddings.position_embedding.weight",
        "image_tower.input_norm": "vision_model.pre_layrnorm",
        "image_tower.norm": "vision_model.post_layernorm",
        "text_embedding.word": "text_model.embeddings.token_embedding",
        "text_embedding.positions": "text_model.embeddings.position_embedding.weight",
        "text_tower.norm": "text_model.final_layer_norm",
        "itc_head.image": "visual_projection",
        "itc_head.text": "text_projection",
        "itc_head.log_scale": "logit_scale",
    }
    unused: ClassVar = r"embeddings\.position_ids$"
    sizes: ClassVar = {"embedding": "projection_dim"}
    transposed: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[str] = "quick_gelu"  # where no config names it

    def names(self, parameter: str) -> tuple[str, ...]:
        tower, _, block = parameter.partition(".blocks.")
        if not block:
            return super().names(parameter)
        names = super().names("blocks." + block.replace(".experts.language.", ".experts.vision."))
        return tuple(self.towers[tower] + name for name in names)

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        return super().read(self.transpose(state), config, allowed)

    def write(self, state: State, config: Any) -> State:
        return self.transpose(super().write(state, config))

    def transpose(self, state: State) -> State:
        """Return a published state with linear layers that are stored the other way round transposed."""
        return {name: tensor.T if name in self.transposed else tensor for name, tensor in state.items()}

    def section(self, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that config.json, of which both towers have a part, and the image processor's config give."""
        vision, text = (config.get(key) or {} for key in ("vision_config", "text_config"))
        section = super().section(config, processor)
        if not config:
            return section
        activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
        if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
            names = " and ".join(sorted(map(str, activations)))
            raise ConfigError(f"config.json: hidden_act is {names}; mome's model supports gelu or quick_gelu in both")
        epsilons = {part.get("layer_norm_eps", 1e-5) for part in (vision, text)}
        if len(epsilons) > 1:
            raise ConfigError("config.json: layer_norm_eps differs between the towers; mome's model has one value")
        heads = {"heads": vision.get("num_attention_heads", 12), "text_heads": text.get("num_attention_heads", 8)}
        return section | heads | {"activation": activations.pop(), "norm_eps": epsilons.pop()}

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Infer the `model` section from `overrides`, else tensor shapes, else what OpenAI and open_clip use."""
        tensors = self.transpose(state)
        wanted = {
            "patch": "image_embedding.patch.weight",
            "image": "image_embedding.positions",
            "text": "text_embedding.positions",
            "expand": "image_tower.blocks.0.experts.vision.expand.weight",
            "project": "itc_head.image.weight",
        }
        names = {key: self.names(parameter)[0] for key, parameter in wanted.items()}
        if missing := [name for name in names.values() if name not in tensors or tensors[name].dim() < 2]:
            raise ConfigError(f"no {self.title} checkpoint: {', '.join(missing)} missing, or no matrix")
        patch, image, text, expand, project = (tuple(tensors[names[key]].shape) for key in wanted)
        section: dict[str, Any] = {"kind": "dual_encoder", "width": patch[0], "patch_size": patch[-1]}
        section |= {"mlp_ratio": expand[0] // patch[0], "image_size": round((image[0] - 1) ** 0.5) * patch[-1]}
        section |= {"max_text_length": text[0], "text_width": text[1], "embedding": project[0]}
        for key, tower, expert in (("layers", "image_tower", "vision"), ("text_layers", "text_tower", "language")):
            present = (self.names(f"{tower}.blocks.{n}.experts.{expert}.norm.bias")[0] in tensors for n in count())
            section[key] = sum(1 for _ in takewhile(bool, present))
        assumed = {key: (max(1, section[width] // HEAD_WIDTH), f"{width}/{HEAD_WIDTH}") for key, width in HEADS}
        assumed["activation"] = (
            self.activation,
            "as " + ("OpenAI's" if self.activation == "quick_gelu" else "LAION's"),
        )
        for key, (value, reason) in assumed.items():
            if key not in overrides:
                log.warning("%s=%s assumed (%s); give %s=… if that is wrong", key, value, reason, key)
                section[key] = value
        return section | dict(overrides)

    def hugging_face_config(self, state: State, config: Any, num_words: int, labels: Sequence[str]) -> dict[str, Any]:
        if not self.classes:
            return super().hugging_face_config(state, config, num_words, labels)  # raises
        shared = {"hidden_act": config.activation, "layer_norm_eps": config.norm_eps}
        towers = []
        for width, layers, heads in (
            (config.width, config.layers, config.heads),
            (config.text_width, config.text_layers, config.text_heads),
        ):
            sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
            towers.append(shared | sizes | {"intermediate_size": config.mlp_ratio * width})
        tokens = {"bos_token_id": num_words - 2, "eos_token_id": num_words - 1, "pad_token_id": num_words - 1}
        length = {"vocab_size": num_words, "max_position_embeddings": config.max_text_length}
        return {
            "model_type": self.model_type,
            "architectures": [self.classes[""]],
            "projection_dim": config.embedding,
            "vision_config": towers[0] | {"image_size": config.image_size, "patch_size": config.patch_size},
            "text_config": towers[1] | length | tokens,
        }


class OpenCLIPFormat(CLIPFormat):
    """open_clip's CLIP and the tensors of OpenAI's; `open_clip_config.json` says how they are computed."""

    title: ClassVar = "open_clip"
    model_type: ClassVar = "open_clip"
    classes: ClassVar = {}
    config_file: ClassVar = "open_clip_config.json"
    towers: ClassVar = {"image_tower": "visual.", "text_tower": ""}
    layers: ClassVar = "transformer.resblocks."
    layer: ClassVar[Table] = {
        "norm": "ln_1",
        "attention.weight": "attn.in_proj_weight",
        **{f"attention.{part}_bias": "attn.in_proj_bias" for part in ("query", "key", "value")},
        "attention.projection": "attn.out_proj",
        "experts.vision.norm": "ln_2",
        "experts.vision.expand": "mlp.c_fc",
        "experts.vision.contract": "mlp.c_proj",
    }
    outside: ClassVar[Table] = {
        "image_embedding.patch": "visual.conv1",
        "image_embedding.cls": "visual.class_embedding",
        "image_embedding.positions": "visual.positional_embedding",
        "image_tower.input_norm": "visual.ln_pre",
        "image_tower.norm": "visual.ln_post",
        "text_embedding.word": "token_embedding",
        "text_embedding.positions": "positional_embedding",
        "text_tower.norm": "ln_final",
        "itc_head.image.weight": "visual.proj",
        "itc_head.text.weight": "text_projection",
        "itc_head.log_scale": "logit_scale",
    }
    unused: ClassVar = r"^(input_resolution|context_length|vocab_size|attn_mask)$"
    sizes: ClassVar = {}
    transposed: ClassVar = ("visual.proj", "text_projection")
    activation: ClassVar = "gelu"

    def section(self, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that open_clip_config.json gives. Raises ConfigError for towers that are no CLIP's."""
        model, shown = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
        section: dict[str, Any] = {"interpolation": shown.get("interpolation", "bicubic")}
        section |= {key: shown[name] for key, name in (("image_mean", "mean"), ("image_std", "std")) if name in shown}
        if not model:
            return section
        vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
        if others := {"timm_model_name", "hf_model_name"} & (vision.keys() | text.keys()):
            raise ConfigError(
                f"{self.config_file}: towers of other kinds ({others}); mome reads CLIP's own ViT and text tower"
            )
        section |= {
            "heads": vision.get("width", 768) // vision.get("head_width", HEAD_WIDTH),
            "text_heads": text.get("heads", 8),
        }
        return section | {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}


class PlainFormat(Format):
    """Our own names, of every kind of model."""

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        if not overrides:
            raise ConfigError("plain tensors do not identify their model; give a config with --model")
        return dict(overrides)

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        return dict(state)

    write = read


FORMATS: dict[str, Format] = {
    "vlmo": VLMoFormat(),
    "vilt": ViLTFormat(),
    "vilt-hf": ViLTHuggingFaceFormat(),
    "vit": ViTFormat(),
    "beit": BEiTFormat(),
    "beit3": BEiT3Format(),
    "bert": BERTFormat(),
    "hf-clip": CLIPFormat(),
    "open-clip": OpenCLIPFormat(),
    "safetensors": PlainFormat(),
}
