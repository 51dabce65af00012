"""Properties of every kind of model, then those of single kinds: VLMo, the dual encoder, ImageBERT and ViLT."""

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
from pipeline.config.schema import ImageBERTConfig, ViLTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.embeddings import canvas_patches
from pipeline.models.forward import ForwardInput, Head, Regions
from pipeline.models.model import HeadConfig, Model
from pipeline.models.resize import resize_grid, resized_positions
from pipeline.objectives import modules_for, trained_modules
from pipeline.training.stages import check_stages, prepare_experts
from tests.support import forwards as tiny
from tests.support.forwards import LENGTH, MODELS, PATCH, ROWS, SIZES, VOCABULARY, forwards, gradients, run, values

close, near = torch.testing.assert_close, partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    return tiny.lively_model(name)


@pytest.fixture
def inputs(name: str) -> dict[str, Any]:
    return forwards(name)


def test_forwards_equal_each_alone_each_head_alone_and_each_example_alone(model: Any, inputs: dict[str, Any]) -> None:
    together, alone = model(inputs), {key: run(model, one) for key, one in inputs.items()}
    assert list(together) == list(alone)
    tiny.assert_same(together, alone)
    expected = gradients(model, together)
    close(expected, gradients(model, alone), rtol=1e-4, atol=1e-5)
    for one in (one for one in inputs.values() if "decoded_image" not in one.heads):  # which reads everything
        everything = run(model, one, *one.heads, "tokens")
        assert everything["tokens"].shape[2] == 24
        for head in one.heads:
            near(run(model, one, head), everything[head])
        if "mlm" in one.heads:
            none = replace(one, mask_positions=torch.zeros(ROWS, 0, dtype=torch.int64))
            assert run(model, none, "mlm").shape == (ROWS, 0, VOCABULARY)
    first, others, none = (model(tiny.examples(inputs, rows)) for rows in (slice(1), slice(1, ROWS), slice(0)))
    parts = values(first), values(others)
    for key, value in values(together).items():
        joined = torch.cat([part[key] for part in parts]) if value.dim() else parts[0][key]
        near(joined, value)
    assert gradients(model, none).keys() == expected.keys()


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("vit")], indirect=True)
def test_trap_10_padding_of_texts_is_never_read_and_only_padding_is_finite(model: Any, inputs: dict[str, Any]) -> None:
    short = {key: one for key, one in inputs.items() if one.text is not None}
    longer = {}
    for key, one in short.items():
        text = F.pad(one.text.where(one.text_keep, (one.text + 1) % VOCABULARY), (0, 4), value=3)
        longer[key] = replace(one, text=text, text_keep=F.pad(one.text_keep, (0, 4)))
    tiny.assert_same(model(short), model(longer))
    close(gradients(model, model(longer)), gradients(model, model(short)), rtol=1e-4, atol=1e-5)
    nothing = {k: replace(one, text_keep=one.text_keep & False, drop_path_mask=None) for k, one in short.items()}
    for dtype in (torch.float32, torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(model, model.to(dtype)(nothing)).values())


@pytest.mark.parametrize("name", ["vlmo", "vlmo_absolute", "vilt", "vit", "vit_decoded"], indirect=True)
def test_masked_patches_are_never_read(model: Model, inputs: dict[str, Any]) -> None:
    one, patch = inputs["mim"], PATCH
    painted = one.image.clone()
    for row, positions in enumerate(one.patch_positions.tolist()):
        columns = (one.image.shape[2] if one.image_size is None else int(one.image_size[row, 1])) // patch
        for down, across in (divmod(position, columns) for position in positions):
            painted[row, patch * down :, patch * across :][:patch, :patch] = 7
    assert not torch.equal(painted, one.image)
    expected = run(model, one)
    close(run(model, replace(one, image=painted)), expected)
    assert not torch.equal(run(model, replace(one, image=255 - one.image))["mim"], expected["mim"])


@pytest.mark.parametrize("name", [n for n in MODELS if n != "imagebert"], indirect=True)
def test_drop_path_of_every_branch_leaves_the_embeddings(model: Model, inputs: dict[str, Any]) -> None:
    dropped = torch.zeros(ROWS, tiny.LAYERS, 2, dtype=torch.bool)
    chosen = {k: one for k, one in inputs.items() if k != "nlvr2" and one.visible_patches is None}
    given = {key: replace(one, drop_path_mask=dropped) for key, one in chosen.items()}
    before = model(given)
    with torch.no_grad():
        for block in (module for module in model.modules() if isinstance(module, model.BLOCK)):
            for parameter in block.parameters():
                parameter.mul_(3)
    assert all(torch.equal(value, values(model(given))[key]) for key, value in values(before).items())


def test_images_may_be_floats_weights_bfloat16_nothing_is_drawn_and_contrasts_are_unit_vectors_of_bounded_scale(
    model: Any, inputs: dict[str, Any]
) -> None:
    before, first, second = torch.get_rng_state(), values(model(inputs)), values(model(inputs))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first.get("image.scale") == first.get("text.scale")
    given = {key: one for key, one in inputs.items() if one.image is not None and one.second_image is None}
    mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
    floats = {key: replace(one, image=one.image / (255 * std) - mean / std) for key, one in given.items()}
    tiny.assert_same(model(given), model(floats))
    if "image.scale" in first:
        with torch.no_grad():
            model.itc_head.log_scale.fill_(9.0)
        scaled = values(model(inputs))
        assert scaled["image.scale"] == 100
        assert scaled.get("text.scale_vl", torch.zeros(())) < 100
    for key, value in values(model.to(torch.bfloat16)(inputs)).items():
        assert value.dtype == torch.float32, key
        if key.endswith(("itc", "itc_vl")):
            close(value.norm(dim=-1), torch.ones(ROWS))
            close(first[key].norm(dim=-1), torch.ones(ROWS))
        assert F.cosine_similarity(value.flatten(), first[key].flatten(), dim=0) > 0.98, key


@pytest.mark.parametrize("name", ["vlmo", "vlmo_absolute", "vilt"], indirect=True)
def test_second_image_differs_by_its_modality_only(model: Any, inputs: dict[str, Any]) -> None:
    one = inputs["nlvr2"]
    images = {"image": one.second_image, "image_size": one.second_image_size}
    turned = replace(one, **images, second_image=one.image, second_image_size=one.image_size)
    for is_equal in (False, True):
        first, other = (run(model, pair, "tokens").chunk(2, dim=1) for pair in (one, turned))
        for half, twin in zip(first, other[::-1], strict=True):
            assert torch.allclose(half[:, 0], twin[:, 0], rtol=1e-5, atol=1e-4) == is_equal
        with torch.no_grad():
            model.image_embedding.second.copy_(model.image_embedding.modality)


def test_parts_partition_the_parameters_and_weights_depend_on_the_seed_alone(model: Model, name: str) -> None:
    absent = {"positions.cross"} if name in ("vlmo_absolute", "vlmo_routed") else set()
    if name == "vlmo_routed":  # all below the heads is of one modality
        absent |= {"attention", "norm", "vision_expert.upper", "language_expert.upper", "vision_language_expert"}
    assert {model.part_of(parameter) for parameter, _ in model.named_parameters()} == set(model.PARTS) - absent
    config, heads = MODELS[name]
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), build_model(config, VOCABULARY, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(config, VOCABULARY, heads, seed=3).state_dict()
    assert all(torch.equal(tensor, second[parameter]) for parameter, tensor in first.items())
    other = build_model(config, VOCABULARY, seed=4).state_dict()
    drawn = [tensor for parameter, tensor in first.items() if not torch.equal(tensor, other[parameter])]
    assert len(drawn) > len(first) / 5
    assert not any(tensor.isnan().any() for tensor in drawn)


TEXT, IMAGE = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
SHAPED = ForwardInput(("tokens",), image=IMAGE, image_size=torch.tensor([[16, 8]] * 2))


@pytest.mark.parametrize(
    ("name", "one", "message"),
    [
        ("vlmo", ForwardInput(("itc",), text=torch.zeros(2, 13, dtype=torch.int64)), r"13 tokens.*max_text_length"),
        ("imagebert", ForwardInput(("itm",), text=TEXT.repeat(1, 3)), r"head 'itm'"),
        ("imagebert", ForwardInput(("tokens",), text=TEXT.repeat(1, 3)), r"15 tokens.*model\.max_text_length"),
        ("imagebert", ForwardInput(("itm",), text=TEXT, image=IMAGE), "no pixels"),
        ("vlmo", ForwardInput(("itc",), image=IMAGE.repeat(1, 2, 2, 1)), "16, 16, 3"),
        ("vlmo", SHAPED, "whole square images"),
        ("vlmo", ForwardInput(("itc",), image=IMAGE, text=TEXT), "head 'itc'"),
        ("vlmo", ForwardInput(("itm",), image=IMAGE), "head 'itm'"),
        ("vlmo", ForwardInput(("mlm",), text=TEXT), "head 'mlm'"),
        ("vilt", ForwardInput(("tokens",), image=IMAGE[:, :12]), "multiples of 8"),
        ("vit", ForwardInput(("tokens",), text=TEXT), "no text"),
        ("vit", SHAPED, "square"),
        ("dual_encoder", ForwardInput(("tokens",), image=IMAGE, text=TEXT), "never both in one input"),
        ("dual_encoder", SHAPED, "whole square images"),
        ("dual_encoder", ForwardInput(("mlm",), text=TEXT, mask_positions=TEXT), "without the head 'mlm'"),
    ],
)
def test_inputs_that_a_model_cannot_read_are_rejected(model: Model, one: ForwardInput, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model({"one": one})


def test_unsupported_heads_objectives_and_weights_of_another_architecture_are_rejected_by_name() -> None:
    missing: dict[str, Any] = {"vilt": "ranking", "vlmo": "answers", "vit": "classes", "imagebert": "alignment"}
    for name, head in missing.items():
        inputs, model = forwards(name), build_model(MODELS[name][0], VOCABULARY)
        one = next(one for one in inputs.values() if head in one.heads or head == "alignment")
        with pytest.raises(ValueError, match=f"{model.config.kind} model was built without the head '{head}'"):
            run(model, one, head)
        if "mim" in inputs:
            with pytest.raises(ValueError, match="built with an image target"):
                run(model, inputs["mim"])
    for name, objective, source_type, message in (
        ("vlmo", "itc", "text", r"itc.*pairs.*text"),
        ("vilt", "itc", "pairs", "kind 'vilt' does not learn"),
        ("vilt", "itm", "images", r"itm.*pairs.*images"),
        ("vit", "itc", "pairs", "kind 'vit'"),
        ("dual_encoder", "itm", "pairs", "mome objectives"),
        ("dual_encoder", "itc", "text", r"itc.*pairs.*text"),
    ):
        with pytest.raises(ConfigError, match=message):
            trained_modules(skeleton(MODELS[name][0]), [objective], source_type)  # type: ignore[arg-type]
    for name, key, value in (("vlmo", "layers", 3), ("vilt", "layers", 2), ("vit", "patch_size", 4)):
        config = MODELS[name][0]
        other = skeleton(config.model_copy(update={key: value}), VOCABULARY)
        with pytest.raises(ConfigError, match=f"{key} {getattr(config, key)} there, {value} here"):
            other.resize_state(build_model(config, VOCABULARY).state_dict(), config)


VLMO, VILT, DUAL = (MODELS[kind][0] for kind in ("vlmo", "vilt", "dual_encoder"))
COUNTS = (SIZES // PATCH).prod(dim=1)
EVERY = torch.arange(int(COUNTS.max())).expand(ROWS, -1)
EVERY = EVERY.where(COUNTS[:, None] > EVERY, -1)  # every patch of each image, in order, padded with -1


@pytest.fixture(scope="module")
def vilt() -> Any:
    return tiny.lively_model("vilt")


class NoHostSynchronisation(TorchDispatchMode):
    """Fails on operations that make the host wait for the device: they read a value, or have a shape by values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), func
        if func.__name__.startswith("index."):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


def test_forward_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    vlmo, requests = tiny.lively_model("vlmo"), forwards("vlmo")
    monkeypatch.setattr(torch, "tensor", None)  # which copies Python numbers to the device
    for heads in ((), ("tokens",)):  # what heads need, and everything
        with NoHostSynchronisation():
            vlmo({name: replace(one, heads=(*one.heads, *heads)) for name, one in requests.items()})


def test_frozen_and_copied_experts_are_those_named() -> None:
    vlmo = tiny.lively_model("vlmo")
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
        if name.endswith(("norm.weight", "gamma", "bias")) or name.startswith("positions"):
            constant = 1 if name.endswith("weight") else 0.5 if name.endswith("gamma") else 0
            assert (parameter == constant).all()
        elif parameter.numel() > 500:
            assert parameter.abs().max() <= 0.04
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.1)


@pytest.mark.parametrize(
    ("name", "millions", "table"),
    [("vlmo_base", 176.0, (1126, 144)), ("vlmo_base_plus", 166.9, None), ("vlmo_large", 562.6, (1126, 384))],
)
def test_recipes_have_published_sizes_and_stages_that_can_be_built(name: str, millions: float, table: Any) -> None:
    """Millions of parameters without task heads; rows and columns of the relative table (unilm#1256 shows base's)."""
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
    parts = Counter[str]()
    for model in (skeleton(ViLTConfig(), 30522), skeleton(ImageBERTConfig(), 30522)):
        for name, parameter in model.named_parameters():
            parts[f"{model.config.kind} {model.part_of(name)}"] += parameter.numel()
    vilt = sum(parts[f"vilt {part}"] for part in ("image_embedding", "blocks", "norm"))
    assert vilt / 1e6 == pytest.approx(87.4, rel=0.01)
    assert parts["imagebert encoder"] == 85_054_464
    assert parts["imagebert text_embedding"] == (30522 + 44 + 2 + 2) * 768
    assert parts["imagebert region_embedding"] == (2048 + 5 + 2 + 1 + 2) * 768


def test_blocks_have_rising_rates_and_towers_learn_from_their_modality_and_align_drop_path_at_the_end() -> None:
    model, rising = tiny.lively_model("dual_encoder"), [0.0, 0.1, 0.2, 0.3]
    for name, one in forwards("dual_encoder").items():
        trained = {model.part_of(parameter) for parameter in gradients(model, model({name: one}))}
        assert trained == {f"{name}_embedding", f"{name}_tower", "itc_head"}
    assert modules_for(skeleton(DUAL), "itc", "pairs") == frozenset(model.PARTS)
    towers = [skeleton(MODELS[kind][0]).blocks for kind in ("vlmo", "vilt", "vit")] + [model.image_tower["blocks"]]
    for blocks, rates in (*((tower, rising) for tower in towers), (model.text_tower["blocks"], rising[2:])):
        assert [block.drop_path for block in blocks] == pytest.approx(rates)
    masks = [[True] * 4, [False, False, True, True], [True, True, True, False]]
    text, keeps = forwards("dual_encoder")["text"], (torch.tensor(kept)[:, None].expand(ROWS, 4, 2) for kept in masks)
    everything, last, less = (run(model, replace(text, drop_path_mask=keep))["itc"] for keep in keeps)
    assert torch.equal(last, everything)
    assert not torch.allclose(less, everything)


@pytest.mark.parametrize(("kind", "rule"), [("dual_encoder", "bicubic"), ("vilt", "bilinear"), ("vit", "bilinear")])
def test_only_positions_change_with_image_size_and_text_length(kind: str, rule: Any) -> None:
    config, heads = MODELS[kind]
    before, own = build_model(config, VOCABULARY, heads).state_dict(), config.model_dump()
    shorter = {"max_text_length": 10} if kind != "vit" else {}
    ignored = {"max_visible_patches": None, "norm_eps": 1e-12} if kind == "vilt" else {}
    changes = {"image_size": own["image_size"] + 16, **shorter, **ignored}
    other = build_model(config.model_copy(update=changes), VOCABULARY, heads)
    after, name = other.resize_state(before, config), "image_embedding.positions"
    other.load_state_dict(after)
    positions = {name, "text_embedding.positions"} if shorter else {name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == positions
    assert torch.equal(after[name], resize_grid(before[name], own["image_size"] // 8 + 2, rule))
    assert not shorter or torch.equal(after["text_embedding.positions"], before["text_embedding.positions"][:-2])


def test_regions_are_embedded_and_read_as_in_the_paper() -> None:
    model, inputs = tiny.lively_model("imagebert"), forwards("imagebert")
    pair, regions = inputs["pair"], inputs["pair"].regions
    # A region's embedding is the norm of the sum of four parts.
    part, segment = model.region_embedding, model.text_embedding.token_type_embeddings.weight[1]
    summed = part.feature(regions.features) + part.location(regions.location) + segment + part.position
    near(part(regions, segment), F.layer_norm(summed, (24,), part.norm.weight, part.norm.bias, 1e-12))
    # Their order and padding do not matter.
    turned = Regions(*(tensor.flip(1) for tensor in vars(regions).values()))
    noise = replace(regions, features=regions.features.where(regions.keep.unsqueeze(-1), 99.0))
    logits, matched = run(model, pair, "itm"), torch.tensor([1, 0, 1, 0])
    for other in (turned, noise):
        near(run(model, replace(pair, regions=other), "itm"), logits)
    # Cross-entropy of the matching logits is the binary one.
    assert torch.equal(logits[:, 0], torch.zeros(ROWS))
    expected = F.binary_cross_entropy_with_logits(logits[:, 1], matched.float(), reduction="sum")
    near(F.cross_entropy(logits, matched, reduction="sum"), expected)
    # The region heads read the masked regions, of which the first examples have 0 and 3, and 2.
    out = run(model, replace(inputs["masked"], heads=("moc", "mrfr", "tokens")))
    assert (out["moc"].shape, out["mrfr"].shape) == ((ROWS, 2, 5), (ROWS, 2, 6))
    near(out["moc"][0, 1], model.moc_head(out["tokens"][0, LENGTH + 3]))
    near(out["mrfr"][1, 0], model.mrfr_head(out["tokens"][1, LENGTH + 2]))


def fused(*heads: Head, **changes: Any) -> Any:
    return replace(forwards("vilt")["pair"], heads=heads, drop_path_mask=None, **changes)


def test_positions_of_any_grid_equal_bilinear_interpolation() -> None:
    square = torch.randn(1 + 4 * 4, 10)
    for grid in [(4, 6), (6, 4), (4, 4), (1, 6), (5, 1), (9, 13), (1, 1)]:
        patches = torch.arange(grid[0] * grid[1])
        for chosen in (patches, patches[[-1, 0]]):
            resized = resized_positions(square[1:], chosen[None], torch.tensor([grid]))[0]
            near(resized, resize_grid(square, grid, "bilinear")[1:][chosen])


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
    close(gradients(vilt, others), gradients(vilt, mine), rtol=1e-4, atol=1e-5)
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
    image = {"image": first.image[:2, :24, :24], "image_size": torch.tensor([[16, 24], [24, 16]])}
    visible = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 2, -1, -1, -1, -1]])
    second = ForwardInput(("alignment",), **image, text=first.text[:2, :3], visible_patches=visible)
    joined, alone = vilt({"first": first, "second": second})["second"], run(vilt, second)
    assert joined["patches_keep"].sum(dim=1).tolist() == [6, 2]
    near(joined["patches"][joined["patches_keep"]], alone["patches"][alone["patches_keep"]])


def test_masked_patches_show_another_patch_or_a_trained_embedding_which_the_release_lacks(vilt: Any) -> None:
    one = fused("tokens", patch_positions=torch.tensor([[0]] * ROWS), patch_replacements=torch.tensor([[1]] * ROWS))
    shown = one.image.clone()
    for row, (_, width) in enumerate(SIZES.tolist()):
        down, across = divmod(1, width // PATCH)
        shown[row, :PATCH, :PATCH] = one.image[row, PATCH * down :, PATCH * across :][:PATCH, :PATCH]
    assert torch.equal(run(vilt, one)["tokens"], run(vilt, fused("tokens", image=shown))["tokens"])
    for name in ("mim", "masked"):
        assert gradients(vilt, vilt({name: forwards("vilt")[name]}))["image_embedding.mask"].any()


def test_fine_tuning_modules_start_from_pretrained_ones_and_a_start_from_a_vit_preserves_its_image_outputs() -> None:
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
    section = MODELS["vit"][0].model_copy(update={"image_size": 32})
    vit, model = build_model(section, 0, HeadConfig(classes=4), seed=5), tiny.lively_model("vilt")
    model.load_state_dict(model.resize_state(vit.state_dict(), section), strict=False)
    with torch.no_grad():
        model.image_embedding.modality.zero_()
    one = ForwardInput(("tokens",), image=fused().image[:, :32, :32])
    near(run(model, one)["tokens"], run(vit, one)["tokens"])
    with pytest.raises(ConfigError, match="width 24 there, 48 here"):
        skeleton(VILT.model_copy(update={"width": 48}), VOCABULARY).resize_state(vit.state_dict(), section)
