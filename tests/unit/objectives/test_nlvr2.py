"""NLVR2's loss: cross-entropy of false and true, a sum that parts of a batch add up to."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.objectives.nlvr2 import nlvr2_loss


def test_an_undecided_model_pays_ln_2_for_each_statement() -> None:
    assert nlvr2_loss(torch.zeros(5, 2), torch.tensor([0, 1, 1, 0, 1])).item() == pytest.approx(5 * math.log(2))


def test_the_second_logit_is_the_true_one() -> None:
    sure = torch.tensor([[-20.0, 20.0]])
    assert nlvr2_loss(sure, torch.tensor([1])).item() == pytest.approx(0.0, abs=1e-6)
    assert nlvr2_loss(sure, torch.tensor([0])).item() == pytest.approx(40.0)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_cut_into_parts_has_the_same_sum(parts: int) -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 1, 0, 0, 1, 1])
    cut = [nlvr2_loss(*each) for each in zip(logits.chunk(parts), label.chunk(parts), strict=True)]
    torch.testing.assert_close(torch.stack(cut).sum(), nlvr2_loss(logits, label))
