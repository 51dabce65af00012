"""Heads with outputs in float32 whatever the parameters' precision; `Model.build_heads` has the simple ones.

Shapes: B examples, K positions or masked patches, V vocabulary or visible patches, P patches, g x g grid, D width,
E embedding width, W width of the image decoder.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ImageDecoderConfig
from pipeline.models.multiway import EPSILON, MultiwayBlock, key_padding, run_blocks

MAX_SCALE = 100.0  # CLIP's bound
INITIAL_SCALE = 1 / 0.07
DECODER_RATIO = 4  # of the image decoder's feed-forward width to its own
LONGEST_WAVE = 10_000.0  # of the image decoder's positions, in radians times patches


class ContrastiveHead(nn.Module):
    """Projections of each modality's [CLS] into one space, with a learned logit scale.

    With two contrasts (VLMo), the second one projects the [CLS] of the vision-language expert.
    """

    def __init__(
        self, width: int, max_scale: float = MAX_SCALE, contrasts: Literal[1, 2] = 2, embedding: int | None = None
    ) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.suffixes = ("", "_vl")[:contrasts]
        for suffix in self.suffixes:
            for name in ("image", "text"):
                self.add_module(f"{name}{suffix}", nn.Linear(width, embedding or width, bias=False))
            # One element, not 0-d: DeepSpeed broadcasts parameters as bytes, which 0-d tensors cannot be viewed as.
            self.register_parameter(f"log_scale{suffix}", nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)])))

    def forward(self, modality: Literal["image", "text"], *cls: Tensor) -> dict[str, Tensor]:
        """Return `itc`, `itc_vl`, unit vectors (B, E), and `scale`, `scale_vl` (0-d), from one [CLS] (B, D) each."""
        outputs = {}
        for suffix, features in zip(self.suffixes, cls, strict=True):
            projected = self.get_submodule(f"{modality}{suffix}")(features)
            log_scale = self.get_parameter(f"log_scale{suffix}")
            outputs[f"itc{suffix}"] = F.normalize(projected.float(), dim=-1)
            outputs[f"scale{suffix}"] = log_scale.float().exp().clamp(max=self.max_scale).squeeze(0)
        return outputs


class ImageDecoder(nn.Module):
    """MAE's decoder (arXiv 2111.06377, section 3): predicts the patches that the encoder never read.

    A light transformer reads the encoder's features of the visible patches, and for each masked one an embedding with
    its position. Positions are fixed, so that weights serve any grid: zeros for [CLS]; then, for each patch, the first
    half encodes the column and the second the row, as sines, then cosines.
    """

    positions: Tensor

    def __init__(self, width: int, grid: int, targets: int, config: ImageDecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(width, config.width)
        self.mask = nn.Parameter(torch.empty(config.width))
        frequency = torch.exp(-math.log(LONGEST_WAVE) * torch.arange(config.width // 4) / (config.width // 4))
        angle = torch.arange(grid)[:, None] * frequency
        axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (g, W / 2)
        places = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
        self.register_buffer("positions", F.pad(places, (0, 0, 1, 0)), persistent=False)  # (1 + P, W)
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, DECODER_RATIO, ("vision",), None, 0.0, key_bias=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.predict = nn.Linear(config.width, targets)

    def forward(self, features: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return predictions (B, K, targets) float32 for the patches `masked` (B, K).

        `features` (B, 1 + V, D) are those of [CLS] and of the patches `visible` (B, V), padding where that is negative.
        """
        encoded = self.embed(features)
        positions = self.positions.to(encoded.dtype)
        known = encoded + F.embedding(F.pad(visible.clamp(min=0) + 1, (1, 0)), positions)
        x = torch.cat([known, self.mask + F.embedding(masked + 1, positions)], dim=1)
        padding = key_padding(F.pad(visible >= 0, (1, masked.shape[1]), value=True), x.dtype)
        outputs = torch.arange(known.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
        return self.predict(self.norm(run_blocks(self.blocks, x, "vision", padding, None, outputs))).float()
