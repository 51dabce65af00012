"""Losses that compare a head's output with labels: sums over examples that equal their definitions.

Shapes: 6 examples, 7 classes, 4 answers or 2 masked positions of each example, 5 regions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives import cross_entropy
from pipeline.objectives.mim import mim_loss
from pipeline.objectives.moc import moc_loss
from pipeline.objectives.mrfr import mrfr_loss
from pipeline.objectives.vqa import vqa_loss

LABEL = torch.tensor([0, 3, 1, 2, 2, 0])
WORDS = torch.tensor([[3, -100], [5, 0], [-100, -100], [6, 6], [2, -100], [1, 4]])
POSITIONS = torch.tensor([[0, 3], [2, -1], [1, -1], [4, 0], [-1, -1], [3, 2]])  # of regions; -1 is padding
MASKED = [(*at, int(POSITIONS[at])) for at in map(tuple, torch.nonzero(POSITIONS >= 0).tolist())]
CLASSES = torch.tensor([[0, 1, 2, 3, 4]]) + torch.tensor([[0], [1], [2], [1], [0], [2]])
ANSWERS = torch.tensor([[2, 0, -1, -1], [-1, -1, -1, -1], [3, 1, 2, 6], [5, 4, -1, -1], [0, 1, 2, 3], [6, -1, -1, -1]])
SCORES = torch.linspace(0, 1, 24).view(6, 4)
SOFT_TARGETS = torch.zeros(6, 7)  # the scores of the answers by number; 0 for those that nobody gave
for example, place in torch.nonzero(ANSWERS >= 0).tolist():
    SOFT_TARGETS[example, ANSWERS[example, place]] = SCORES[example, place]


def normal(*shape: int) -> Tensor:
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))


# The loss, the head's output, its other arguments, and the definition of the sum.
Case = tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "classification": (cross_entropy, normal(7), (LABEL,), lambda x, y: 6 * F.cross_entropy(x, y)),
    "nlvr2": (cross_entropy, normal(2), (LABEL % 2,), lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).sum()),
    "itm": (cross_entropy, normal(2), (LABEL > 1,), lambda x, y: -torch.where(y, *x.log_softmax(1).T.flip(0)).sum()),
    "vqa": (
        vqa_loss,
        normal(7),
        (ANSWERS, SCORES),
        lambda x, *_: F.binary_cross_entropy_with_logits(x, SOFT_TARGETS) * 7 * len(x),
    ),
    "mlm": (cross_entropy, normal(2, 7), (WORDS,), lambda x, y: F.cross_entropy(x[y >= 0], y[y >= 0]) * (y >= 0).sum()),
    "mim": (mim_loss, normal(2, 7), (CLASSES[:, :2],), lambda x, y: 12 * F.cross_entropy(x.flatten(0, 1), y.flatten())),
    "moc": (
        moc_loss,
        normal(2, 7),
        (CLASSES, POSITIONS),
        lambda x, classes, _: sum(F.cross_entropy(x[b, k], classes[b, r]) for b, k, r in MASKED),
    ),
    "mrfr": (
        mrfr_loss,
        normal(2, 8),
        (normal(5, 8) + 1, POSITIONS),
        lambda x, features, _: sum((x[b, k] - features[b, r]).norm() ** 2 for b, k, r in MASKED),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_equals_its_definition_and_is_the_sum_over_parts(case: Case) -> None:
    loss, output, labels, definition = case
    torch.testing.assert_close(loss(output, *labels), definition(output, *labels))
    parts = [loss(*(t[rows] for t in (output, *labels))) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(torch.stack(parts).sum(), loss(output, *labels))
    empty = output[:0].clone().requires_grad_()
    total = loss(empty, *(t[:0] for t in labels))
    total.backward()  # every rank takes part in the backward
    assert total == 0


@pytest.mark.parametrize(
    ("name", "padding"), [("vqa", (-1, 0.7)), ("mlm", (-100,)), ("moc", (None, -1)), ("mrfr", (None, -1))]
)
def test_padding_adds_neither_loss_nor_gradient(name: str, padding: tuple[float | None, ...]) -> None:
    loss, output, labels, _ = CASES[name]
    wider = (output.clone() if name == "vqa" else F.pad(output, (0, 0, 0, 3), value=7.0)).requires_grad_()
    longer = [t if value is None else F.pad(t, (0, 3), value=value) for t, value in zip(labels, padding, strict=True)]
    total = loss(wider, *longer)
    torch.testing.assert_close(total, loss(output, *labels))
    total.backward()
    assert name == "vqa" or not wider.grad[:, 2:].any()  # type: ignore[index]
