"""Heads that map encoder features to an objective's outputs, in float32 whatever the parameters' precision.

Shapes: B examples, K positions, D width, E embedding width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # CLIP's bound
INITIAL_SCALE = 1 / 0.07
TEXT_EPSILON = 1e-12  # BERT's


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


class Pooler(nn.Module):
    """BERT's pooler: (B, D) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls))


class MatchingHead(nn.Module):
    """Pooled [CLS] (B, D) -> logits (B, 2) of not matched, matched."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classify(pooled).float()


class MaskedLanguageHead(nn.Module):
    """BERT's transform, then a decoder with weights of its own: (B, K, D) -> logits (B, K, V)."""

    def __init__(self, width: int, vocabulary: int, epsilon: float = TEXT_EPSILON) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.decode = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.norm(F.gelu(self.dense(tokens)))).float()


class MaskedImageHead(nn.Module):
    """Masked patches (B, K, D) -> logits of colour classes or visual tokens, or pixels: (B, K, targets)."""

    def __init__(self, width: int, targets: int) -> None:
        super().__init__()
        self.predict = nn.Linear(width, targets)

    def forward(self, patches: Tensor) -> Tensor:
        return self.predict(patches).float()


class ClassificationHead(nn.Module):
    """ViT's head: [CLS] (B, D) -> logits (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, classes)

    def forward(self, cls: Tensor) -> Tensor:
        return self.classify(cls).float()


class PooledHead(nn.Module):
    """ViLT's and VLMo's head for VQA and NLVR2: pooled features (B, D) -> logits (B, targets)."""

    def __init__(self, width: int, hidden: int, targets: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden, targets)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classify(F.gelu(self.norm(self.expand(pooled)))).float()


class RankingHead(nn.Module):
    """ViLT's head for retrieval: pooled [CLS] (B, D) -> scores (B,), higher for a better match."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.score(pooled).squeeze(-1).float()
