"""ViT (arXiv 2010.11929): a transformer over image patches, for classification and masked-image modelling.

It is a multiway encoder with one expert, absolute positions, and a key bias as published.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline.config.schema import ViTConfig
from pipeline.models.embeddings import ImageEmbedding, visible_padding
from pipeline.models.heads import FloatHead
from pipeline.models.image_decoder import build_mim_head
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import MultiwayBlock, run_blocks
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import resize_grid

PARTS = (
    "image_embedding",
    "positions.image",
    "blocks",
    "norm",
    "mim_head",  # with the mask embedding
    "classification_head",
)
_ENCODER = frozenset(PARTS[:4])


class ViT(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = PARTS[4:]
    PART_OF: ClassVar = Model.PART_OF | {"image_embedding.positions": "positions.image"}
    ENCODER_PARTS: ClassVar = {frozenset({"image"}): _ENCODER}
    HEADS: ClassVar = {"mim": frozenset({"mim_head"}), "classes": frozenset({"classification_head"})}
    RESIZABLE: ClassVar = frozenset({"image_size"})
    RESIZE_RULES: ClassVar = {  # of the JAX release: `ndimage.zoom` of order 1
        "image_embedding.positions": lambda positions, config: resize_grid(positions, config.grid, "bilinear")
    }

    config: ViTConfig

    def __init__(self, config: ViTConfig, vocabulary: int = 0, heads: HeadConfig = HeadConfig()) -> None:
        """Build a ViT; `vocabulary` is ignored, as it reads no text."""
        super().__init__(config, heads)
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, config.width, True, heads.covers_patches, modality=False
        )
        epsilon = config.norm_eps
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, config.mlp_ratio, ("vision",), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(config.width, eps=epsilon)
        self.mim_head = build_mim_head(config, heads)
        self.classification_head = FloatHead(classify=nn.Linear(config.width, heads.classes)) if heads.classes else None

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        image, visible = packed.image, packed.visible_patches
        if image is None or packed.text is not None or packed.image_size is not None or packed.is_second is not None:
            raise ValueError("a ViT reads one whole square image per example, and no text; request an image input")
        masked, replacements = packed.masking(self.config.num_patches)
        x = self.image_embedding(image, masked, None, replacements, visible)
        padding = None if visible is None else visible_padding(visible, x.dtype)
        x = run_blocks(self.blocks, x, "vision", padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None
