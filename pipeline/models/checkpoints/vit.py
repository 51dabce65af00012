"""ViT checkpoints of Hugging Face (ViTModel, ViTForImageClassification): their names for our parameters, and back.

A checkpoint without a classifier has names without the prefix `vit.`; both forms are read, and full names are written.
ViTModel's pooler is unused here and dropped. Hugging Face's LayerNorms have an epsilon of 1e-12 (`model.norm_eps`), the
JAX release's, and ours by default, 1e-6: no hidden vector of a trained ViT is small enough for a difference above 1e-5.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.models.checkpoints.conversion import (
    BILINEAR,
    IMAGE_SIZES,
    SIZES,
    ConfigFile,
    Format,
    hugging_face_image_names,
)


class ViTFormat(Format):
    title: ClassVar = "ViT"
    kinds: ClassVar = ("vit",)
    config: ClassVar = ConfigFile(
        "vit",
        keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
        computed={"hidden_act": ("gelu",), "num_channels": (3,)},
        sizes=SIZES | IMAGE_SIZES,
        resample=BILINEAR,
    )
    outside: ClassVar = hugging_face_image_names("vit.embeddings") | {
        "norm": "vit.layernorm",
        "classification_head.classify": "classifier",
    }
    layers: ClassVar = "vit.encoder.layer."
    optional: ClassVar = ("classification_head",)
    prefix: ClassVar = "vit."
    unprefixed: ClassVar = ("classifier.",)
    unused: ClassVar = r"^vit\.pooler\.dense\."
