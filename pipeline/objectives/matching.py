"""Image-text matching (ITM) with hard negatives drawn from the whole global batch (ALBEF, VLMo).

Shapes: R rows to find negatives for, N candidates of the global batch, B rows to judge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_negatives(similarity: Tensor, row_id: Tensor, column_id: Tensor, uniform: Tensor) -> Tensor:
    """One candidate for each row, with probability softmax(similarity) among those that show another image: (R,) int64.

    similarity (R, N) are scaled logits, row_id (R,) and column_id (N,) image ids, uniform (R,) numbers in [0, 1) that
    decide the draw. Equals are removed before the softmax, so that a confident row still has probability to give.
    A row whose logits are not finite draws uniformly among the others; a row that has no other draws among all.
    """
    allowed = row_id[:, None] != column_id[None, :]
    allowed = allowed | ~allowed.any(dim=1, keepdim=True)
    chance = similarity.float().masked_fill(~allowed, float("-inf")).softmax(dim=1)
    chance = torch.where(chance.isfinite().all(dim=1, keepdim=True), chance, allowed.float()).double()
    edges = chance.cumsum(dim=1)
    # Asked of every candidate, not searched for: a parallel sum need not be monotone, and an equal has width 0.
    possible = chance > 0
    reached = possible & (edges > uniform.double()[:, None] * edges[:, -1:])
    last = chance.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(reached.any(dim=1), reached.int().argmax(dim=1), last)


def matching_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy summed over rows; logits (B, 2) of not matched and matched, `matched` (B,) bool or 0/1."""
    return F.cross_entropy(logits.float(), matched.long(), reduction="sum")
