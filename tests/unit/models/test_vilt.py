"""Properties of ViLT alone: images that keep their aspect ratio, visible patches, and weights to start from.

Those that it shares with other models are in test_every_model. Shapes: ROWS examples, LENGTH tokens, images of 4 x 6,
6 x 4, 4 x 4 and 1 x 6 patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ViLTConfig, ViTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.embeddings import canvas_patches
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.model import HeadConfig
from pipeline.models.resize import resize_grid, resized_positions
from pipeline.models.vilt import ViLT
from tests.support.forwards import (
    LENGTH,
    MODELS,
    PATCH,
    ROWS,
    SIZES,
    VOCABULARY,
    assert_same,
    forwards,
    gradients,
    lively_model,
    run,
)

CONFIG = MODELS["vilt"][0]
COUNTS = (SIZES // PATCH).prod(dim=1)


@pytest.fixture(scope="module")
def model() -> ViLT:
    return lively_model("vilt")


def fused(*heads: Head, **changes: Any) -> Any:
    return replace(forwards("vilt")["pair"], heads=heads, drop_path_mask=None, **changes)


def all_patches() -> Tensor:
    """Return every patch of each image, in order, padded with -1."""
    place = torch.arange(int(COUNTS.max())).expand(ROWS, -1)
    return place.where(place < COUNTS[:, None], -1)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (4, 4), (1, 6), (5, 1), (9, 13), (1, 1)])
def test_positions_of_any_grid_equal_bilinear_interpolation(grid: tuple[int, int]) -> None:
    square = torch.randn(1 + 4 * 4, 10)
    patches = torch.arange(grid[0] * grid[1])[None]
    found = resized_positions(square[1:], patches, torch.tensor([grid]))[0]
    torch.testing.assert_close(found, resize_grid(square, grid, "bilinear")[1:], rtol=1e-5, atol=1e-5)
    chosen = torch.tensor([[grid[0] * grid[1] - 1, 0]])
    torch.testing.assert_close(resized_positions(square[1:], chosen, torch.tensor([grid]))[0], found[chosen[0]])


def test_positions_are_resized_bilinearly_and_other_keys_may_differ() -> None:
    larger = CONFIG.model_copy(update={"image_size": 48, "max_visible_patches": None, "norm_eps": 1e-12})
    state, name = build_model(CONFIG, VOCABULARY).state_dict(), "image_embedding.positions"
    resized = skeleton(larger, VOCABULARY).resize_state(state, CONFIG)
    assert torch.equal(resized[name], resize_grid(state[name], 6, "bilinear"))


def test_trap_10_examples_without_words_or_patches_are_finite(model: ViLT) -> None:
    keep, visible = torch.zeros(ROWS, LENGTH, dtype=torch.bool), torch.full((ROWS, 3), -1)
    outputs = model({"one": fused("itm", "alignment", text_keep=keep, visible_patches=visible)})
    assert all(value.isfinite().all() for value in outputs["one"].values())
    assert all(gradient.isfinite().all() for gradient in gradients(model, outputs).values())


def test_patch_numbers_of_images_map_to_the_canvas() -> None:
    grid = SIZES // PATCH
    canvas = torch.arange(6 * 6).view(6, 6)
    for row, (height, width) in enumerate(grid.tolist()):
        own = torch.arange(height * width)[None]
        assert torch.equal(canvas_patches(own, grid[row : row + 1], 6)[0], canvas[:height, :width].flatten())


def test_larger_canvas_changes_no_output(model: ViLT) -> None:
    heads: tuple[Head, ...] = ("itm", "ranking", "answers", "alignment")
    one = fused(*heads)
    other = replace(one, image=F.pad(one.image, (0, 0, 0, 16, 0, 8), value=77))
    mine, others = run(model, one), run(model, other)
    for name in ("itm", "ranking", "answers", "words"):
        torch.testing.assert_close(others[name], mine[name], rtol=1e-5, atol=1e-5)
    for row, count in enumerate(COUNTS.tolist()):
        torch.testing.assert_close(others["patches"][row, :count], mine["patches"][row, :count], rtol=1e-5, atol=1e-5)


def test_batched_images_equal_each_image_alone(model: ViLT) -> None:
    together = run(model, fused("itm"))["itm"]
    for row, (height, width) in enumerate(SIZES.tolist()):
        whole = fused("itm")
        one = ForwardInput(
            ("itm",),
            image=whole.image[row : row + 1, :height, :width],
            text=whole.text[row : row + 1],
            text_keep=whole.text_keep[row : row + 1],
        )
        torch.testing.assert_close(run(model, one)["itm"][0], together[row], rtol=1e-5, atol=1e-5)


def test_pixels_outside_the_images_are_never_read(model: ViLT) -> None:
    one = fused("itm", "ranking")
    scribbled = one.image.clone()
    for row, (height, width) in enumerate(SIZES.tolist()):
        scribbled[row, height:] = 200
        scribbled[row, :, width:] = 100
    found, expected = run(model, replace(one, image=scribbled)), run(model, one)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_trap_pixel_sum_mask_grey_images_are_read(model: ViLT) -> None:
    """The release treats pixels that sum to 0 (mid grey, after normalising) as padding and so reads no grey patch."""
    half = fused("tokens").image.clone()
    half[:, :, 24:] = 0
    for image in (half, torch.zeros_like(half)):
        keep = run(model, fused("alignment", image=image))["patches_keep"]
        assert torch.equal(keep.sum(dim=1), COUNTS)
    grey = torch.zeros(ROWS, 48, 48, 3)  # floats in [-1, 1] with the sum by which the release detects padding
    brighter = grey.clone()
    brighter[:, :8, :8] = 0.5
    assert not torch.allclose(
        run(model, fused("itm", image=brighter))["itm"], run(model, fused("itm", image=grey))["itm"]
    )


# ---- visible and masked patches


def test_listing_every_patch_equals_reading_all(model: ViLT) -> None:
    heads: tuple[Head, ...] = ("itm", "mlm", "mim")
    places = {"mask_positions": torch.tensor([[1, 2]] * ROWS), "patch_positions": torch.tensor([[0, 3]] * ROWS)}
    one = fused(*heads, **places)
    named = replace(one, visible_patches=all_patches())
    mine, others = model({"one": one}), model({"one": named})
    assert_same(others, mine)
    torch.testing.assert_close(gradients(model, others), gradients(model, mine), rtol=1e-4, atol=1e-5)


def test_output_depends_on_the_set_of_visible_patches_only(model: ViLT) -> None:
    read = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 0, 15], [2, 5, -1]])
    one = fused("itm", visible_patches=read)
    kept = torch.zeros(ROWS, 6 * 6, dtype=torch.bool)
    kept = kept.scatter(1, canvas_patches(read.clamp(min=0), SIZES // PATCH, 6), True)
    pixels = kept.view(ROWS, 6, 6).repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2)
    blotted = one.image.where(pixels.unsqueeze(-1), 13)
    blotted[3, :8, :8] = one.image[3, :8, :8]  # -1 reads patch 0, which the attention mask excludes
    expected = run(model, one)["itm"]
    assert torch.equal(run(model, replace(one, image=blotted))["itm"], expected)
    turned = run(model, replace(one, visible_patches=read.flip(1)))["itm"]
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)
    longer = run(model, replace(one, visible_patches=F.pad(read, (0, 2), value=-1)))["itm"]
    torch.testing.assert_close(longer, expected, rtol=1e-5, atol=1e-5)


def test_alignment_excludes_special_tokens_and_padding(model: ViLT) -> None:
    found = run(model, fused("alignment", "tokens", visible_patches=all_patches()))
    assert torch.equal(found["words_keep"].sum(dim=1), torch.tensor([5, 3, 4, 1]))
    assert torch.equal(found["patches_keep"], all_patches() >= 0)
    assert torch.equal(found["words"], found["tokens"][:, :LENGTH])
    assert torch.equal(found["patches"], found["tokens"][:, LENGTH + 1 :])


def test_replacement_is_another_patch_at_the_masked_position(model: ViLT) -> None:
    one = fused("tokens", patch_positions=torch.tensor([[0]] * ROWS), patch_replacements=torch.tensor([[1]] * ROWS))
    shown = one.image.clone()
    for row, (_, width) in enumerate(SIZES.tolist()):
        down, across = divmod(1, width // PATCH)
        shown[row, :PATCH, :PATCH] = one.image[row, PATCH * down :, PATCH * across :][:PATCH, :PATCH]
    expected = run(model, fused("tokens", image=shown))["tokens"]
    assert torch.equal(run(model, one)["tokens"], expected)


def test_masked_patches_give_the_mask_embedding_a_gradient(model: ViLT) -> None:
    """The release refers to a mask embedding that does not exist; ours exists, also in fused forwards."""
    for name in ("mim", "masked"):
        assert gradients(model, model({name: forwards("vilt")[name]}))["image_embedding.mask"].any()


def test_packed_patches_are_marked_as_padding(model: ViLT) -> None:
    first = fused("itm", visible_patches=all_patches())
    second = ForwardInput(
        ("alignment",),
        image=first.image[:2, :24, :24],
        image_size=torch.tensor([[16, 24], [24, 16]]),
        visible_patches=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 2, -1, -1, -1, -1]]),
        text=first.text[:2, :3],
        text_keep=torch.ones(2, 3, dtype=torch.bool),
    )
    joined, alone = model({"first": first, "second": second})["second"], run(model, second)
    keep = joined["patches_keep"]
    assert keep.sum(dim=1).tolist() == [6, 2]
    patches = alone["patches"][alone["patches_keep"]]
    torch.testing.assert_close(joined["patches"][keep], patches, rtol=1e-5, atol=1e-5)


def test_two_images_are_read_with_all_their_patches(model: ViLT) -> None:
    with pytest.raises(ValueError, match="two images are read with all their patches"):
        run(model, replace(forwards("vilt")["nlvr2"], visible_patches=all_patches()))


# ---- weights


def test_optional_parameters_exist_only_for_their_heads() -> None:
    names = {name for name, _ in skeleton(CONFIG, VOCABULARY).named_parameters()}
    assert not names & {"image_embedding.mask", "image_embedding.second", "ranking_head.score.weight"}


def test_base_model_has_the_published_parameter_count() -> None:
    """87.4 M (table 6), without the word embedding, the pooler and the heads."""
    model = skeleton(ViLTConfig(), 30522)
    counted = {"image_embedding", "blocks", "norm"}
    count = sum(p.numel() for name, p in model.named_parameters() if model.part_of(name) in counted)
    assert count / 1e6 == pytest.approx(87.4, rel=0.01)


def test_fine_tuning_modules_start_from_pretrained_ones() -> None:
    state = build_model(CONFIG, VOCABULARY, seed=3).state_dict()
    state["itm_head.classify.bias"] += torch.tensor([1.0, 2.0])
    found = skeleton(CONFIG, VOCABULARY, HeadConfig(nlvr2=True, ranking=True)).resize_state(state, CONFIG)
    assert torch.equal(found["ranking_head.score.weight"], state["itm_head.classify.weight"][1:])
    assert torch.equal(found["ranking_head.score.bias"], state["itm_head.classify.bias"][1:])
    assert torch.equal(found["image_embedding.second"], state["image_embedding.modality"])
    trained = found | {"ranking_head.score.bias": torch.full((1,), 9.0)}
    again = skeleton(CONFIG, VOCABULARY, HeadConfig(ranking=True)).resize_state(trained, CONFIG)
    assert again["ranking_head.score.bias"] == 9


def test_start_from_a_vit_preserves_its_image_outputs() -> None:
    sizes = {key: getattr(CONFIG, key) for key in ("width", "layers", "heads", "mlp_ratio", "patch_size")}
    section = ViTConfig(image_size=32, **sizes)
    vit = build_model(section, 0, HeadConfig(classes=4), seed=5)
    model = build_model(CONFIG, VOCABULARY, seed=6)
    model.load_state_dict(model.resize_state(vit.state_dict(), section), strict=False)
    with torch.no_grad():
        model.image_embedding.modality.zero_()
    one = ForwardInput(("tokens",), image=fused().image[:, :32, :32])
    torch.testing.assert_close(run(model, one)["tokens"], vit({"one": one})["one"]["tokens"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="width 24 there, 48 here"):
        skeleton(CONFIG.model_copy(update={"width": 48}), VOCABULARY).resize_state(vit.state_dict(), section)
