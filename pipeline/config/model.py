"""The `model` section: one class a kind of model, with the paper's base sizes as defaults.

What a head predicts (classes, answers, an image target) is a stage's affair and stands there.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config.section import Fraction, Positive, Section

Interpolation = Literal["bicubic", "bilinear"]


class TransformerConfig(Section):
    """What every kind has: a transformer's sizes, and the pictures and texts it reads."""

    READS_TEXT: ClassVar[bool] = True
    # Keys that no weight depends on once it is initialised.
    TRAINING_ONLY: ClassVar[frozenset[str]] = frozenset({"init_std", "drop_path", "interpolation"})

    kind: str
    width: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    mlp_ratio: Positive = 4
    image_size: Positive = 224
    patch_size: Positive = 16
    max_text_length: Positive = 40  # longest text the positions serve, in tokens with [CLS] and [SEP]
    init_std: float = Field(0.02, gt=0)  # of weights; small widths learn sooner with about 1 / sqrt(width)
    drop_path: Fraction = 0.0  # of the last layer's branches; from 0 in the first it rises linearly
    # Kernel that images are resized with: VLMo, ViLT and BEiT use bicubic, Hugging Face's ViT processor bilinear, which
    # an imported ViT therefore has unless its preprocessor_config.json says otherwise.
    interpolation: Interpolation = "bicubic"

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        return self

    def architecture(self) -> dict[str, Any]:
        """The keys that say what weights fit: two sections that agree in these can share them."""
        return {key: value for key, value in self.model_dump().items() if key not in self.TRAINING_ONLY}

    @property
    def grid(self) -> int:
        """Patches along one side of a square picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Of a square picture."""
        return self.grid**2

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Each layer's chance of dropping a branch."""
        return tuple(self.drop_path * layer / max(self.layers - 1, 1) for layer in range(self.layers))


class VLMoConfig(TransformerConfig):
    """VLMo (arXiv 2111.02358). The defaults are VLMo-base at 224 px."""

    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {"norm_eps", "contrasts"}

    kind: Literal["vlmo"] = "vlmo"
    vision_language_layers: Positive = 2  # top layers whose fused sequences read the vision-language expert
    positions: Literal["relative", "absolute"] = "relative"
    max_text_length: Positive = 196
    layer_scale: float | None = 0.1
    drop_path: Fraction = 0.1
    norm_eps: float = Field(1e-6, gt=0)  # of the encoder's norms; Hugging Face's BEiT configs say 1e-12
    # Contrastive projections: 2 in pretraining (own experts, vision-language expert), 1 in the release's retrieval.
    contrasts: Literal[1, 2] = 2

    def architecture(self) -> dict[str, Any]:
        # LayerScale's value is where its gammas start; that there are gammas is the architecture.
        return super().architecture() | {"layer_scale": self.layer_scale is not None}

    @model_validator(mode="after")
    def _has_lower_layers(self) -> Self:
        if self.vision_language_layers >= self.layers:
            raise ValueError(f"vision_language_layers must be below layers {self.layers}")
        return self


class ViLTConfig(TransformerConfig):
    """ViLT (arXiv 2102.03334). The defaults are ViLT-B/32: pictures keep their shape, `image_size` is the shorter side.

    Each side is cut to a multiple of the patch; positions are those of a square picture, resized to each picture's
    grid. The paper's longest side is 640 (at most 12 x 20 = 240 patches); the release computes 639, which cuts to 608
    and at most 228. Published models also drop out 0.1 of hidden vectors; this one has no such noise, which would tie
    results to generator state.
    """

    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {
        "longest_side",
        "max_visible_patches",
        "norm_eps",
        "text_norm_eps",
    }

    kind: Literal["vilt"] = "vilt"
    image_size: Positive = 384
    patch_size: Positive = 32
    longest_side: Positive = 640
    norm_eps: float = Field(1e-6, gt=0)  # of the encoder's norms; Hugging Face's configs say 1e-12
    text_norm_eps: float = Field(1e-12, gt=0)  # of the text embedding's norm, and of masked language's
    max_visible_patches: Positive | None = 200  # at most, drawn at random from each picture in pretraining; None: all

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.longest_side < self.image_size:
            raise ValueError(
                f"longest_side {self.longest_side} is below image_size {self.image_size}, the shorter side"
            )
        return self


class ViTConfig(TransformerConfig):
    """ViT (arXiv 2010.11929). The defaults are ViT-B/16."""

    READS_TEXT: ClassVar = False
    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {"max_text_length", "norm_eps"}

    kind: Literal["vit"] = "vit"
    norm_eps: float = Field(1e-6, gt=0)  # of the norms; Hugging Face's configs say 1e-12


class ImageBERTConfig(TransformerConfig):
    """ImageBERT (arXiv 2001.07966): BERT-base over words and a detector's regions. It reads no pixels."""

    TRAINING_ONLY: ClassVar = TransformerConfig.TRAINING_ONLY | {
        "image_size",
        "patch_size",
        "max_regions",
        "dropout",
        "norm_eps",
    }

    kind: Literal["imagebert"] = "imagebert"
    max_text_length: Positive = 44
    max_regions: Positive = 100
    region_features: Positive = 2048  # numbers of a region's feature vector
    region_classes: Positive = 1600  # of the detector
    norm_eps: float = Field(1e-12, gt=0)  # of every norm
    # Of BERT's embeddings, attention and hidden vectors. Its masks follow from the step and the rank, so that a resumed
    # run draws the same ones and another world size others. No step of this model reads a row twice (it learns no
    # contrast), so that none need be replayed.
    dropout: Fraction = 0.1

    @model_validator(mode="after")
    def _drops_no_path(self) -> Self:
        if self.drop_path:
            raise ValueError("drop_path is not BERT's; leave it 0 and set dropout")
        return self


class DualEncoderConfig(TransformerConfig):
    """Two towers and a contrast (CLIP, arXiv 2103.00020): the baseline. `layers` and `width` are the image tower's."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    max_text_length: Positive = 77
    text_layers: Positive = 12
    embedding: Positive = 512  # width of the space that pictures and texts meet in

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of the deeper tower's layers; the other tower's have the last of them."""
        layers = max(self.layers, self.text_layers)
        return tuple(self.drop_path * layer / max(layers - 1, 1) for layer in range(layers))


def kind_of(value: Any) -> Any:
    """Return the kind that a section names; VLMo, if it names none; None for what is no section."""
    return value.get("kind", "vlmo") if isinstance(value, dict) else getattr(value, "kind", None)


ModelConfig = Annotated[
    Annotated[VLMoConfig, Tag("vlmo")]
    | Annotated[ViLTConfig, Tag("vilt")]
    | Annotated[ViTConfig, Tag("vit")]
    | Annotated[ImageBERTConfig, Tag("imagebert")]
    | Annotated[DualEncoderConfig, Tag("dual_encoder")],
    Discriminator(kind_of),
]
MODEL_SECTIONS: dict[str, type[TransformerConfig]] = {
    "vlmo": VLMoConfig,
    "vilt": ViLTConfig,
    "vit": ViTConfig,
    "imagebert": ImageBERTConfig,
    "dual_encoder": DualEncoderConfig,
}
