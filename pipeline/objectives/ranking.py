"""Ranking texts by how well they fit a picture (ViLT, section 4.2: fine-tuning for retrieval).

Shapes: B rows, N texts a picture is read with, C candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_wrong(keys: Tensor, row_id: Tensor, column_id: Tensor, count: int) -> Tensor:
    """`count` different candidates for each row, none of which shows the row's image: (B, count) int64.

    keys (B, C) are random numbers: the least of them are drawn. Ids (B,) and (C,) are the images'. Where a row has
    fewer others than `count`, they come round again; where it has none, any candidate serves.
    """
    allowed = row_id[:, None] != column_id[None, :]
    allowed = allowed | ~allowed.any(dim=1, keepdim=True)
    order = keys.masked_fill(~allowed, float("inf")).argsort(dim=1, stable=True)
    turn = torch.arange(count, device=keys.device) % allowed.sum(dim=1, keepdim=True)
    return order.gather(1, turn)


def ranking_loss(scores: Tensor) -> Tensor:
    """Cross-entropy that the first of N texts is the picture's, summed over rows; scores (B, N)."""
    target = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return F.cross_entropy(scores.float(), target, reduction="sum")
