"""MAE's decoder (arXiv 2111.06377, section 3): predicts the patches that the encoder never read.

The encoder spends nothing on masked patches. This light transformer reads the encoder's features of the visible ones,
and for each masked patch one embedding with its position. Positions are fixed sines and cosines, so that weights serve
any grid.

Shapes: B examples, V visible and K masked patches, P patches, g x g grid, D width of the encoder, W of the decoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ImageDecoderConfig, TransformerConfig
from pipeline.models.embeddings import visible_padding
from pipeline.models.heads import FloatHead
from pipeline.models.model import COLOUR_CLASSES, HeadConfig
from pipeline.models.multiway import EPSILON, MultiwayBlock, run_blocks

FEED_FORWARD_RATIO = 4
LONGEST_WAVE = 10_000.0  # of the positions, in radians times patches


class ImageDecoder(nn.Module):
    positions: Tensor

    def __init__(self, width: int, grid: int, targets: int, config: ImageDecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(width, config.width)
        self.mask = nn.Parameter(torch.empty(config.width))
        self.register_buffer("positions", sine_positions(grid, config.width), persistent=False)
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, FEED_FORWARD_RATIO, ("vision",), None, 0.0, key_bias=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.predict = nn.Linear(config.width, targets)

    def forward(self, features: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return predictions (B, K, targets) float32 for the patches `masked` (B, K).

        `features` (B, 1 + V, D) are those of [CLS] and of the patches `visible` (B, V), padding where that is negative.
        Masked tokens follow the others: tokens have their positions added, so that their order does not matter.
        """
        encoded = self.embed(features)
        positions = self.positions.to(encoded.dtype)
        known = encoded + F.embedding(F.pad(visible.clamp(min=0) + 1, (1, 0)), positions)
        x = torch.cat([known, self.mask + F.embedding(masked + 1, positions)], dim=1)
        padding = F.pad(visible_padding(visible, x.dtype), (0, masked.shape[1]))
        outputs = torch.arange(known.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
        return self.predict(self.norm(run_blocks(self.blocks, x, "vision", padding, None, outputs))).float()


def sine_positions(grid: int, width: int) -> Tensor:
    """Return fixed positions (1 + P, W) float32 of [CLS], which are zeros, and of a g x g grid.

    The first half of each vector encodes the column and the second the row, as sines, then cosines.
    """
    frequency = torch.exp(-math.log(LONGEST_WAVE) * torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (g, W / 2)
    across, down = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([torch.zeros(1, width), torch.cat([across, down], dim=1)])


def build_mim_head(config: TransformerConfig, heads: HeadConfig) -> FloatHead | ImageDecoder | None:
    """Build the head that predicts masked patches; None for a stage that masks no images."""
    if heads.image_target is None:
        return None
    pixels, tokens = 3 * config.patch_size**2, heads.visual_tokens
    targets = {"mean_colour": COLOUR_CLASSES, "pixels": pixels, "visual_tokens": tokens}[heads.image_target]
    if heads.image_decoder is None:
        return FloatHead(predict=nn.Linear(config.width, targets))
    return ImageDecoder(config.width, config.grid, targets, heads.image_decoder)
