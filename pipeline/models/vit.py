"""ViT (arXiv 2010.11929): pictures read by one transformer, for classes and for masked patches.

It is a multiway encoder with one expert, absolute positions, and a key bias as published.

Shapes: B rows, I image tokens ([CLS] in front), K positions a row, D width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline.config.schema import Objective, SourceType, TransformerConfig, ViTConfig
from pipeline.models.embeddings import ImageEmbedding, read_padding
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.heads import ClassificationHead, MaskedImageHead
from pipeline.models.image_decoder import ImageDecoder, build_masked_image_head
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import MultiwayBlock
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import resize_grid

PARTS = (
    "image_embedding",
    "positions.image",
    "blocks",
    "norm",
    "mim_head",  # with the embedding that hides a patch
    "classification_head",
)


class ViT(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = PARTS[PARTS.index("mim_head") :]
    RESIZABLE: ClassVar = frozenset({"image_size"})

    config: ViTConfig

    def __init__(self, config: ViTConfig, vocabulary: int = 0, heads: HeadConfig = HeadConfig()) -> None:
        """A ViT reads no text: `vocabulary` is what every kind is given, and means nothing here."""
        super().__init__(config, heads)
        self.image_embedding = ImageEmbedding(
            config.image_size,
            config.patch_size,
            config.width,
            absolute=True,
            maskable=heads.covers_patches,
            modality=False,
        )
        self.blocks = nn.ModuleList(
            MultiwayBlock(
                config.width,
                config.heads,
                config.mlp_ratio,
                ("vision",),
                None,
                rate,
                key_bias=True,
                epsilon=config.norm_eps,
            )
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mim_head = build_masked_image_head(config, heads)
        self.classification_head = ClassificationHead(config.width, heads.classes) if heads.classes else None

    def encode(self, rows: PackedInputs) -> tuple[Tensor, None]:
        if rows.image is None or rows.text is not None or rows.image_size is not None or rows.is_second is not None:
            raise ValueError("a ViT reads one whole square picture a row, and no text; ask for an image pass")
        count = self.config.num_patches
        x = self.image_embedding(
            rows.image, rows.masked(count), stand_ins=rows.replacements(count), read=rows.visible_patches
        )
        padding = None if rows.visible_patches is None else read_padding(rows.visible_patches, x.dtype)
        for layer, block in enumerate(self.blocks):
            keep = None if rows.drop_path_mask is None else rows.drop_path_mask[:, layer]
            read = rows.output_positions if layer == len(self.blocks) - 1 else None
            x = block(x, {"vision": slice(None)}, None, padding, keep, read)
        return self.norm(x), None

    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        if head == "classes" and self.classification_head is not None:
            return {head: self.classification_head(features[:, 0])}
        if head == "mim" and isinstance(self.mim_head, MaskedImageHead):
            return {head: self.mim_head(features)}
        if head == "decoded_image" and isinstance(self.mim_head, ImageDecoder):
            return {"mim": self.mim_head(features, one.visible_patches, one.patch_positions)}
        if head == "tokens":
            return {head: features}
        raise ValueError(f"this ViT was built without the head '{head}'")

    def part_of(self, parameter: str) -> str:
        if parameter == "image_embedding.positions":
            return "positions.image"
        if parameter == "image_embedding.mask":
            return "mim_head"
        part = parameter.split(".")[0]
        assert part in PARTS, f"{parameter} belongs to no part"
        return part

    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        """Classes of labelled pictures, and masked patches of any source that has pictures."""
        encoder = frozenset(PARTS) - frozenset(self.HEAD_PARTS)
        if (objective, source_type) == ("classification", "labelled"):
            return encoder | {"classification_head"}
        if objective == "mim" and source_type in ("images", "pairs"):
            return encoder | {"mim_head"}
        return None

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Positions of another picture size as the JAX release resizes them: `ndimage.zoom` of order 1."""
        resized = super().resize_state(state, before)
        name = "image_embedding.positions"
        if name in resized:
            resized = resized | {name: resize_grid(resized[name], self.config.grid, "bilinear")}
        return resized
