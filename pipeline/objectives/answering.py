"""Answering questions about a picture (VQA): each listed answer is right to the degree that people gave it.

Shapes: B rows, A listed answers, K answers given to a question (padded).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answering_loss(logits: Tensor, answers: Tensor, scores: Tensor) -> Tensor:
    """Binary cross-entropy summed over rows and all listed answers (as ViLT and VLMo fine-tune; so a row's mean over
    answers is multiplied by their number).

    logits (B, A); answers (B, K) int64 their numbers, -1 at padding; scores (B, K) in 0 … 1.
    """
    return F.binary_cross_entropy_with_logits(
        logits.float(), soft_targets(answers, scores, logits.shape[1]), reduction="sum"
    )


def soft_targets(answers: Tensor, scores: Tensor, count: int) -> Tensor:
    """What each of `count` listed answers is worth: (B, count) float32, 0 for those that nobody gave."""
    given = answers >= 0
    targets = scores.new_zeros(len(answers), count)
    return targets.scatter_add(1, answers.clamp(min=0), scores.where(given, scores.new_zeros(())))
