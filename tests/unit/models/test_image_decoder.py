"""Images of which only some patches are visible, and the decoder that predicts the others (MAE)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ImageDecoderConfig, VLMoConfig
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.models.heads import ImageDecoder
from pipeline.models.model import HeadConfig, Model

RELATIVE = VLMoConfig(
    width=24, layers=3, heads=2, vision_language_layers=1, image_size=24, patch_size=8, max_text_length=8, init_std=0.2
)
ABSOLUTE = RELATIVE.model_copy(update={"positions": "absolute"})
ROWS, PATCHES = 3, 9


@pytest.fixture(params=[RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
def model(request: pytest.FixtureRequest) -> Model:
    model = build_model(
        request.param, 11, HeadConfig("pixels", image_decoder=ImageDecoderConfig(width=16, layers=2, heads=2))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("positions."):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model


def pictures() -> Tensor:
    return torch.randint(0, 256, (ROWS, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def run(model: Model, one: ForwardInput, head: str) -> Tensor:
    return model({"one": one})["one"][head]


def reordered(tokens: Tensor, order: Tensor, before: int) -> Tensor:
    """Return tokens with their patches in another order, behind `before` others."""
    places = torch.cat([torch.arange(before).expand(len(order), -1), order + before], dim=1)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def test_vlmo_does_not_depend_on_the_order_of_patches(model: Model) -> None:
    order = torch.stack([torch.randperm(PATCHES) for _ in range(ROWS)])
    text, keep = torch.randint(0, 11, (ROWS, 4)), torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    for one, before in [
        (ForwardInput(("tokens",), image=pictures()), 1),
        (ForwardInput(("tokens",), image=pictures(), text=text, text_keep=keep), 5),
    ]:
        expected = reordered(run(model, one, "tokens"), order, before)
        found = run(model, replace(one, visible_patches=order), "tokens")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_at_selected_positions_equal_the_full_forward(model: Model) -> None:
    one = ForwardInput(("itc",), image=pictures(), visible_patches=torch.tensor([[0, 4], [8, 2], [3, 5]]))
    alone = run(model, one, "itc")
    torch.testing.assert_close(alone, run(model, replace(one, heads=("itc", "tokens")), "itc"), rtol=1e-5, atol=1e-5)


def test_visible_patches_are_the_ascending_complement_of_the_masked() -> None:
    one = ForwardInput(("mim",), image=pictures(), patch_positions=torch.tensor([[7, 2, 0], [8, 3, 4], [0, 1, 2]]))
    visible = drop_masked_patches(one, 9).visible_patches
    assert visible.tolist() == [[1, 3, 4, 5, 6, 8], [0, 1, 2, 5, 6, 7], [3, 4, 5, 6, 7, 8]]  # type: ignore[union-attr]
    none = replace(one, patch_positions=one.patch_positions[:0])  # type: ignore[index]
    assert drop_masked_patches(none, 9).visible_patches.shape == (0, 6)  # type: ignore[union-attr]


def test_decoder_reads_no_masked_patch(model: Model) -> None:
    one = ForwardInput(("mim",), image=pictures(), patch_positions=torch.tensor([[0, 4], [2, 8], [3, 5]]))
    patches = one.image.unflatten(1, (3, 8)).unflatten(3, (3, 8)).clone()
    for row, positions in enumerate(one.patch_positions.tolist()):
        for place in positions:
            patches[row, place // 3, :, place % 3] = 0
    painted = replace(one, image=patches.reshape(one.image.shape))
    found, other = (run(model, drop_masked_patches(each, PATCHES), "mim") for each in (one, painted))
    assert found.shape == (ROWS, 2, 192)
    torch.testing.assert_close(found, other)
    with pytest.raises(ValueError, match="image target"):
        run(model, one, "mim")


def test_padding_among_visible_patches_changes_no_output() -> None:
    decoder = ImageDecoder(24, 3, 5, ImageDecoderConfig(width=16, layers=2, heads=2))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, visible, masked = torch.randn(2, 4, 24), torch.tensor([[0, 4, 2], [8, 1, 3]]), torch.tensor([[7], [5]])
    padded = torch.cat([features, torch.randn(2, 2, 24)], dim=1)
    longer = torch.nn.functional.pad(visible, (0, 2), value=-1)
    torch.testing.assert_close(decoder(padded, longer, masked), decoder(features, visible, masked))


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    positions = ImageDecoder(8, 3, 5, ImageDecoderConfig(width=8, layers=1, heads=2)).positions.numpy()
    assert (positions[0] == 0).all()
    for row in range(3):
        for column in range(3):
            across = [np.sin(column), np.sin(column / 100), np.cos(column), np.cos(column / 100)]
            down = [np.sin(row), np.sin(row / 100), np.cos(row), np.cos(row / 100)]
            np.testing.assert_allclose(positions[1 + 3 * row + column], [*across, *down], atol=1e-6)
