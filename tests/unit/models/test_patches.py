"""Masked, replaced and visible patches of square images (ViT, VLMo), and the decoder that predicts patches (MAE)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F

from pipeline.config.schema import ImageDecoderConfig, ViTConfig, VLMoConfig
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.models.model import HeadConfig, ImageDecoder
from pipeline.objectives.mim import patchify, unpatchify
from tests.support.forwards import run

SIZES: dict[str, Any] = {"width": 24, "layers": 3, "heads": 2, "image_size": 24, "patch_size": 8, "init_std": 0.2}
VIT = ViTConfig(**SIZES, drop_path=0.2)
RELATIVE = VLMoConfig(**SIZES, vision_language_layers=1, max_text_length=8)
ABSOLUTE = RELATIVE.model_copy(update={"positions": "absolute"})
ROWS, PATCHES = 3, 9
POSITIONS = torch.tensor([[0, 4], [2, 8], [3, 5]])
DECODER = ImageDecoderConfig(width=16, layers=2, heads=2)
IMAGES = torch.randint(0, 256, (ROWS, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit() -> Any:
    return build_model(VIT, 0, HeadConfig("mean_colour", classes=5), seed=1)


@pytest.fixture(params=[RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
def vlmo(request: pytest.FixtureRequest) -> Any:
    model = build_model(request.param, 11, HeadConfig("pixels", image_decoder=DECODER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("positions."):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model


def test_replaced_patches_equal_an_image_with_swapped_patches_also_when_packed(vit: Any) -> None:
    """Masked, replaced and kept: the three branches of ViT's masked patch prediction (ViLT's code lacks the third)."""
    positions = torch.tensor([[0, 4, 6], [1, 2, 8], [3, 5, 7]])
    replacements = torch.tensor([[7, -1, 6], [-1, 2, 0], [3, -1, 1]])
    one = ForwardInput(("mim",), image=IMAGES, patch_positions=positions, patch_replacements=replacements)
    patches = patchify(IMAGES, 8).clone()
    patches[0, 0], patches[1, 8], patches[2, 7] = patches[0, 7].clone(), patches[1, 0].clone(), patches[2, 1].clone()
    plain = ForwardInput(("tokens",), image=unpatchify(patches, 8), patch_positions=torch.tensor([[4], [1], [5]]))
    expected = run(vit, plain, "tokens").gather(1, (positions + 1)[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(run(vit, one, "mim"), vit.mim_head(expected))
    unmasked = replace(one, patch_replacements=positions)
    untouched = ForwardInput(("tokens",), image=IMAGES)
    torch.testing.assert_close(run(vit, unmasked, "tokens"), run(vit, untouched, "tokens"))
    whole = ForwardInput(("mim",), image=IMAGES, patch_positions=POSITIONS)
    partly = replace(whole, patch_replacements=torch.tensor([[3, -1], [2, -1], [-1, -1]]))
    together = vit({"one": whole, "two": partly})
    torch.testing.assert_close(together["one"]["mim"], run(vit, whole, "mim"))
    torch.testing.assert_close(together["two"]["mim"], run(vit, partly, "mim"))
    assert not torch.equal(together["one"]["mim"], together["two"]["mim"])


def test_order_and_padding_of_visible_patches_do_not_matter(vit: Any, vlmo: Any) -> None:
    order = torch.stack([torch.randperm(PATCHES) for _ in range(ROWS)])
    text, keep = torch.randint(0, 11, (ROWS, 4)), torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    one = ForwardInput(("tokens",), image=IMAGES)
    for model, whole, before in ((vit, one, 1), (vlmo, one, 1), (vlmo, replace(one, text=text, text_keep=keep), 5)):
        places = F.pad(order + before, (before, 0))
        places[:, :before] = torch.arange(before)
        expected = run(model, whole, "tokens")[torch.arange(ROWS)[:, None], places]
        read = run(model, replace(whole, visible_patches=order), "tokens")
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    few, padded = torch.tensor([[3, 5]] * ROWS), torch.tensor([[3, 5, -1, -1]] * ROWS)
    outputs = [run(vit, replace(one, visible_patches=visible), "classes") for visible in (few, padded)]
    torch.testing.assert_close(outputs[0], outputs[1])
    # Heads at selected positions equal the full forward.
    chosen = replace(one, heads=("itc", "tokens"), visible_patches=torch.tensor([[0, 4], [8, 2], [3, 5]]))
    torch.testing.assert_close(run(vlmo, chosen, "itc"), run(vlmo, chosen)["itc"], rtol=1e-5, atol=1e-5)


def test_decoder_reads_the_ascending_complement_of_the_masked_patches(vlmo: Any) -> None:
    one = ForwardInput(("mim",), image=IMAGES, patch_positions=torch.tensor([[7, 2, 0], [8, 3, 4], [0, 1, 2]]))
    visible: Any = drop_masked_patches(one, 9).visible_patches
    assert visible.tolist() == [[1, 3, 4, 5, 6, 8], [0, 1, 2, 5, 6, 7], [3, 4, 5, 6, 7, 8]]
    none: Any = drop_masked_patches(replace(one, patch_positions=one.patch_positions[:0]), 9)  # type: ignore[index]
    assert none.visible_patches.shape == (0, 6)
    one, patches = replace(one, patch_positions=POSITIONS), patchify(IMAGES, 8).clone()
    for row, positions in enumerate(POSITIONS.tolist()):
        patches[row, positions] = 0
    painted = replace(one, image=unpatchify(patches, 8))
    outputs, others = (run(vlmo, drop_masked_patches(each, PATCHES))["mim"] for each in (one, painted))
    assert outputs.shape == (ROWS, 2, 192)
    torch.testing.assert_close(outputs, others)
    with pytest.raises(ValueError, match="image target"):
        run(vlmo, one)


def test_decoder_predicts_each_patch_by_its_position() -> None:
    model = build_model(VIT, 0, HeadConfig("pixels", image_decoder=DECODER), seed=1)
    one = drop_masked_patches(ForwardInput(("mim",), image=IMAGES, patch_positions=POSITIONS), PATCHES)
    predictions = run(model, one)["mim"]
    backwards = replace(one, patch_positions=POSITIONS.flip(1))
    torch.testing.assert_close(run(model, backwards)["mim"], predictions.flip(1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[:, 0], predictions[:, 1], atol=1e-3)
    assert "image_embedding.mask" not in model.state_dict()


def test_decoder_has_sine_positions_and_ignores_padding() -> None:
    decoder = ImageDecoder(24, 3, 5, ImageDecoderConfig(width=8, layers=2, heads=2))
    positions = decoder.positions.numpy()
    assert (positions[0] == 0).all()
    for row in range(3):
        for column in range(3):
            across = [np.sin(column), np.sin(column / 100), np.cos(column), np.cos(column / 100)]
            down = [np.sin(row), np.sin(row / 100), np.cos(row), np.cos(row / 100)]
            np.testing.assert_allclose(positions[1 + 3 * row + column], [*across, *down], atol=1e-6)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, visible, masked = torch.randn(2, 4, 24), torch.tensor([[0, 4, 2], [8, 1, 3]]), torch.tensor([[7], [5]])
    padded, longer = torch.cat([features, torch.randn(2, 2, 24)], dim=1), F.pad(visible, (0, 2), value=-1)
    torch.testing.assert_close(decoder(padded, longer, masked), decoder(features, visible, masked))


def test_vits_positions_are_resized_as_in_the_jax_release() -> None:
    larger = build_model(VIT.model_copy(update={"image_size": 40}), 0, HeadConfig(classes=7))
    before = build_model(VIT, 0, HeadConfig(classes=5), seed=1).state_dict()
    after = larger.resize_state(before, VIT)
    name = "image_embedding.positions"
    zoomed = scipy.ndimage.zoom(before[name][1:].reshape(3, 3, 24).numpy(), (5 / 3, 5 / 3, 1), order=1)
    np.testing.assert_allclose(after[name][1:].reshape(5, 5, 24).numpy(), zoomed, atol=1e-6)
    assert torch.equal(after[name][0], before[name][0])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
