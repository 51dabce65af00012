"""The classification loss is a sum over examples, so that parts of a batch add up."""

from __future__ import annotations

import torch

from pipeline.objectives.classification import classification_loss


def test_parts_add_up_to_the_mean_of_the_whole() -> None:
    logits, label = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    whole = torch.nn.functional.cross_entropy(logits, label)
    parts = classification_loss(logits[:1], label[:1]) + classification_loss(logits[1:], label[1:])
    torch.testing.assert_close(parts / 6, whole)
    assert classification_loss(logits[:0], label[:0]) == 0
