"""What the objectives read off the encoder's features. Every result is float32, whatever the parameters are.

Shapes: B rows, K positions a row, D width, V vocabulary.
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
    """One or two projections of each modality's [CLS]: its own expert's, and the vision-language expert's."""

    def __init__(self, width: int, max_scale: float = MAX_SCALE, contrasts: Literal[1, 2] = 2) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.suffixes = ("", "_vl")[:contrasts]
        for suffix in self.suffixes:
            for name in ("image", "text"):
                self.add_module(f"{name}{suffix}", nn.Linear(width, width, bias=False))
            # One element, not 0-d: DeepSpeed broadcasts parameters as bytes, which 0-d tensors cannot be viewed as.
            self.register_parameter(f"log_scale{suffix}", nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)])))

    def forward(self, modality: Literal["image", "text"], *cls: Tensor) -> dict[str, Tensor]:
        """A [CLS] (B, D) for each contrast -> `itc` and `itc_vl`, unit vectors (B, D); `scale` and `scale_vl`, 0-d."""
        outputs = {}
        for suffix, features in zip(self.suffixes, cls, strict=True):
            projected = self.get_submodule(f"{modality}{suffix}")(features)
            outputs[f"itc{suffix}"] = F.normalize(projected.float(), dim=-1)
            outputs[f"scale{suffix}"] = _scale(self.get_parameter(f"log_scale{suffix}"), self.max_scale)
        return outputs


class SharedSpaceHead(nn.Module):
    """CLIP's: a projection of each modality's [CLS] into the space that pictures and texts share."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, embedding, bias=False)
        self.text = nn.Linear(width, embedding, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)]))

    def forward(self, modality: Literal["image", "text"], cls: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] (B, D) -> unit vectors (B, E) and the scale (0-d)."""
        return F.normalize(self.get_submodule(modality)(cls).float(), dim=-1), _scale(self.log_scale)


def _scale(log_scale: Tensor, most: float = MAX_SCALE) -> Tensor:
    return log_scale.float().exp().clamp(max=most).squeeze(0)


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
    """Hidden patches (B, K, D) -> logits of colour classes, or pixels: (B, K, targets)."""

    def __init__(self, width: int, targets: int) -> None:
        super().__init__()
        self.predict = nn.Linear(width, targets)

    def forward(self, patches: Tensor) -> Tensor:
        return self.predict(patches).float()


class ClassificationHead(nn.Module):
    """ViT's: [CLS] (B, D) -> logits (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, classes)

    def forward(self, cls: Tensor) -> Tensor:
        return self.classify(cls).float()


class PooledHead(nn.Module):
    """What ViLT and VLMo fine-tune for VQA and NLVR2: pooled features (B, D) -> logits (B, targets)."""

    def __init__(self, width: int, hidden: int, targets: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden, targets)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classify(F.gelu(self.norm(self.expand(pooled)))).float()


class RankingHead(nn.Module):
    """ViLT's for retrieval: pooled [CLS] (B, D) -> scores (B,), the higher the better text and image fit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.score(pooled).squeeze(-1).float()
