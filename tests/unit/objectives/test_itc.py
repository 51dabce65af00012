"""The ITC loss equals its definition on any number of ranks, and equal images are no negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.itc import itc_loss

PAIRS, WIDTH = 12, 6
DISTINCT = torch.arange(PAIRS)
REPEATED = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1, 8, 9, 10, 0])


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Return unit vectors of images and texts, and the logit scale."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(14.0, requires_grad=True)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_batch_has_the_same_sum_and_gradient(ranks: int) -> None:
    whole, cut = features(), features()
    expected = itc_loss(*whole, REPEATED)
    actual = torch.stack([itc_loss(*cut, REPEATED, rows) for rows in torch.arange(PAIRS).chunk(ranks)]).sum()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, cut), torch.autograd.grad(expected, whole))


def test_distinct_images_give_the_plain_symmetric_cross_entropy_in_any_order_and_in_float32() -> None:
    image, text, scale = features()
    logits, target = scale * image @ text.T, torch.arange(PAIRS)
    plain = (F.cross_entropy(logits, target, reduction="sum") + F.cross_entropy(logits.T, target, reduction="sum")) / 2
    torch.testing.assert_close(itc_loss(image, text, scale, DISTINCT), plain)
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1))
    shuffled = itc_loss(image[order], text[order], scale, REPEATED[order])
    torch.testing.assert_close(shuffled, itc_loss(image, text, scale, REPEATED))
    same = torch.ones(PAIRS, WIDTH) / WIDTH**0.5
    assert itc_loss(same, same, scale, DISTINCT).item() == pytest.approx(PAIRS * math.log(PAIRS), rel=1e-5)
    rounded = [tensor.bfloat16() for tensor in (image, text, scale)]
    loss = itc_loss(*rounded, DISTINCT)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, itc_loss(*(tensor.float() for tensor in rounded), DISTINCT))


def test_trap_03_equal_images_are_never_negatives() -> None:
    (image, text, scale), total = features(), 0.0
    for i in range(PAIRS):
        others = [j for j in range(PAIRS) if j == i or REPEATED[j] != REPEATED[i]]
        for query, candidates in ((image[i], text), (text[i], image)):
            total -= (scale * candidates[others] @ query).log_softmax(0)[others.index(i)].item() / 2
    assert itc_loss(image, text, scale, REPEATED).item() == pytest.approx(total, rel=1e-5)
    of_one_image = itc_loss(image, text, scale, torch.zeros(PAIRS, dtype=torch.int64))
    assert of_one_image == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(of_one_image, [image, text]))
