"""Losses of masked regions are sums over masked positions, so that parts of a batch add up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.objectives.moc import moc_loss
from pipeline.objectives.mrfr import mrfr_loss

POSITIONS = torch.tensor([[0, 3], [2, -1], [1, -1], [4, 0]])
MASKED = [(0, 0, 0), (0, 1, 3), (1, 0, 2), (2, 0, 1), (3, 0, 4), (3, 1, 0)]  # example, masked position, region


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_moc_loss_is_the_sum_of_cross_entropies(draw: torch.Generator) -> None:
    logits, classes = torch.randn(4, 2, 7, generator=draw), torch.randint(0, 7, (4, 5), generator=draw)
    expected = sum(F.cross_entropy(logits[b, k], classes[b, r]) for b, k, r in MASKED)
    torch.testing.assert_close(moc_loss(logits, classes, POSITIONS), expected)


def test_mrfr_loss_is_the_sum_of_squared_distances(draw: torch.Generator) -> None:
    predicted, features = torch.randn(4, 2, 6, generator=draw), torch.randn(4, 5, 6, generator=draw)
    expected = sum((predicted[b, k] - features[b, r]).norm() ** 2 for b, k, r in MASKED)
    torch.testing.assert_close(mrfr_loss(predicted, features, POSITIONS), expected)


def test_sums_and_counts_of_parts_add_up(draw: torch.Generator) -> None:
    logits, classes = torch.randn(4, 2, 7, generator=draw), torch.randint(0, 7, (4, 5), generator=draw)
    predicted, features = torch.randn(4, 2, 6, generator=draw), torch.randn(4, 5, 6, generator=draw)
    parts = [slice(0, 1), slice(1, 4), slice(4, 4)]
    for loss, one, other in (
        (moc_loss, logits, classes),
        (mrfr_loss, predicted, features),
    ):
        cut = sum(loss(one[part], other[part], POSITIONS[part]) for part in parts)
        torch.testing.assert_close(cut, loss(one, other, POSITIONS))


def test_examples_without_masked_regions_add_zero() -> None:
    logits, predicted = torch.randn(2, 1, 7, requires_grad=True), torch.randn(2, 1, 6, requires_grad=True)
    nowhere = torch.full((2, 1), -1)
    total = moc_loss(logits, torch.zeros(2, 5, dtype=torch.int64), nowhere)
    total = total + mrfr_loss(predicted, torch.zeros(2, 5, 6), nowhere)
    total.backward()
    assert total == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))  # type: ignore[arg-type]


def test_a_perfect_prediction_has_no_loss(draw: torch.Generator) -> None:
    features = torch.randn(4, 5, 6, generator=draw)
    rows = torch.arange(4)[:, None]
    assert mrfr_loss(features[rows, POSITIONS.clamp(min=0)], features, POSITIONS) == 0
