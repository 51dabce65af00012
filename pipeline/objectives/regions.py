"""Masked regions (ImageBERT, 3.3): name the detector's class of each (MOC), and give back its feature vector (MRFR).

Both are read at the same masked regions, of true pairs only: a wrong caption or wrong regions say nothing of what was
hidden (the paper's conditional mask). Matching, the third loss on regions, is `itm`'s.

Shapes: B rows, R regions, K masked regions a row (padded with -1), C classes, F numbers of a region.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def region_class_loss(logits: Tensor, classes: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy to the detector's most likely class, summed over masked regions.

    logits (B, K, C), classes (B, R) int64, positions (B, K) int64 with -1 where there is none.
    """
    is_masked = positions >= 0
    expected = classes.gather(1, positions.clamp(min=0))[is_masked]
    return F.cross_entropy(logits[is_masked].float(), expected, reduction="sum")


def region_features_loss(predicted: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """The squared L2 distance to what the detector saw, summed over masked regions and over the F numbers of each.

    predicted (B, K, F), features (B, R, F) as they were before masking, positions (B, K) int64 with -1 where there is
    none. The paper divides by no F (UNITER's release does): divided by `masked_region_count` it is a region's mean
    squared distance, which grows with F and with the scale of the features.
    """
    is_masked = positions >= 0
    where = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, features.shape[-1])
    return (predicted - features.gather(1, where))[is_masked].float().square().sum()


def masked_region_count(positions: Tensor) -> Tensor:
    """How many masked regions the losses sum over (0-d int64)."""
    return torch.count_nonzero(positions >= 0)
