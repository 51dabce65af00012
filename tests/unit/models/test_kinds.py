"""Properties of single kinds of model; those that they share are in test_every_model."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import ImageBERTConfig, ViLTConfig, ViTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.embeddings import canvas_patches
from pipeline.models.forward import ForwardInput, Head, Regions
from pipeline.models.model import HeadConfig
from pipeline.models.resize import resize_grid, resized_positions
from pipeline.objectives import modules_for, trained_modules
from pipeline.training.stages import check_stages, prepare_experts
from tests.support import forwards as tiny
from tests.support.forwards import LENGTH, PATCH, ROWS, SIZES, VOCABULARY, forwards, gradients, lively_model, run

VLMO, VILT, DUAL = (tiny.MODELS[kind][0] for kind in ("vlmo", "vilt", "dual_encoder"))
COUNTS = (SIZES // PATCH).prod(dim=1)
EVERY = torch.arange(int(COUNTS.max())).expand(ROWS, -1)
EVERY = EVERY.where(COUNTS[:, None] > EVERY, -1)  # every patch of each image, in order, padded with -1
near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def vilt() -> Any:
    return lively_model("vilt")


# ---- VLMo


def test_kept_branch_is_scaled_by_its_drop_path_rate() -> None:
    vlmo, keep = lively_model("vlmo"), torch.ones(ROWS, tiny.LAYERS, 2, dtype=torch.bool)
    one = replace(forwards("vlmo")["image"], drop_path_mask=keep)
    kept = run(vlmo, one, "tokens")
    assert VLMO.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3))
    for block, rate in zip(vlmo.blocks, VLMO.drop_path_rates, strict=True):
        for branch in (block.attention.projection, block.experts["vision"].contract):
            with torch.no_grad():
                branch.weight.div_(1 - rate)
                branch.bias.div_(1 - rate)
    near(run(vlmo, replace(one, drop_path_mask=None), "tokens"), kept)


class NoHostSynchronisation(TorchDispatchMode):
    """Fails on operations that make the host wait for the device: they read a value, or have a shape by values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), func
        if func.__name__.startswith("index."):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


def test_forward_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    vlmo, requests = lively_model("vlmo"), forwards("vlmo")
    monkeypatch.setattr(torch, "tensor", None)  # which copies Python numbers to the device
    for heads in ((), ("tokens",)):  # what heads need, and everything
        with NoHostSynchronisation():
            vlmo({name: replace(one, heads=(*one.heads, *heads)) for name, one in requests.items()})


def test_frozen_and_copied_experts_are_those_named() -> None:
    vlmo = lively_model("vlmo")
    frozen = vlmo.parts_named(["image_embedding", "attention", "vision_expert"])
    assert frozen == {"image_embedding", "attention", "vision_expert.lower", "vision_expert.upper"}
    left = trained_modules(skeleton(VLMO), frozenset({"mlm"}), "text") - frozen
    language = {"text_embedding", "positions.text", "language_expert.lower", "language_expert.upper"}
    assert left == {*language, "norm", "mlm_head"}
    with pytest.raises(ConfigError, match="did you mean 'vision_expert'"):
        vlmo.parts_named(["vision_experts"])
    before, experts = vlmo.state_dict(), SimpleNamespace(language="inherit", vision_language="vision")
    after = prepare_experts(vlmo, before, SimpleNamespace(experts=experts))  # type: ignore[arg-type]
    sources = {name: name.replace("experts.vision_language", "experts.vision") for name in before}
    assert all(torch.equal(tensor, before[sources[name]]) for name, tensor in after.items())
    changed = {vlmo.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_language_expert"}


def test_initialisation_is_the_published_one() -> None:
    for name, parameter in build_model(VLMO, VOCABULARY).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("gamma"):
            assert (parameter == 0.5).all()
        elif name.endswith("bias") or name.startswith("positions"):
            assert (parameter == 0).all()
        elif parameter.numel() > 500:
            assert parameter.abs().max() <= 0.04
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.1)


# ---- published sizes


# Millions of parameters without task heads, with the pooler; rows and columns of the relative table: (2 * 14 - 1)² + 3
# + 2 * 196 + 2, layers x heads (unilm#1256 shows base's).
PUBLISHED = [("vlmo_base", 176.0, (1126, 144)), ("vlmo_base_plus", 166.9, None), ("vlmo_large", 562.6, (1126, 384))]


@pytest.mark.parametrize(("name", "millions", "table"), PUBLISHED)
def test_recipes_have_published_sizes_and_stages_that_can_be_built(name: str, millions: float, table: Any) -> None:
    recipe = Path(__file__).resolve().parents[3] / "configs" / f"{name}.yaml"
    model = skeleton(load_config(recipe).model, 30522)
    heads, parameters = set(model.HEAD_PARTS) - {"pooler"}, dict(model.named_parameters())
    count = sum(p.numel() for n, p in parameters.items() if model.part_of(n) not in heads)
    assert count / 1e6 == pytest.approx(millions, rel=1e-3)
    if table is not None:
        parts = [parameters[f"positions.{part}"] for part in ("image", "cross", "text")]
        assert (sum(len(part) for part in parts), parts[0].shape[1]) == table
    for overrides in ([], ["reproduce_vlmo_release=true"]):
        check_stages(load_config(recipe, overrides))


def test_base_vilt_and_imagebert_have_their_published_sizes() -> None:
    """ViLT: 87.4 M (table 6), without word embedding, pooler and heads. ImageBERT: BERT-base's without pooler."""
    vilt, imagebert = Counter[str](), Counter[str]()
    for counts, config in ((vilt, ViLTConfig()), (imagebert, ImageBERTConfig())):
        model = skeleton(config, 30522)
        for name, parameter in model.named_parameters():
            counts[model.part_of(name)] += parameter.numel()
    assert (vilt["image_embedding"] + vilt["blocks"] + vilt["norm"]) / 1e6 == pytest.approx(87.4, rel=0.01)
    assert imagebert["encoder"] == 85_054_464
    assert imagebert["text_embedding"] == (30522 + 44 + 2 + 2) * 768
    assert imagebert["region_embedding"] == (2048 + 5 + 2 + 1 + 2) * 768


# ---- dual encoder, whose towers have 4 and 2 layers


def test_towers_learn_from_their_modality_and_align_drop_path_at_the_end() -> None:
    model = lively_model("dual_encoder")
    for name, one in forwards("dual_encoder").items():
        trained = {model.part_of(parameter) for parameter in gradients(model, model({name: one}))}
        assert trained == {f"{name}_embedding", f"{name}_tower", "itc_head"}
    assert modules_for(skeleton(DUAL), "itc", "pairs") == frozenset(model.PARTS)
    for tower, rates in ((model.image_tower, [0.0, 0.1, 0.2, 0.3]), (model.text_tower, [0.2, 0.3])):
        assert [block.drop_path for block in tower["blocks"]] == pytest.approx(rates)
    masks = [[True] * 4, [False, False, True, True], [True, True, True, False]]
    keeps = [torch.tensor(kept)[:, None].expand(ROWS, tiny.LAYERS, 2) for kept in masks]
    text = forwards("dual_encoder")["text"]
    everything, last, less = (run(model, replace(text, drop_path_mask=keep))["itc"] for keep in keeps)
    assert torch.equal(last, everything)
    assert not torch.allclose(less, everything)


def test_only_positions_change_with_image_size_and_text_length() -> None:
    image, text = (f"{modality}_embedding.positions" for modality in ("image", "text"))
    before = build_model(DUAL, VOCABULARY).state_dict()
    changes = {"image_size": DUAL.image_size + DUAL.patch_size, "max_text_length": DUAL.max_text_length - 2}
    other = build_model(DUAL.model_copy(update=changes), VOCABULARY)
    after = other.resize_state(before, DUAL)
    other.load_state_dict(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {image, text}
    assert torch.equal(after[image][0], before[image][0])
    assert torch.equal(after[text], before[text][:-2])


# ---- ImageBERT


def test_regions_are_embedded_and_read_as_in_the_paper() -> None:
    sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 4, "max_text_length": 12, "max_regions": 6}
    config = ImageBERTConfig(**sizes, region_features=8, region_classes=7, dropout=0.0)
    model: Any = build_model(config, 40, seed=1)
    draw = torch.Generator().manual_seed(2)
    features, location = torch.randn(3, 5, 8, generator=draw), torch.rand(3, 5, 5, generator=draw)
    regions = Regions(features, location, torch.arange(5)[None] < torch.tensor([5, 4, 3])[:, None])
    text = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]
    pair = ForwardInput(("itm",), text=text, text_keep=keep, regions=regions)

    # A region's embedding is the norm of the sum of four parts.
    part, segment = model.region_embedding, model.text_embedding.token_type_embeddings.weight[1]
    feature = features @ part.feature.weight.T + part.feature.bias
    summed = feature + location @ part.location.weight.T + part.location.bias + segment + part.position
    near(part(regions, segment), F.layer_norm(summed, (32,), part.norm.weight, part.norm.bias, 1e-12))

    # Their order and padding do not matter.
    turned = Regions(*(getattr(regions, name).flip(1) for name in ("features", "location", "keep")))
    noise = replace(regions, features=torch.where(regions.keep.unsqueeze(-1), features, 99.0))
    logits, matched = run(model, pair, "itm"), torch.tensor([1, 0, 1])
    for other in (turned, noise):
        near(run(model, replace(pair, regions=other), "itm"), logits)

    # Cross-entropy of the matching logits is the binary one.
    assert torch.equal(logits[:, 0], torch.zeros(3))
    expected = F.binary_cross_entropy_with_logits(logits[:, 1], matched.float(), reduction="sum")
    near(F.cross_entropy(logits, matched, reduction="sum"), expected)

    # The region heads read the masked regions.
    positions = torch.tensor([[0, 3], [2, -1], [1, -1]])
    out = run(model, replace(pair, heads=("moc", "mrfr", "tokens"), region_positions=positions))
    assert (out["moc"].shape, out["mrfr"].shape) == ((3, 2, 7), (3, 2, 8))
    near(out["moc"][0, 1], model.moc_head(out["tokens"][0, 9 + 3]))
    near(out["mrfr"][1, 0], model.mrfr_head(out["tokens"][1, 9 + 2]))


# ---- ViLT: images that keep their aspect ratio


def fused(*heads: Head, **changes: Any) -> Any:
    return replace(forwards("vilt")["pair"], heads=heads, drop_path_mask=None, **changes)


def test_positions_of_any_grid_equal_bilinear_interpolation() -> None:
    square = torch.randn(1 + 4 * 4, 10)
    for grid in [(4, 6), (6, 4), (4, 4), (1, 6), (5, 1), (9, 13), (1, 1)]:
        patches = torch.arange(grid[0] * grid[1])
        for chosen in (patches, patches[[-1, 0]]):
            resized = resized_positions(square[1:], chosen[None], torch.tensor([grid]))[0]
            near(resized, resize_grid(square, grid, "bilinear")[1:][chosen])
    larger = VILT.model_copy(update={"image_size": 48, "max_visible_patches": None, "norm_eps": 1e-12})
    state, name = build_model(VILT, VOCABULARY).state_dict(), "image_embedding.positions"
    expected = resize_grid(state[name], 6, "bilinear")
    assert torch.equal(skeleton(larger, VOCABULARY).resize_state(state, VILT)[name], expected)


def test_trap_10_examples_without_words_or_patches_are_finite_and_grey_images_are_read(vilt: Any) -> None:
    """The release treats pixels that sum to 0 (mid grey, after normalising) as padding and so reads no grey patch."""
    keep, visible = torch.zeros(ROWS, LENGTH, dtype=torch.bool), torch.full((ROWS, 3), -1)
    outputs = vilt({"one": fused("itm", "alignment", text_keep=keep, visible_patches=visible)})
    assert all(value.isfinite().all() for value in outputs["one"].values())
    assert all(gradient.isfinite().all() for gradient in gradients(vilt, outputs).values())
    half = fused("tokens").image.clone()
    half[:, :, 24:] = 0
    for image in (half, torch.zeros_like(half)):
        assert torch.equal(run(vilt, fused("alignment", image=image))["patches_keep"].sum(dim=1), COUNTS)
    grey = torch.zeros(ROWS, 48, 48, 3)  # floats in [-1, 1] with the sum by which the release detects padding
    brighter = F.pad(torch.full((ROWS, 8, 8, 3), 0.5), (0, 0, 0, 40, 0, 40))
    one, other = (run(vilt, fused("itm", image=image))["itm"] for image in (brighter, grey))
    assert not torch.allclose(one, other)


def test_only_the_pixels_of_an_image_matter(vilt: Any) -> None:
    """Neither the size of its canvas, nor what surrounds it there, nor the other images of the batch."""
    one = fused("itm", "ranking", "answers", "alignment")
    expected, scribbled = run(vilt, one), one.image.clone()
    larger = run(vilt, replace(one, image=F.pad(one.image, (0, 0, 0, 16, 0, 8), value=77)))
    for name in ("itm", "ranking", "answers", "words"):
        near(larger[name], expected[name])
    for row, (height, width) in enumerate(SIZES.tolist()):
        own, count = slice(row, row + 1), int(COUNTS[row])
        near(larger["patches"][row, :count], expected["patches"][row, :count])
        scribbled[row, height:] = scribbled[row, :, width:] = 200
        words = {"text": one.text[own], "text_keep": one.text_keep[own]}
        alone = ForwardInput(("itm",), image=one.image[own, :height, :width], **words)
        near(run(vilt, alone)["itm"][0], expected["itm"][row])
        # Numbers of patches refer to the image, not to its canvas.
        grid, canvas = SIZES[own] // PATCH, torch.arange(6 * 6).view(6, 6)[: height // PATCH, : width // PATCH]
        assert torch.equal(canvas_patches(torch.arange(count)[None], grid, 6)[0], canvas.flatten())
    surrounded = run(vilt, replace(one, image=scribbled))
    assert all(torch.equal(surrounded[name], expected[name]) for name in ("itm", "ranking"))


def test_listing_every_patch_equals_reading_all_and_only_the_set_of_patches_matters(vilt: Any) -> None:
    places = {"mask_positions": torch.tensor([[1, 2]] * ROWS), "patch_positions": torch.tensor([[0, 3]] * ROWS)}
    one = fused("itm", "mlm", "mim", **places)
    mine, others = vilt({"one": one}), vilt({"one": replace(one, visible_patches=EVERY)})
    tiny.assert_same(others, mine)
    torch.testing.assert_close(gradients(vilt, others), gradients(vilt, mine), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="two images are read with all their patches"):
        run(vilt, replace(forwards("vilt")["nlvr2"], visible_patches=EVERY))
    read = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 0, 15], [2, 5, -1]])
    one = fused("itm", visible_patches=read)
    kept = torch.zeros(ROWS, 6 * 6, dtype=torch.bool)
    kept = kept.scatter(1, canvas_patches(read.clamp(min=0), SIZES // PATCH, 6), True)
    pixels = kept.view(ROWS, 6, 6).repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2)
    blotted = one.image.where(pixels.unsqueeze(-1), 13)
    blotted[3, :8, :8] = one.image[3, :8, :8]  # -1 reads patch 0, which the attention mask excludes
    expected = run(vilt, one)["itm"]
    assert torch.equal(run(vilt, replace(one, image=blotted))["itm"], expected)
    for visible in (read.flip(1), F.pad(read, (0, 2), value=-1)):
        near(run(vilt, replace(one, visible_patches=visible))["itm"], expected)


def test_alignment_excludes_special_tokens_and_padding_also_when_packed(vilt: Any) -> None:
    first = fused("alignment", "tokens", visible_patches=EVERY)
    whole = run(vilt, first)
    assert torch.equal(whole["words_keep"].sum(dim=1), torch.tensor([5, 3, 4, 1]))
    assert torch.equal(whole["patches_keep"], EVERY >= 0)
    assert torch.equal(whole["words"], whole["tokens"][:, :LENGTH])
    assert torch.equal(whole["patches"], whole["tokens"][:, LENGTH + 1 :])
    words = {"text": first.text[:2, :3], "text_keep": torch.ones(2, 3, dtype=torch.bool)}
    image = {"image": first.image[:2, :24, :24], "image_size": torch.tensor([[16, 24], [24, 16]])}
    visible = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 2, -1, -1, -1, -1]])
    second = ForwardInput(("alignment",), **image, **words, visible_patches=visible)
    joined, alone = vilt({"first": first, "second": second})["second"], run(vilt, second)
    assert joined["patches_keep"].sum(dim=1).tolist() == [6, 2]
    near(joined["patches"][joined["patches_keep"]], alone["patches"][alone["patches_keep"]])


def test_masked_patches_show_another_patch_or_a_trained_embedding(vilt: Any) -> None:
    """The release refers to a mask embedding that does not exist; ours exists, also in fused forwards."""
    one = fused("tokens", patch_positions=torch.tensor([[0]] * ROWS), patch_replacements=torch.tensor([[1]] * ROWS))
    shown = one.image.clone()
    for row, (_, width) in enumerate(SIZES.tolist()):
        down, across = divmod(1, width // PATCH)
        shown[row, :PATCH, :PATCH] = one.image[row, PATCH * down :, PATCH * across :][:PATCH, :PATCH]
    assert torch.equal(run(vilt, one)["tokens"], run(vilt, fused("tokens", image=shown))["tokens"])
    for name in ("mim", "masked"):
        assert gradients(vilt, vilt({name: forwards("vilt")[name]}))["image_embedding.mask"].any()


def test_fine_tuning_modules_exist_when_needed_and_start_from_pretrained_ones() -> None:
    names = {name for name, _ in skeleton(VILT, VOCABULARY).named_parameters()}
    assert not names & {"image_embedding.mask", "image_embedding.second", "ranking_head.score.weight"}
    state = build_model(VILT, VOCABULARY, seed=3).state_dict()
    state["itm_head.classify.bias"] += torch.tensor([1.0, 2.0])
    tuned = skeleton(VILT, VOCABULARY, HeadConfig(nlvr2=True, ranking=True)).resize_state(state, VILT)
    for name in ("weight", "bias"):
        assert torch.equal(tuned[f"ranking_head.score.{name}"], state[f"itm_head.classify.{name}"][1:])
    assert torch.equal(tuned["image_embedding.second"], state["image_embedding.modality"])
    trained = tuned | {"ranking_head.score.bias": torch.full((1,), 9.0)}
    again = skeleton(VILT, VOCABULARY, HeadConfig(ranking=True)).resize_state(trained, VILT)
    assert again["ranking_head.score.bias"] == 9


def test_start_from_a_vit_preserves_its_image_outputs() -> None:
    sizes = {key: getattr(VILT, key) for key in ("width", "layers", "heads", "mlp_ratio", "patch_size")}
    section = ViTConfig(image_size=32, **sizes)
    vit: Any = build_model(section, 0, HeadConfig(classes=4), seed=5)
    model: Any = build_model(VILT, VOCABULARY, seed=6)
    model.load_state_dict(model.resize_state(vit.state_dict(), section), strict=False)
    with torch.no_grad():
        model.image_embedding.modality.zero_()
    one = ForwardInput(("tokens",), image=fused().image[:, :32, :32])
    near(run(model, one)["tokens"], run(vit, one)["tokens"])
    with pytest.raises(ConfigError, match="width 24 there, 48 here"):
        skeleton(VILT.model_copy(update={"width": 48}), VOCABULARY).resize_state(vit.state_dict(), section)
    before, name = vit.state_dict(), "image_embedding.positions"
    larger = skeleton(section.model_copy(update={"image_size": 40}), 0, HeadConfig(classes=4))
    after = larger.resize_state(before, section)
    assert torch.equal(after[name], resize_grid(before[name], 40 // section.patch_size, "bilinear"))
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
