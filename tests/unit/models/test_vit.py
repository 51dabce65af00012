"""Properties of ViT alone: masked, replaced and visible patches, and resizing. See also test_every_model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from pipeline.config.schema import ImageDecoderConfig, ViTConfig
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.models.model import HeadConfig
from pipeline.models.vit import ViT
from pipeline.objectives.mim import patchify, unpatchify
from tests.support.forwards import run

CONFIG = ViTConfig(width=24, layers=3, heads=2, image_size=24, patch_size=8, drop_path=0.2, init_std=0.2)
ROWS, PATCHES = 3, 9
POSITIONS = torch.tensor([[0, 4], [2, 8], [3, 5]])


@pytest.fixture
def model() -> ViT:
    return build_model(CONFIG, 0, HeadConfig("mean_colour", classes=5), seed=1)  # type: ignore[return-value]


def pictures() -> Tensor:
    return torch.randint(0, 256, (ROWS, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_replaced_patches_equal_an_image_with_swapped_patches(model: ViT) -> None:
    """Masked, replaced and kept: the three branches of ViT's masked patch prediction (ViLT's code lacks the third)."""
    positions = torch.tensor([[0, 4, 6], [1, 2, 8], [3, 5, 7]])
    replacements = torch.tensor([[7, -1, 6], [-1, 2, 0], [3, -1, 1]])
    one = ForwardInput(("mim",), image=pictures(), patch_positions=positions, patch_replacements=replacements)
    patches = patchify(pictures(), 8).clone()
    patches[0, 0], patches[1, 8], patches[2, 7] = patches[0, 7].clone(), patches[1, 0].clone(), patches[2, 1].clone()
    plain = ForwardInput(("tokens",), image=unpatchify(patches, 8), patch_positions=torch.tensor([[4], [1], [5]]))
    expected = run(model, plain, "tokens").gather(1, (positions + 1)[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(run(model, one, "mim"), model.mim_head(expected))
    unmasked = replace(one, patch_replacements=positions)
    untouched = ForwardInput(("tokens",), image=pictures())
    torch.testing.assert_close(run(model, unmasked, "tokens"), run(model, untouched, "tokens"))


def test_forward_with_replacements_is_packed_with_one_without(model: ViT) -> None:
    whole = ForwardInput(("mim",), image=pictures(), patch_positions=POSITIONS)
    partly = replace(whole, patch_replacements=torch.tensor([[3, -1], [2, -1], [-1, -1]]))
    together = model({"one": whole, "two": partly})
    torch.testing.assert_close(together["one"]["mim"], run(model, whole, "mim"))
    torch.testing.assert_close(together["two"]["mim"], run(model, partly, "mim"))
    assert not torch.equal(together["one"]["mim"], together["two"]["mim"])


def test_order_and_padding_of_visible_patches_do_not_matter(model: ViT) -> None:
    one = ForwardInput(("tokens",), image=pictures())
    order = torch.stack([torch.randperm(PATCHES) for _ in range(ROWS)])
    places = torch.nn.functional.pad(order + 1, (1, 0))[..., None].expand(-1, -1, 24)
    read = run(model, replace(one, visible_patches=order), "tokens")
    torch.testing.assert_close(read, run(model, one, "tokens").gather(1, places), rtol=1e-5, atol=1e-5)
    few, padded = torch.tensor([[3, 5]] * ROWS), torch.tensor([[3, 5, -1, -1]] * ROWS)
    found = [run(model, replace(one, visible_patches=visible), "classes") for visible in (few, padded)]
    torch.testing.assert_close(found[0], found[1])


def test_decoder_predicts_each_patch_by_its_position() -> None:
    decoder = ImageDecoderConfig(width=16, layers=2, heads=2)
    model = build_model(CONFIG, 0, HeadConfig("pixels", image_decoder=decoder), seed=1)
    one = drop_masked_patches(ForwardInput(("mim",), image=pictures(), patch_positions=POSITIONS), PATCHES)
    predictions = run(model, one)["mim"]
    backwards = replace(one, patch_positions=POSITIONS.flip(1))
    torch.testing.assert_close(run(model, backwards)["mim"], predictions.flip(1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[:, 0], predictions[:, 1], atol=1e-3)
    assert "image_embedding.mask" not in model.state_dict()


def test_positions_are_resized_as_in_the_jax_release() -> None:
    larger = build_model(CONFIG.model_copy(update={"image_size": 40}), 0, HeadConfig(classes=7))
    before = build_model(CONFIG, 0, HeadConfig(classes=5), seed=1).state_dict()
    after = larger.resize_state(before, CONFIG)
    name = "image_embedding.positions"
    grid = before[name][1:].reshape(3, 3, 24).numpy()
    zoomed = scipy.ndimage.zoom(grid, (5 / 3, 5 / 3, 1), order=1)
    np.testing.assert_allclose(after[name][1:].reshape(5, 5, 24).numpy(), zoomed, atol=1e-6)
    assert torch.equal(after[name][0], before[name][0])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
