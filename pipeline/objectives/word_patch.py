"""Word-patch alignment (WPA): words are moved onto patches at least cost, by optimal transport (UNITER, ViLT).

The plan comes from IPOT (arXiv 1802.04307), an inexact proximal point method: `OUTER` steps of a Sinkhorn-like
scaling with `INNER` iterations each. The plan is a constant to the gradient, which flows through the costs alone. All
of it is float32, under autocast too. Padding is left out by masks and not by huge numbers, so that a caption without
a word, or a picture without a patch, has an empty plan and costs nothing (the published code divides by zero).

Shapes: B rows, L words, P patches, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.5  # the proximal step: the cost is divided by it
OUTER = 50
INNER = 1
NORM_EPSILON = 1e-5  # the least norm a feature is divided by


def word_patch_cost(words: Tensor, patches: Tensor) -> Tensor:
    """1 - cosine of every word (B, L, D) with every patch (B, P, D): (B, L, P) float32."""
    with torch.autocast(words.device.type, enabled=False):
        unit_words = F.normalize(words.float(), dim=-1, eps=NORM_EPSILON)
        unit_patches = F.normalize(patches.float(), dim=-1, eps=NORM_EPSILON)
        return 1 - unit_words @ unit_patches.transpose(1, 2)


@torch.no_grad()
def word_patch_plan(
    cost: Tensor, words_keep: Tensor, patches_keep: Tensor, beta: float = BETA, outer: int = OUTER, inner: int = INNER
) -> Tensor:
    """How much of each word goes to each patch, by costs (B, L, P): (B, L, P) float32 that sums to 1 a row.

    words_keep (B, L) and patches_keep (B, P) are bool, False at what takes no part ([CLS], [SEP], padding); the plan
    is 0 there, and everywhere in a row where nothing takes part on one side. It has no gradient.
    """
    with torch.autocast(cost.device.type, enabled=False):
        takes_part = words_keep[:, :, None] & patches_keep[:, None, :]
        kernel = torch.exp(-cost.float() / beta) * takes_part
        num_words = words_keep.sum(dim=1, keepdim=True).clamp(min=1).float()
        num_patches = patches_keep.sum(dim=1, keepdim=True).clamp(min=1).float()
        plan = takes_part.float()
        of_word = words_keep / num_words
        for _ in range(outer):
            step = kernel * plan
            for _ in range(inner):
                of_patch = _inverse(num_patches * torch.einsum("blp, bl -> bp", step, of_word), patches_keep)
                of_word = _inverse(num_words * torch.einsum("blp, bp -> bl", step, of_patch), words_keep)
            plan = of_word[:, :, None] * step * of_patch[:, None, :]
        return plan


def word_patch_distance(cost: Tensor, plan: Tensor) -> Tensor:
    """What the plan costs, row by row: (B,) float32; the gradient is the plan's."""
    return (cost.float() * plan).sum(dim=(1, 2))


def word_patch_loss(
    words: Tensor, patches: Tensor, words_keep: Tensor, patches_keep: Tensor, matched: Tensor
) -> Tensor:
    """The distances of matched pairs minus those of the others, summed over rows: 0-d float32 (ViLT, section 3.2).

    words (B, L, D) and patches (B, P, D) are final features, `matched` (B,) bool. Mismatched pairs are so pushed
    apart. The published loss divides by the batch and weighs 0.1.
    """
    cost = word_patch_cost(words, patches)
    distance = word_patch_distance(cost, word_patch_plan(cost.detach(), words_keep, patches_keep))
    return torch.where(matched, distance, -distance).sum()


def _inverse(marginal: Tensor, keep: Tensor) -> Tensor:
    """1 / marginal where something takes part, else 0."""
    return torch.where(keep & (marginal > 0), 1 / marginal.where(marginal > 0, 1), 0)
