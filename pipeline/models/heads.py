"""Heads that map encoder features to an objective's outputs, in float32 whatever the parameters' precision.

Shapes: B examples, K positions, D width, E embedding width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # CLIP's bound
INITIAL_SCALE = 1 / 0.07
TEXT_EPSILON = 1e-12  # BERT's


class FloatHead(nn.Sequential):
    """Named layers applied in order, with float32 outputs."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).float()


def pooler(width: int) -> nn.Sequential:
    """Build BERT's pooler: [CLS] (B, D) -> (B, D)."""
    return nn.Sequential(OrderedDict(dense=nn.Linear(width, width), tanh=nn.Tanh()))


def masked_language_head(width: int, vocabulary: int, epsilon: float = TEXT_EPSILON) -> FloatHead:
    """Build BERT's transform and a decoder with weights of its own: (B, K, D) -> logits (B, K, V)."""
    norm = nn.LayerNorm(width, eps=epsilon)
    return FloatHead(dense=nn.Linear(width, width), gelu=nn.GELU(), norm=norm, decode=nn.Linear(width, vocabulary))


def pooled_head(width: int, hidden: int, targets: int) -> FloatHead:
    """Build ViLT's and VLMo's head for VQA and NLVR2: pooled features (B, D) -> logits (B, targets)."""
    expand, classify = nn.Linear(width, hidden), nn.Linear(hidden, targets)
    return FloatHead(expand=expand, norm=nn.LayerNorm(hidden), gelu=nn.GELU(), classify=classify)


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
