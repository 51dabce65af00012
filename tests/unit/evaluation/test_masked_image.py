"""Masked patches: true predictions restore the image, and only masked patches change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked_image import Painted, reconstruct
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.vlmo import VLMo
from pipeline.objectives.mim import mean_colour_targets, patchify, pixel_targets


class Knowing(nn.Module):
    """Model that predicts exactly the targets of the loss."""

    def __init__(self, target: Painted):
        super().__init__()
        self.target = target
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return {name: {"mim": self._truth(one.image, one.patch_positions)} for name, one in passes.items()}

    def _truth(self, image: Any, positions: Any) -> Tensor:
        if self.target == "pixels":
            return pixel_targets(image, positions, 8)
        return nn.functional.one_hot(mean_colour_targets(image, positions, 8), 512).float()


def test_true_pixels_restore_the_image(held_out: EvalPairs) -> None:
    found = reconstruct(Knowing("pixels"), held_out.images[:], held_out.keys, 8, 0.4, "pixels", batch=5)
    assert (found.filled.int() - held_out.images[:].int()).abs().max() <= 1
    assert found.error < 0.005 < found.error_without_model


def test_true_colours_are_within_half_a_class(held_out: EvalPairs) -> None:
    found = reconstruct(Knowing("mean_colour"), held_out.images[:], held_out.keys, 8, 0.4, "mean_colour")
    assert found.error <= 16.5 / 255
    assert found.error < found.error_without_model


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_only_hidden_patches_change(held_out: EvalPairs, model: VLMo, fraction: float) -> None:
    found = reconstruct(model, held_out.images[:], held_out.keys, 8, fraction, "pixels")
    before, masked, after = (patchify(each, 8) for each in (found.original, found.masked, found.filled))
    is_hidden = (masked == 128).all(dim=-1)
    assert (is_hidden.sum(dim=1) == round(fraction * 16)).all()
    assert torch.equal(before[~is_hidden], after[~is_hidden])
    assert torch.equal(before[~is_hidden], masked[~is_hidden])


def test_hidden_patches_follow_the_key_alone(held_out: EvalPairs, model: VLMo) -> None:
    whole = reconstruct(model, held_out.images[:], held_out.keys, 8, 0.4, "pixels", batch=64)
    part = reconstruct(model, held_out.images[3:5], held_out.keys[3:5], 8, 0.4, "pixels", batch=1)
    assert torch.equal(whole.masked[3:5], part.masked)


def test_model_with_a_decoder_reads_only_visible_patches(held_out: EvalPairs) -> None:
    class Decoding(Knowing):
        def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
            for one in passes.values():
                assert one.heads == ("decoded_image",)
                both = torch.cat([one.visible_patches, one.patch_positions], dim=1).sort(dim=1).values
                assert torch.equal(both, torch.arange(16).expand(len(both), -1))
            return super().forward(passes)

    found = reconstruct(Decoding("pixels"), held_out.images[:], held_out.keys, 8, 0.75, "pixels", decoded=True)
    assert found.error < 0.005 < found.error_without_model
