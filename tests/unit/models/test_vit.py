"""ViT on images that are whole, partly masked, or partly visible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageDecoderConfig, ViTConfig
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.models.model import HeadConfig
from pipeline.models.vit import PARTS, ViT
from pipeline.objectives import modules_for, trained_modules

CONFIG = ViTConfig(width=24, layers=3, heads=2, image_size=24, patch_size=8, drop_path=0.2, init_std=0.2)
ROWS, PATCHES = 3, 9
DECODER = ImageDecoderConfig(width=16, layers=2, heads=2)
HEADS = {
    "covered": HeadConfig("mean_colour", classes=5),
    "decoded": HeadConfig("pixels", image_decoder=DECODER, classes=5),
}


@pytest.fixture(params=list(HEADS))
def heads(request: pytest.FixtureRequest) -> HeadConfig:
    return HEADS[request.param]


@pytest.fixture
def model(heads: HeadConfig) -> ViT:
    return built(heads)


def built(heads: HeadConfig) -> ViT:
    model = build_model(CONFIG, 0, heads, seed=1)
    assert isinstance(model, ViT)
    return model


def pictures() -> Tensor:
    return torch.randint(0, 256, (ROWS, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def masked_pass(heads: HeadConfig) -> ForwardInput:
    one = ForwardInput(("mim",), image=pictures(), patch_positions=torch.tensor([[0, 4], [2, 8], [3, 5]]))
    return one if heads.image_decoder is None else drop_masked_patches(one, PATCHES)


def passes(heads: HeadConfig) -> dict[str, ForwardInput]:
    return {"labelled": ForwardInput(("classes",), image=pictures()), "hidden": masked_pass(heads)}


def run(model: ViT, one: ForwardInput, head: str) -> Tensor:
    return model({"one": one})["one"][head]


def cut(image: Tensor) -> Tensor:
    return image.unflatten(1, (3, 8)).unflatten(3, (3, 8)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)


def joined(patches: Tensor) -> Tensor:
    return patches.unflatten(1, (3, 3)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def test_output_shapes(model: ViT, heads: HeadConfig) -> None:
    out = model(passes(heads) | {"all": ForwardInput(("tokens",), image=pictures())})
    assert out["labelled"]["classes"].shape == (ROWS, 5)
    assert out["hidden"]["mim"].shape == (ROWS, 2, 512 if heads.image_decoder is None else 192)
    assert out["all"]["tokens"].shape == (ROWS, 1 + PATCHES, 24)


def test_joined_forwards_equal_each_alone(model: ViT, heads: HeadConfig) -> None:
    together = model(passes(heads))
    for name, one in passes(heads).items():
        for head, value in model({name: one})[name].items():
            torch.testing.assert_close(together[name][head], value, rtol=1e-5, atol=1e-5)


def test_modules_partition_the_parameters(model: ViT) -> None:
    assert {model.part_of(name) for name, _ in model.named_parameters()} == set(PARTS)


@pytest.mark.parametrize(
    ("objective", "source_type", "name"), [("classification", "labelled", "labelled"), ("mim", "images", "hidden")]
)
def test_declared_modules_are_those_with_a_gradient(
    model: ViT, heads: HeadConfig, objective: str, source_type: str, name: str
) -> None:
    found = model({name: passes(heads)[name]})[name].values()
    torch.stack([value.square().sum() for value in found]).sum().backward()
    used = trained_modules(model, [objective], source_type)  # type: ignore[list-item, arg-type]
    for parameter, tensor in model.named_parameters():
        assert (model.part_of(parameter) in used) == (tensor.grad is not None), parameter


def test_empty_batch_runs_the_same_graph(model: ViT, heads: HeadConfig) -> None:
    def empty(one: ForwardInput) -> ForwardInput:
        return ForwardInput(**{k: v[:0] if isinstance(v, Tensor) else v for k, v in vars(one).items()})

    def found(given: dict[str, ForwardInput]) -> set[str]:
        model.zero_grad()
        values = [value.sum() for result in model(given).values() for value in result.values()]
        torch.stack(values).sum().backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    given = passes(heads)
    assert found({name: empty(one) for name, one in given.items()}) == found(given)


def test_unsupported_inputs_are_rejected(model: ViT) -> None:
    with pytest.raises(ValueError, match="no text"):
        model({"one": ForwardInput(("tokens",), text=torch.ones(2, 3, dtype=torch.int64))})
    with pytest.raises(ValueError, match="square"):
        model({"one": ForwardInput(("tokens",), image=pictures(), image_size=torch.tensor([[24, 8]] * ROWS))})
    with pytest.raises(ValueError, match="without the head 'classes'"):
        built(HeadConfig())({"one": ForwardInput(("classes",), image=pictures())})
    assert modules_for(model, "mlm", "text") is None
    with pytest.raises(ConfigError, match="kind 'vit'"):
        trained_modules(model, ["itc"], "pairs")


# ---- masked patches


def test_masked_patches_are_not_read() -> None:
    one = masked_pass(HEADS["covered"])
    patches = cut(one.image).clone()
    for row, positions in enumerate(one.patch_positions.tolist()):
        patches[row, positions] = 7
    model = built(HEADS["covered"])
    other = replace(one, image=joined(patches))
    assert not torch.equal(one.image, other.image)
    torch.testing.assert_close(run(model, one, "mim"), run(model, other, "mim"))


def test_replaced_patches_equal_an_image_with_swapped_patches() -> None:
    """Masked, replaced and kept: the three branches of ViT's masked patch prediction (ViLT's code lacks the third)."""
    model = built(HEADS["covered"])
    positions = torch.tensor([[0, 4, 6], [1, 2, 8], [3, 5, 7]])
    stand_ins = torch.tensor([[7, -1, 6], [-1, 2, 0], [3, -1, 1]])
    one = ForwardInput(("mim",), image=pictures(), patch_positions=positions, patch_replacements=stand_ins)
    patches = cut(pictures()).clone()
    patches[0, 0], patches[1, 8], patches[2, 7] = cut(pictures())[[0, 1, 2], [7, 0, 1]]
    covered = torch.tensor([[4], [1], [5]])
    plain = ForwardInput(("tokens",), image=joined(patches), patch_positions=covered)
    expected = run(model, plain, "tokens").gather(1, (positions + 1)[..., None].expand(-1, -1, 24))
    found = run(model, one, "mim")
    torch.testing.assert_close(found, model.mim_head(expected))
    unmasked = ForwardInput(("tokens",), image=pictures(), patch_positions=positions, patch_replacements=positions)
    torch.testing.assert_close(
        run(model, unmasked, "tokens"), run(model, replace(plain, image=pictures(), patch_positions=None), "tokens")
    )


def test_forward_with_replacements_joins_one_without() -> None:
    model = built(HEADS["covered"])
    whole = masked_pass(HEADS["covered"])
    partly = replace(whole, patch_replacements=torch.tensor([[3, -1], [2, -1], [-1, -1]]))
    together = model({"one": whole, "two": partly})
    torch.testing.assert_close(together["one"]["mim"], run(model, whole, "mim"))
    torch.testing.assert_close(together["two"]["mim"], run(model, partly, "mim"))
    assert not torch.equal(together["one"]["mim"], together["two"]["mim"])


def test_order_of_visible_patches_does_not_matter() -> None:
    model = built(HeadConfig())
    order = torch.stack([torch.randperm(PATCHES) for _ in range(ROWS)])
    whole = run(model, ForwardInput(("tokens",), image=pictures()), "tokens")
    read = run(model, ForwardInput(("tokens",), image=pictures(), visible_patches=order), "tokens")
    places = torch.nn.functional.pad(order + 1, (1, 0))
    torch.testing.assert_close(read, whole.gather(1, places[..., None].expand(-1, -1, 24)), rtol=1e-5, atol=1e-5)


def test_padding_of_visible_patches_changes_no_output() -> None:
    model = built(HeadConfig(classes=5))
    few = torch.tensor([[3, 5]] * ROWS)
    padded = torch.tensor([[3, 5, -1, -1]] * ROWS)
    plain = ForwardInput(("classes",), image=pictures())
    found = [run(model, replace(plain, visible_patches=read), "classes") for read in (few, padded)]
    torch.testing.assert_close(found[0], found[1])


def test_decoder_predicts_from_visible_patches_and_positions() -> None:
    model = built(HEADS["decoded"])
    one = masked_pass(HEADS["decoded"])
    patches = cut(one.image).clone()
    for row, positions in enumerate(one.patch_positions.tolist()):
        patches[row, positions] = 7
    predictions = run(model, one, "mim")
    torch.testing.assert_close(run(model, replace(one, image=joined(patches)), "mim"), predictions)
    backwards = replace(one, patch_positions=one.patch_positions.flip(1))
    torch.testing.assert_close(run(model, backwards, "mim"), predictions.flip(1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[:, 0], predictions[:, 1], atol=1e-3)
    assert not any("mask" in name for name, _ in model.image_embedding.named_parameters())


# ---- another image size


def test_positions_are_resized_as_in_the_jax_release() -> None:
    larger = build_model(CONFIG.model_copy(update={"image_size": 40}), 0, HeadConfig(classes=7))
    before = built(HeadConfig(classes=5)).state_dict()
    after = larger.resize_state(before, CONFIG)
    name = "image_embedding.positions"
    grid = before[name][1:].reshape(3, 3, 24).numpy()
    zoomed = scipy.ndimage.zoom(grid, (5 / 3, 5 / 3, 1), order=1)
    np.testing.assert_allclose(after[name][1:].reshape(5, 5, 24).numpy(), zoomed, atol=1e-6)
    assert torch.equal(after[name][0], before[name][0])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
    with pytest.raises(ConfigError, match="patch_size 8 there, 4 here"):
        build_model(CONFIG.model_copy(update={"patch_size": 4}), 0).resize_state(before, CONFIG)
