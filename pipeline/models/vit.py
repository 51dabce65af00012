"""ViT (arXiv 2010.11929): a transformer over image patches, for classification and masked-image modelling.

It is a multiway encoder with one expert, absolute positions, and a key bias as published.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline.config.schema import ViTConfig
from pipeline.models.embeddings import ImageEmbedding
from pipeline.models.heads import FloatHead
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import MultiwayBlock, run_blocks, visible_padding
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import resize_grid

_ENCODER = ("image_embedding", "positions.image", "blocks", "norm")


class ViT(Model):
    HEAD_PARTS: ClassVar = ("mim_head", "classification_head")  # the first with the mask embedding
    PARTS: ClassVar = _ENCODER + HEAD_PARTS
    PART_OF: ClassVar = Model.PART_OF | {"image_embedding.positions": "positions.image"}
    ENCODER_PARTS: ClassVar = {frozenset({"image"}): frozenset(_ENCODER)}
    HEADS: ClassVar = ("mim", "classes")
    RESIZABLE: ClassVar = frozenset({"image_size"})
    RESIZE_RULES: ClassVar = {  # of the JAX release: `ndimage.zoom` of order 1
        "image_embedding.positions": lambda positions, config: resize_grid(positions, config.grid, "bilinear")
    }

    config: ViTConfig

    def __init__(self, config: ViTConfig, vocabulary: int = 0, heads: HeadConfig = HeadConfig()) -> None:
        """Build a ViT; `vocabulary` is ignored, as it reads no text."""
        super().__init__(config, heads)
        width, epsilon = config.width, config.norm_eps
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, width, True, heads.covers_patches, modality=False
        )
        self.blocks = nn.ModuleList(
            MultiwayBlock(width, config.heads, config.mlp_ratio, ("vision",), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.mim_head = self.build_mim_head()
        self.classification_head = FloatHead(classify=nn.Linear(width, heads.classes)) if heads.classes else None

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is None or any(x is not None for x in (packed.text, packed.image_size, packed.is_second)):
            raise ValueError("a ViT reads one whole square image per example, and no text; request an image input")
        x, visible = self.image_embedding(packed), packed.visible_patches
        padding = None if visible is None else visible_padding(visible, x.dtype)
        x = run_blocks(self.blocks, x, "vision", padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None
