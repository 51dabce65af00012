"""MIM: targets of patches (colour classes, pixels), their losses, and images painted from predictions."""

import pytest
import torch

from pipeline.objectives.mim import mim_loss, patch_targets, patchify, reconstruct, unpatchify

ROWS, SIDE, PATCH, MASKED = 8, 12, 4, 5
_random = torch.Generator().manual_seed(0)
IMAGE = torch.randint(0, 256, (ROWS, SIDE, SIDE, 3), generator=_random).to(torch.uint8)
POSITIONS = torch.rand(ROWS, 9, generator=_random).argsort(dim=1)[:, :MASKED]


def test_targets_are_the_colour_class_or_the_normalized_pixels_of_a_patch() -> None:
    assert torch.equal(unpatchify(patchify(IMAGE, PATCH), PATCH), IMAGE)
    assert torch.equal(patchify(IMAGE, PATCH)[0, 5].view(PATCH, PATCH, 3), IMAGE[0, 4:8, 8:12])
    image = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    image[0, :4, :4], image[0, :4, 4:8] = torch.tensor([255, 31, 32]), torch.tensor([0, 255, 128])
    image[0, 4:6, :4] = 255
    classes = patch_targets(image, torch.tensor([[0, 1, 2, 3]]), PATCH, "mean_colour")
    assert classes.tolist() == [[0o701, 0o074, 0, 0o333]], "the three highest bits per channel of the mean"
    pixels = patch_targets(IMAGE, POSITIONS, PATCH, "pixels")
    assert (pixels.shape, pixels.dtype) == ((ROWS, MASKED, 48), torch.float32)
    torch.testing.assert_close(pixels.mean(dim=-1), torch.zeros(ROWS, MASKED), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.var(dim=-1), torch.ones(ROWS, MASKED), rtol=1e-4, atol=0)
    of_one_colour = torch.full((1, SIDE, SIDE, 3), 77, dtype=torch.uint8)
    assert patch_targets(of_one_colour, torch.tensor([[3]]), PATCH, "pixels").abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "width"), [("pixels", 48), ("mean_colour", 512)])
def test_loss_is_a_sum_over_patches_that_are_not_padding(kind: str, width: int) -> None:
    target, prediction = patch_targets(IMAGE, POSITIONS, PATCH, kind), torch.randn(ROWS, MASKED, width)
    is_masked = torch.arange(MASKED).expand(ROWS, -1) < 3
    torch.testing.assert_close(mim_loss(prediction, target, is_masked), mim_loss(prediction[:, :3], target[:, :3]))
    parts = [mim_loss(p, t) for p, t in zip(prediction.chunk(4), target.chunk(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), mim_loss(prediction, target))
    if kind == "pixels":  # patches that are predicted as their mean cost one each
        assert mim_loss(torch.zeros_like(target), target).item() == pytest.approx(ROWS * MASKED * 47 / 48, rel=1e-4)


def test_perfect_predictions_paint_the_image_or_its_colours_and_leave_the_rest() -> None:
    painted = reconstruct(IMAGE, POSITIONS, patch_targets(IMAGE, POSITIONS, PATCH, "pixels"), PATCH)
    assert (painted.int() - IMAGE.int()).abs().max() <= 1
    classes = patch_targets(IMAGE, POSITIONS, PATCH, "mean_colour")
    painted = reconstruct(IMAGE, POSITIONS, torch.nn.functional.one_hot(classes, 512).float(), PATCH)
    assert torch.equal(patch_targets(painted, POSITIONS, PATCH, "mean_colour"), classes)
    hidden = torch.zeros(ROWS, 9, dtype=torch.bool).scatter(1, POSITIONS, True)
    assert torch.equal(patchify(painted, PATCH)[~hidden], patchify(IMAGE, PATCH)[~hidden])
