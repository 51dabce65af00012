"""The MLM loss is a sum over masked tokens, equal on any number of ranks and unaffected by padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.mlm import correct_count, masked_count, mlm_loss

ROWS, MASKED, VOCABULARY = 8, 4, 11


def prediction() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, MASKED, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, MASKED), generator=generator)
    labels[torch.arange(MASKED) >= torch.arange(ROWS)[:, None] % 4 + 1] = -100
    return logits, labels


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharded_batch_has_the_same_sums(ranks: int) -> None:
    logits, labels = prediction()
    parts = list(zip(logits.chunk(ranks), labels.chunk(ranks), strict=True))
    torch.testing.assert_close(sum(mlm_loss(*part) for part in parts), mlm_loss(logits, labels))
    assert sum(masked_count(part[1]) for part in parts) == masked_count(labels) == 20
    assert sum(correct_count(*part) for part in parts) == correct_count(logits, labels)


def test_padded_positions_add_zero() -> None:
    logits, labels = prediction()
    wider = F.pad(logits, (0, 0, 0, 3), value=7.0), F.pad(labels, (0, 3), value=-100)
    torch.testing.assert_close(mlm_loss(*wider), mlm_loss(logits, labels))
    assert correct_count(*wider) == correct_count(logits, labels)


def test_the_sum_over_its_count_is_the_mean_cross_entropy() -> None:
    logits, labels = prediction()
    real = labels >= 0
    expected = F.cross_entropy(logits[real], labels[real])
    torch.testing.assert_close(mlm_loss(logits, labels) / masked_count(labels), expected)


def test_batch_without_masks_has_zero_loss_and_gradient() -> None:
    logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
    loss = mlm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_correct_predictions_are_counted() -> None:
    _, labels = prediction()
    perfect = F.one_hot(labels.clamp(min=0), VOCABULARY).float()
    assert correct_count(perfect, labels) == masked_count(labels)
