"""Properties of ViLT. Shapes: 4 examples, 7 tokens, images of 4 x 6, 6 x 4, 4 x 4 and 1 x 6 patches of 8 pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ViLTConfig, ViTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput, ForwardOutput, Head
from pipeline.models.model import HeadConfig
from pipeline.models.resize import resize_grid
from pipeline.models.vilt import ViLT, canvas_patches, resized_positions
from pipeline.objectives import trained_modules

VOCABULARY, LENGTH, PATCH = 23, 7, 8
SIZES = torch.tensor([[32, 48], [48, 32], [32, 32], [8, 48]])
COUNTS = (SIZES // PATCH).prod(dim=1)
ROWS = len(SIZES)
CONFIG = ViLTConfig(
    width=24,
    layers=3,
    heads=3,
    mlp_ratio=2,
    image_size=32,
    longest_side=48,
    patch_size=PATCH,
    max_text_length=12,
    drop_path=0.2,
)
ALL = HeadConfig("mean_colour", answers=5, nlvr2=True, ranking=True)


@pytest.fixture(scope="module")
def model() -> ViLT:
    model = build_model(CONFIG, VOCABULARY, ALL)
    assert isinstance(model, ViLT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def fused(*heads: Head, **changes: Tensor | None) -> ForwardInput:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (ROWS, 48, 48, 3), generator=generator, dtype=torch.uint8)
    text = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    keep = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3])[:, None]
    return replace(ForwardInput(heads, image=image, image_size=SIZES, text=text, text_keep=keep), **changes)


def run(model: ViLT, one: ForwardInput) -> dict[str, Tensor]:
    return model({"one": one})["one"]


def gradients(model: ViLT, outputs: ForwardOutput | dict[str, Tensor]) -> dict[str, Tensor]:
    values = [v for o in outputs.values() for v in (o.values() if isinstance(o, dict) else [o]) if v.requires_grad]
    model.zero_grad()
    torch.stack([(v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_patches() -> Tensor:
    """Return every patch of each image, in order, padded with -1."""
    place = torch.arange(int(COUNTS.max())).expand(ROWS, -1)
    return place.where(place < COUNTS[:, None], -1)


# ---- images that keep their aspect ratio


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (4, 4), (1, 6), (5, 1), (9, 13), (1, 1)])
def test_positions_of_any_grid_equal_bilinear_interpolation(grid: tuple[int, int]) -> None:
    square = torch.randn(1 + 4 * 4, 10)
    patches = torch.arange(grid[0] * grid[1])[None]
    found = resized_positions(square[1:], patches, torch.tensor([grid]))[0]
    torch.testing.assert_close(found, resize_grid(square, grid, "bilinear")[1:], rtol=1e-5, atol=1e-5)
    chosen = torch.tensor([[grid[0] * grid[1] - 1, 0]])
    torch.testing.assert_close(resized_positions(square[1:], chosen, torch.tensor([grid]))[0], found[chosen[0]])


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


def test_sides_must_be_multiples_of_the_patch(model: ViLT) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        run(model, fused("itm", image=torch.zeros(ROWS, 44, 48, 3, dtype=torch.uint8)))


# ---- visible patches


def test_listing_every_patch_equals_reading_all(model: ViLT) -> None:
    heads: tuple[Head, ...] = ("itm", "mlm", "mim")
    places = {"mask_positions": torch.tensor([[1, 2]] * ROWS), "patch_positions": torch.tensor([[0, 3]] * ROWS)}
    one = fused(*heads, **places)
    named = replace(one, visible_patches=all_patches())
    mine, others = run(model, one), run(model, named)
    for name in heads:
        torch.testing.assert_close(others[name], mine[name], rtol=1e-5, atol=1e-5)
    first, second = gradients(model, {"one": run(model, one)}), gradients(model, {"one": run(model, named)})
    assert set(first) == set(second)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=1e-5)


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


# ---- masked patches


@pytest.mark.parametrize("with_text", [True, False])
def test_trap_undefined_mask_token_masked_patches_are_hidden(model: ViLT, with_text: bool) -> None:
    """The release refers to a mask embedding that does not exist; ours exists, also in fused forwards."""
    places = torch.tensor([[0, 5], [23, 6], [3, -1], [1, 5]])
    text = {} if with_text else {"text": None, "text_keep": None}
    one = fused("mim", patch_positions=places, visible_patches=all_patches(), **text)
    found = run(model, one)["mim"]
    assert found.shape == (ROWS, 2, 512)
    blotted = one.image.clone()
    for row, positions in enumerate(places.tolist()):
        for place in (p for p in positions if p >= 0):
            down, across = divmod(place, int(SIZES[row, 1]) // PATCH)
            blotted[row, PATCH * down :, PATCH * across :][:PATCH, :PATCH] = 250
    blind = run(model, replace(one, image=blotted))["mim"]
    assert torch.equal(blind[places >= 0], found[places >= 0])
    assert gradients(model, {"one": run(model, one)})["image_embedding.mask"].any()


def test_replacement_is_another_patch_at_the_masked_position(model: ViLT) -> None:
    one = fused("tokens", patch_positions=torch.tensor([[0]] * ROWS), patch_replacements=torch.tensor([[1]] * ROWS))
    shown = one.image.clone()
    for row, (_, width) in enumerate(SIZES.tolist()):
        down, across = divmod(1, width // PATCH)
        shown[row, :PATCH, :PATCH] = one.image[row, PATCH * down :, PATCH * across :][:PATCH, :PATCH]
    expected = run(model, fused("tokens", image=shown))["tokens"]
    assert torch.equal(run(model, one)["tokens"], expected)


def test_masking_without_an_image_target_is_rejected() -> None:
    plain = build_model(CONFIG, VOCABULARY)
    with pytest.raises(ValueError, match="built with an image target"):
        run(plain, fused("mim", patch_positions=torch.zeros(ROWS, 1, dtype=torch.int64)))


# ---- forwards


def test_joined_forwards_equal_each_alone(model: ViLT) -> None:
    """Inputs with different canvases, text lengths and numbers of patches are padded to the largest."""
    first = fused("itm", "ranking", visible_patches=all_patches())
    small = torch.tensor([[16, 24], [24, 16]])
    second = ForwardInput(
        ("itm", "alignment"),
        image=first.image[:2, :24, :24],
        image_size=small,
        visible_patches=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 2, -1, -1, -1, -1]]),
        text=first.text[:2, :3],
        text_keep=torch.ones(2, 3, dtype=torch.bool),
    )
    joined = model({"first": first, "second": second})
    for name, one in {"first": first, "second": second}.items():
        alone = run(model, one)
        torch.testing.assert_close(joined[name]["itm"], alone["itm"], rtol=1e-5, atol=1e-5)
    keep = joined["second"]["patches_keep"]
    assert keep.sum(dim=1).tolist() == [6, 2]
    assert joined["second"]["patches"].shape[1] == keep.shape[1]
    torch.testing.assert_close(
        joined["second"]["patches"][keep],
        run(model, second)["patches"].flatten(0, 1)[[0, 1, 2, 3, 4, 5, 6, 7]],
        rtol=1e-5,
        atol=1e-5,
    )


def test_text_is_read_without_an_image(model: ViLT) -> None:
    one = fused("mlm", image=None, image_size=None, mask_positions=torch.ones(ROWS, 1, dtype=torch.int64))
    moved = gradients(model, {"one": run(model, one)})
    assert {model.part_of(name) for name in moved} == {"text_embedding", "blocks", "norm", "mlm_head"}


def test_second_image_is_distinguished_from_the_first(model: ViLT) -> None:
    one = fused("nlvr2")
    both = replace(one, second_image=one.image.flip(0), second_image_size=SIZES.flip(0))
    swapped = replace(
        one, image=both.second_image, image_size=both.second_image_size, second_image=one.image, second_image_size=SIZES
    )
    assert run(model, both)["nlvr2"].shape == (ROWS, 2)
    assert not torch.allclose(run(model, both)["nlvr2"], run(model, swapped)["nlvr2"])
    with pytest.raises(ValueError, match="two images are read with all their patches"):
        run(model, replace(both, visible_patches=all_patches()))


def test_trap_10_examples_of_only_padding_are_finite(model: ViLT) -> None:
    nothing = fused(
        "itm",
        "alignment",
        text_keep=torch.zeros(ROWS, LENGTH, dtype=torch.bool),
        visible_patches=torch.full((ROWS, 3), -1),
    )
    found = run(model, nothing)
    assert all(value.isfinite().all() for value in found.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model, {"one": found}).values())


def test_empty_batch_runs_the_same_graph(model: ViLT) -> None:
    heads: tuple[Head, ...] = ("itm", "alignment", "ranking", "answers")
    one = fused(*heads, visible_patches=all_patches())
    empty = ForwardInput(**{k: v[:0] if isinstance(v, Tensor) else v for k, v in vars(one).items()})
    assert set(gradients(model, model({"x": empty}))) == set(gradients(model, model({"x": one})))


def test_example_that_drops_every_branch_is_its_embedding(model: ViLT) -> None:
    one = fused("tokens", drop_path_mask=torch.zeros(ROWS, 3, 2, dtype=torch.bool))
    image, _ = model.image_embedding(one.image, one.image_size)
    expected = model.norm(torch.cat([model.text_embedding(one.text), image], dim=1))
    torch.testing.assert_close(run(model, one)["tokens"], expected)


def test_missing_heads_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match="without the head 'ranking'"):
        run(build_model(CONFIG, VOCABULARY), fused("ranking"))


# ---- modules and weights


def test_trap_11_each_parameter_has_a_module_and_none_is_idle() -> None:
    whole = skeleton(CONFIG, VOCABULARY, ALL)
    assert {whole.part_of(name) for name, _ in whole.named_parameters()} == set(whole.PARTS)
    plain = skeleton(CONFIG, VOCABULARY)
    names = {name for name, _ in plain.named_parameters()}
    assert not names & {"image_embedding.mask", "image_embedding.second", "ranking_head.score.weight"}


def test_unsupported_objectives_are_rejected() -> None:
    with pytest.raises(ConfigError, match="kind 'vilt' does not learn"):
        trained_modules(skeleton(CONFIG), ["itc"], "pairs")
    with pytest.raises(ConfigError, match=r"itm.*pairs.*images"):
        trained_modules(skeleton(CONFIG), ["itm"], "images")


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


def test_image_size_may_change_but_other_sizes_may_not() -> None:
    larger = CONFIG.model_copy(update={"image_size": 48, "max_visible_patches": None, "norm_eps": 1e-12})
    state = build_model(CONFIG, VOCABULARY).state_dict()
    found = skeleton(larger, VOCABULARY).resize_state(state, CONFIG)
    assert torch.equal(
        found["image_embedding.positions"], resize_grid(state["image_embedding.positions"], 6, "bilinear")
    )
    with pytest.raises(ConfigError, match="layers 3 there, 2 here"):
        skeleton(CONFIG.model_copy(update={"layers": 2}), VOCABULARY).resize_state(state, CONFIG)


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
