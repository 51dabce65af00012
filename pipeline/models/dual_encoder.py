"""Dual encoder: two towers trained by contrast (CLIP, arXiv 2103.00020, section 2), the baseline.

Each tower is a bidirectional transformer with absolute positions; its [CLS] is projected into the shared unit sphere.
CLIP's other choices (a causal text tower read at its end token, QuickGELU, a LayerNorm before the image tower) are left
out, so that comparisons with the other models are about fusion.

Shapes: B examples, L tokens, K output positions, D width, N layers of the deeper tower.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pipeline.config.schema import DualEncoderConfig
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding
from pipeline.models.heads import ContrastiveHead
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import EPSILON, Expert, MultiwayBlock, key_padding, run_blocks
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import cut_text_positions, resize_grid


class Tower(nn.Module):
    """Pre-norm blocks over one modality, and a final norm.

    A tower with fewer layers than the other one has the drop-path rates of the other's last layers.
    """

    def __init__(self, config: DualEncoderConfig, expert: Expert, layers: int) -> None:
        super().__init__()
        self.expert: Expert = expert
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, config.mlp_ratio, (expert,), None, rate)
            for rate in config.drop_path_rates[-layers:]
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)

    def forward(self, x: Tensor, padding: Tensor | None, packed: PackedInputs) -> Tensor:
        """x (B, L, D), padding (B, L) -> (B, L, D), or (B, K, D) at the packed output positions."""
        mask = None if packed.drop_path_mask is None else packed.drop_path_mask[:, -len(self.blocks) :]
        return self.norm(run_blocks(self.blocks, x, self.expert, padding, mask, packed.output_positions))


class DualEncoder(Model):
    PARTS: ClassVar = ("image_embedding", "text_embedding", "image_tower", "text_tower", "itc_head")
    HEAD_PARTS: ClassVar = ("itc_head",)
    ENCODER_PARTS: ClassVar = {
        frozenset({"image"}): frozenset({"image_embedding", "image_tower"}),
        frozenset({"text"}): frozenset({"text_embedding", "text_tower"}),
    }
    HEADS: ClassVar = ("itc",)
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})
    RESIZE_RULES: ClassVar = {  # bicubic, as open_clip resizes CLIP's positions
        "image_embedding.positions": lambda positions, config: resize_grid(positions, config.grid, "bicubic"),
        "text_embedding.positions": lambda positions, config: cut_text_positions(positions, config.max_text_length),
    }

    config: DualEncoderConfig

    def __init__(self, config: DualEncoderConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width = config.width
        self.image_embedding = ImageEmbedding(config.image_size, config.patch_size, width, True, maskable=False)
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, absolute=True)
        self.image_tower = Tower(config, "vision", config.layers)
        self.text_tower = Tower(config, "language", config.text_layers)
        self.itc_head = ContrastiveHead(width, contrasts=1, embedding=config.embedding)

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is not None and packed.text is not None:
            raise ValueError("a dual encoder reads an image or a text, never both in one input; request two inputs")
        if packed.image is not None:
            if packed.image_size is not None or packed.visible_patches is not None:
                raise ValueError("a dual encoder reads whole square images; use ViLT for images of their own shape")
            return self.image_tower(self.image_embedding(packed), None, packed), None
        assert packed.text is not None
        assert packed.text_keep is not None
        x = self.text_embedding(packed.text)
        return self.text_tower(x, key_padding(packed.text_keep, x.dtype), packed), None
