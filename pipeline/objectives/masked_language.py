"""Masked language modelling (MLM): name the tokens that were hidden (BERT).

Shapes: B rows, K masked tokens a row (padded), V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a padded position


def masked_language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over masked tokens; logits (B, K, V), labels (B, K) with -100 where there is none."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def masked_count(labels: Tensor) -> Tensor:
    """How many tokens the loss sums over (0-d int64)."""
    return (labels != IGNORED).sum()


def correct_count(logits: Tensor, labels: Tensor) -> Tensor:
    """How many masked tokens have the highest logit at their label (0-d int64)."""
    return (logits.argmax(dim=-1) == labels).sum()
