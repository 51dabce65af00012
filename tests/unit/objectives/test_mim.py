"""MIM: targets of patches (colour classes, pixels), their losses, and images painted from predictions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.objectives.mim import mean_colour_targets, mim_loss, patchify, pixel_targets, reconstruct, unpatchify

ROWS, SIDE, PATCH, MASKED = 8, 12, 4, 5


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (ROWS, SIDE, SIDE, 3), generator=generator).to(torch.uint8)
    return image, torch.rand(ROWS, 9, generator=generator).argsort(dim=1)[:, :MASKED]


def test_cutting_and_joining_gives_the_image() -> None:
    image, _ = pictures()
    assert torch.equal(unpatchify(patchify(image, PATCH), PATCH), image)
    assert torch.equal(patchify(image, PATCH)[0, 5].view(PATCH, PATCH, 3), image[0, 4:8, 8:12])


def test_colour_class_is_the_three_highest_bits_per_channel_of_the_mean() -> None:
    image = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    image[0, :4, :4] = torch.tensor([255, 31, 32])
    image[0, :4, 4:8] = torch.tensor([0, 255, 128])
    image[0, 4:6, :4] = 255
    targets = mean_colour_targets(image, torch.tensor([[0, 1, 2, 3]]), PATCH)
    assert targets.tolist() == [[0o701, 0o074, 0, 0o333]]


def test_pixels_of_every_patch_have_mean_zero_and_variance_one() -> None:
    targets = pixel_targets(*pictures(), PATCH)
    assert targets.shape == (ROWS, MASKED, 48)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.mean(dim=-1), torch.zeros(ROWS, MASKED), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.var(dim=-1), torch.ones(ROWS, MASKED), rtol=1e-4, atol=0)


def test_a_patch_of_one_colour_is_all_zeros() -> None:
    image = torch.full((1, SIDE, SIDE, 3), 77, dtype=torch.uint8)
    assert pixel_targets(image, torch.tensor([[3]]), PATCH).abs().max() < 1e-3


def test_pixel_loss_of_patches_predicted_as_their_mean_is_one_each() -> None:
    target = pixel_targets(*pictures(), PATCH)
    prediction = torch.zeros_like(target)
    assert mim_loss(prediction, target).item() == pytest.approx(ROWS * MASKED * 47 / 48, rel=1e-4)
    parts = [mim_loss(p, t) for p, t in zip(prediction.chunk(4), target.chunk(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), mim_loss(prediction, target))


@pytest.mark.parametrize("targets", [mean_colour_targets, pixel_targets])
def test_padded_patches_add_zero(targets: Callable[..., Tensor]) -> None:
    target = targets(*pictures(), PATCH)
    prediction = torch.randn(ROWS, MASKED, 48 if target.is_floating_point() else 512)
    is_masked = torch.arange(MASKED).expand(ROWS, -1) < 3
    torch.testing.assert_close(mim_loss(prediction, target, is_masked), mim_loss(prediction[:, :3], target[:, :3]))


def test_a_perfect_prediction_paints_the_image_itself() -> None:
    image, positions = pictures()
    painted = reconstruct(image, positions, pixel_targets(image, positions, PATCH), PATCH)
    assert (painted.int() - image.int()).abs().max() <= 1


def test_classes_paint_their_colour_and_leave_the_rest() -> None:
    image, positions = pictures()
    classes = mean_colour_targets(image, positions, PATCH)
    painted = reconstruct(image, positions, torch.nn.functional.one_hot(classes, 512).float(), PATCH)
    assert torch.equal(mean_colour_targets(painted, positions, PATCH), classes)
    hidden = torch.zeros(ROWS, 9, dtype=torch.bool).scatter(1, positions, True)
    assert torch.equal(patchify(painted, PATCH)[~hidden], patchify(image, PATCH)[~hidden])
