"""Dual encoder: two towers that meet only in a contrast (CLIP, arXiv 2103.00020, section 2); the baseline.

Each tower is a transformer of its own with absolute positions, read in both directions; its [CLS] is projected to a
unit vector of the space that pictures and texts share. What CLIP does otherwise (a causal text tower read at its end
token, QuickGELU, a LayerNorm before the image tower) is left out, so that a comparison with the other models is one of
how pictures and texts are joined.

Shapes: B rows, L tokens, I image tokens ([CLS] in front), K positions a row, D width, E width of the shared space,
N layers of the deeper tower.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from pipeline.config.schema import DualEncoderConfig, Objective, SourceType, TransformerConfig
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding, key_padding
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.heads import SharedSpaceHead
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import EPSILON, Expert, MultiwayBlock
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import cut_text_positions, resize_grid

PARTS = ("image_embedding", "text_embedding", "image_tower", "text_tower", "itc_head")


class Tower(nn.Module):
    """Pre-norm blocks that read one modality, and the norm after them.

    A tower with fewer layers than the other has the drop-path rates of the other's last ones.
    """

    def __init__(self, config: DualEncoderConfig, expert: Expert, layers: int) -> None:
        super().__init__()
        self.expert: Expert = expert
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, config.mlp_ratio, (expert,), None, rate)
            for rate in config.drop_path_rates[-layers:]
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)

    def forward(self, x: Tensor, padding: Tensor | None, drop_path_mask: Tensor | None, read: Tensor | None) -> Tensor:
        """x (B, L, D), padding (B, L) added to keys, drop_path_mask (B, N, 2) -> (B, L, D), or (B, K, D) at `read`."""
        last = len(self.blocks) - 1
        keeps = [None] * len(self.blocks) if drop_path_mask is None else drop_path_mask.unbind(1)[-len(self.blocks) :]
        for layer, (block, keep) in enumerate(zip(self.blocks, keeps, strict=True)):
            x = block(x, {self.expert: slice(None)}, None, padding, keep, read if layer == last else None)
        return self.norm(x)


class DualEncoder(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = ("itc_head",)
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})

    config: DualEncoderConfig

    def __init__(self, config: DualEncoderConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width = config.width
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, width, absolute=True, maskable=False
        )
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, absolute=True)
        self.image_tower = Tower(config, "vision", config.layers)
        self.text_tower = Tower(config, "language", config.text_layers)
        self.itc_head = SharedSpaceHead(width, config.embedding)

    def encode(self, rows: PackedInputs) -> tuple[Tensor, None]:
        if rows.image is not None and rows.text is not None:
            raise ValueError("a dual encoder reads a picture or a text, never both in one pass; ask for two passes")
        if rows.image is not None:
            if rows.image_size is not None or rows.visible_patches is not None:
                raise ValueError("a dual encoder reads whole square pictures; pictures of their own shape are for ViLT")
            return self.image_tower(
                self.image_embedding(rows.image), None, rows.drop_path_mask, rows.output_positions
            ), None
        assert rows.text is not None
        assert rows.text_keep is not None
        x = self.text_embedding(rows.text)
        return self.text_tower(
            x, key_padding(rows.text_keep, x.dtype), rows.drop_path_mask, rows.output_positions
        ), None

    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        if head == "itc":
            modality: Literal["image", "text"] = "image" if one.text is None else "text"
            vectors, scale = self.itc_head(modality, features[:, 0])
            return {head: vectors, "scale": scale}
        if head == "tokens":
            return {head: features}
        raise ValueError(f"a dual encoder has no head '{head}'; it has itc and tokens")

    def part_of(self, parameter: str) -> str:
        part = parameter.split(".")[0]
        assert part in PARTS, f"{parameter} belongs to no part"
        return part

    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        return frozenset(PARTS) if (objective, source_type) == ("itc", "pairs") else None

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Of another picture size or text length: bicubic, as open_clip resizes CLIP's positions."""
        resized = super().resize_state(state, before)
        image, text = "image_embedding.positions", "text_embedding.positions"
        return resized | {
            image: resize_grid(resized[image], self.config.grid, "bicubic"),
            text: cut_text_positions(resized[text], self.config.max_text_length),
        }
