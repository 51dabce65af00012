"""The NLVR2 loss is the cross-entropy of false and true, summed so that parts of a batch add up."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.objectives.nlvr2 import nlvr2_loss


def test_undecided_model_has_a_loss_of_ln_2() -> None:
    assert nlvr2_loss(torch.zeros(5, 2), torch.tensor([0, 1, 1, 0, 1])).item() == pytest.approx(5 * math.log(2))


def test_second_logit_is_true() -> None:
    sure = torch.tensor([[-20.0, 20.0]])
    assert nlvr2_loss(sure, torch.tensor([1])).item() == pytest.approx(0.0, abs=1e-6)
    assert nlvr2_loss(sure, torch.tensor([0])).item() == pytest.approx(40.0)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 1, 0, 0, 1, 1])
    cut = [nlvr2_loss(*each) for each in zip(logits.chunk(parts), label.chunk(parts), strict=True)]
    torch.testing.assert_close(torch.stack(cut).sum(), nlvr2_loss(logits, label))
