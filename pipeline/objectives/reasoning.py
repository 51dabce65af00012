"""Judging a statement about two pictures (NLVR2): true or false.

Shapes: B rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reasoning_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over rows; logits (B, 2) of false and true, label (B,) int64, 1 where it is true."""
    return F.cross_entropy(logits.float(), label, reduction="sum")
