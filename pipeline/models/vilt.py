"""ViLT (arXiv 2102.03334): one transformer over words and patches; images keep their aspect ratio.

It is a multiway encoder with one expert, absolute positions, and a key bias as published. The images of a batch are at
the top left of a canvas as large as the largest; their extent is given, never guessed from pixels. Patches are numbered
row by row over the image itself, so that no number depends on the canvas.

Shapes: B examples, H x W pixels of the canvas, L tokens, P patches of the canvas, K visible patches, g side of the
position grid, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import TransformerConfig, ViLTConfig
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding
from pipeline.models.heads import FloatHead, masked_language_head, pooled_head, pooler
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import Expert, MultiwayBlock, gather, key_padding, run_blocks
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import cut_text_positions, resize_grid

EXPERT: Expert = "vision_language"
_ENCODER = ("text_embedding", "image_embedding", "blocks", "norm")
_FUSED = frozenset(_ENCODER)


class ShapedImageEmbedding(ImageEmbedding):
    """Patch embedding of images of any shape; the square position grid is resized to each image."""

    def forward(self, packed: PackedInputs) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Embed images on a canvas: (B, 1 + K, D), and a bool mask (B, 1 + K) of the real tokens."""
        image, visible = packed.image, packed.visible_patches
        assert image is not None
        if image.dim() != 4 or image.shape[3] != 3 or any(side % self.patch_size for side in image.shape[1:3]):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which expects (batch, height, "
                f"width, 3) with sides that are multiples of {self.patch_size}; crop or pad the images"
            )
        height, width = (side // self.patch_size for side in image.shape[1:3])
        masked, replacements = packed.masking(height * width)
        if packed.image_size is None:
            grid = torch.tensor([[height, width]], device=image.device).expand(len(image), 2)
        else:
            grid = packed.image_size // self.patch_size
        if visible is None:
            visible = torch.arange(height * width, device=image.device).expand(len(image), -1)
        keep = (visible >= 0) & (visible < grid.prod(dim=1, keepdim=True))
        visible = visible.where(keep, 0)
        shown = visible if replacements is None else replacements.gather(1, visible)
        patches = gather(self.patchify(image), canvas_patches(shown, grid, width))
        x = self.project(patches, None if masked is None else masked.gather(1, visible))
        assert self.positions is not None
        x = x + resized_positions(self.positions[1:], visible, grid)
        x = torch.cat([(self.cls + self.positions[0]).expand(len(x), 1, -1), x], dim=1)
        return self.add_modality(x, packed.is_second), F.pad(keep, (1, 0), value=True)


def canvas_patches(patches: Tensor, grid: Tensor, width: int) -> Tensor:
    """Convert patch numbers over an image to numbers over its canvas, which is `width` patches wide: (B, K) int64.

    patches (B, K) are numbers of real patches, grid (B, 2) each image's rows and columns of patches.
    """
    columns = grid[:, 1:]
    return torch.div(patches, columns, rounding_mode="floor") * width + patches % columns


def resized_positions(positions: Tensor, patches: Tensor, grid: Tensor) -> Tensor:
    """Interpolate a square grid of positions (g², D) at `patches` (B, K) of images with `grid` (B, 2): (B, K, D).

    Bilinear with aligned corners (`resize.resize_grid`), for images of all shapes at once: a patch is between four
    points of the square and weighs each by a hat function of its distance.
    """
    side, columns = round(len(positions) ** 0.5), grid[:, 1:]
    points = torch.arange(side, device=positions.device)
    hats = []  # (B, K, g): weights of the rows and of the columns of points
    for index, count in (
        (torch.div(patches, columns, rounding_mode="floor"), grid[:, :1]),
        (patches % columns, columns),
    ):
        position = index * ((side - 1) / (count - 1).clamp(min=1))
        hats.append((1 - (position.unsqueeze(-1) - points).abs()).clamp(min=0))
    weights = (hats[0].unsqueeze(-1) * hats[1].unsqueeze(-2)).flatten(2)  # (B, K, g²)
    return weights.to(positions.dtype) @ positions


class ViLT(Model):
    # The second image's modality vector is a part of `nlvr2_head`, the mask embedding of `mim_head`.
    HEAD_PARTS: ClassVar = ("pooler", "itm_head", "mlm_head", "mim_head", "vqa_head", "nlvr2_head", "ranking_head")
    PARTS: ClassVar = _ENCODER + HEAD_PARTS
    ENCODER_PARTS: ClassVar = {
        frozenset({"image", "text"}): _FUSED,
        frozenset({"text"}): _FUSED - {"image_embedding"},
        frozenset({"image"}): _FUSED - {"text_embedding"},
    }
    HEADS: ClassVar = ("itm", "mlm", "mim", "alignment", "answers", "nlvr2", "ranking")
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})
    RESIZE_RULES: ClassVar = {
        "image_embedding.positions": lambda positions, config: resize_grid(positions, config.grid, "bilinear"),
        "text_embedding.positions": lambda positions, config: cut_text_positions(positions, config.max_text_length),
    }

    config: ViLTConfig

    def __init__(self, config: ViLTConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, epsilon, text_epsilon = config.width, config.norm_eps, config.text_norm_eps
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, True, text_epsilon)
        self.image_embedding = ShapedImageEmbedding(
            config.image_size, config.patch_size, width, True, heads.covers_patches, second=heads.nlvr2
        )
        self.blocks = nn.ModuleList(
            MultiwayBlock(width, config.heads, config.mlp_ratio, (EXPERT,), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.pooler = pooler(width)
        self.itm_head = FloatHead(classify=nn.Linear(width, 2))  # (not matched, matched)
        self.mlm_head = masked_language_head(width, vocabulary, text_epsilon)
        self.mim_head = self.build_mim_head()
        self.vqa_head = pooled_head(width, 2 * width, heads.answers) if heads.answers else None
        self.nlvr2_head = pooled_head(2 * width, 2 * width, 2) if heads.nlvr2 else None
        self.ranking_head = FloatHead(score=nn.Linear(width, 1), flatten=nn.Flatten(0)) if heads.ranking else None

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        """Encode the text followed by the image, or the one that is given."""
        tokens, keeps = [], []
        if packed.text is not None and packed.text_keep is not None:
            tokens.append(self.text_embedding(packed.text))
            keeps.append(packed.text_keep)
        if packed.image is not None:
            patches, keep = self.image_embedding(packed)
            tokens.append(patches)
            keeps.append(keep)
        x = torch.cat(tokens, dim=1)
        padding = key_padding(torch.cat(keeps, dim=1), x.dtype)
        x = run_blocks(self.blocks, x, EXPERT, padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Resize to another image size or text length, or start from a ViT as the paper does, with new words.

        The ranking head starts from the matching head's row of "matched".
        """
        if before.kind == "vit":
            keys = ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")
            own, prefixes = self.state_dict(), ("text_embedding.", "image_embedding.modality")
            state = {name: own[name] for name in own if name.startswith(prefixes)} | {
                name.replace(".experts.vision.", f".experts.{EXPERT}."): tensor
                for name, tensor in state.items()
                if not name.startswith("classification_head.")
            }
            before = self.config.model_copy(update={key: getattr(before, key) for key in keys})
        resized = super().resize_state(state, before)
        if self.heads.ranking and "itm_head.classify.weight" in resized:
            for name in ("weight", "bias"):
                resized.setdefault(f"ranking_head.score.{name}", resized[f"itm_head.classify.{name}"][1:].clone())
        return resized
