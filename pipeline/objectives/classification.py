"""Classification of pictures (ViT, section 3.1): name the class.

Shapes: B rows, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over rows; logits (B, C), label (B,) int64."""
    return F.cross_entropy(logits.float(), label, reduction="sum")
