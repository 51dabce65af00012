"""Properties of VLMo, on a model of 4 layers. Shapes: B = 5 examples, L = 7 tokens, 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.errors import ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import HeadConfig
from pipeline.models.vlmo import PARTS, VLMo, copy_expert
from pipeline.objectives import trained_modules

VOCABULARY = 23
RELATIVE = VLMoConfig(
    width=24,
    layers=4,
    heads=3,
    vision_language_layers=2,
    mlp_ratio=2,
    image_size=16,
    patch_size=8,
    max_text_length=12,
    layer_scale=0.5,
    drop_path=0.3,
)
ABSOLUTE = RELATIVE.model_copy(update={"positions": "absolute", "layer_scale": None})
ROWS, LENGTH = 5, 7


@pytest.fixture(params=[RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
def model(request: pytest.FixtureRequest) -> VLMo:
    return lively(request.param)


def lively(config: VLMoConfig) -> VLMo:
    """Build a model without parameters at special values, so that no effects cancel by chance."""
    model = build_model(config, VOCABULARY, HeadConfig("mean_colour", classes=3, answers=4, nlvr2=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def passes(seed: int = 0) -> dict[str, ForwardInput]:
    """Return a forward of every kind, with drop path."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    image = integers(256, ROWS, 16, 16, 3).to(torch.uint8)
    text = integers(VOCABULARY, ROWS, LENGTH)
    keep = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3, 4])[:, None]
    drop_path_mask = torch.rand(ROWS, 4, 2, generator=generator) > 0.3
    masked = integers(3, ROWS, 2)
    patches = torch.rand(ROWS, 4, generator=generator).argsort(dim=1)[:, :2]
    return {
        "image": ForwardInput(("itc",), image=image, drop_path_mask=drop_path_mask),
        "text": ForwardInput(("itc",), text=text, text_keep=keep, drop_path_mask=drop_path_mask),
        "mim": ForwardInput(("mim",), image=image, patch_positions=patches, drop_path_mask=drop_path_mask),
        "masked_text": ForwardInput(
            ("mlm",), text=text, text_keep=keep, mask_positions=masked, drop_path_mask=drop_path_mask
        ),
        "pair": ForwardInput(("itm",), image=image, text=text, text_keep=keep, drop_path_mask=drop_path_mask),
        "masked": ForwardInput(
            ("mlm",),
            image=image,
            text=text[:, :5],
            text_keep=keep[:, :5],
            mask_positions=masked,
            drop_path_mask=drop_path_mask,
        ),
    }


def fine_tuning_passes() -> dict[str, ForwardInput]:
    """Return a forward for each head that fine-tuning adds."""
    pair = replace(passes()["pair"], drop_path_mask=None)
    assert pair.image is not None
    return {
        "classes": ForwardInput(("classes",), image=pair.image),
        "answers": replace(pair, heads=("answers",)),
        "nlvr2": replace(pair, heads=("nlvr2",), second_image=pair.image.flip(0)),
    }


def values(outputs: ForwardOutput) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, result in outputs.items() for key, value in result.items()}


def same(left: ForwardOutput, right: ForwardOutput) -> None:
    torch.testing.assert_close(values(left), values(right), rtol=1e-5, atol=1e-5)


def gradients(model: VLMo, outputs: ForwardOutput) -> dict[str, Tensor]:
    model.zero_grad()
    weighted = [(v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values(outputs).values()]
    torch.stack(weighted).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_tokens(named: dict[str, ForwardInput]) -> dict[str, ForwardInput]:
    return {name: replace(one, heads=(*one.heads, "tokens")) for name, one in named.items()}


def test_padding_changes_no_real_token(model: VLMo) -> None:
    def longer(one: ForwardInput) -> ForwardInput:
        if one.text is None or one.text_keep is None:
            return one
        text = torch.cat([one.text, torch.full((ROWS, 4), 3)], dim=1)
        keep = torch.cat([one.text_keep, torch.zeros(ROWS, 4, dtype=torch.bool)], dim=1)
        return replace(one, text=text, text_keep=keep)

    short, padded = passes(), {name: longer(one) for name, one in passes().items()}
    same(model(short), model(padded))
    expected, actual = gradients(model, model(short)), gradients(model, model(padded))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_padding_tokens_are_never_read(model: VLMo) -> None:
    def scribbled(one: ForwardInput) -> ForwardInput:
        if one.text is None or one.text_keep is None:
            return one
        return replace(one, text=one.text.where(one.text_keep, (one.text + 1) % VOCABULARY))

    same(model(passes()), model({name: scribbled(one) for name, one in passes().items()}))


def test_joined_forwards_equal_each_alone(model: VLMo) -> None:
    together = model(passes())
    alone: ForwardOutput = {}
    for name, one in passes().items():
        alone.update(model({name: one}))
    assert list(together) == list(passes())
    same(together, alone)
    torch.testing.assert_close(gradients(model, together), gradients(model, alone), rtol=1e-4, atol=1e-5)


def test_batched_examples_equal_each_alone(model: VLMo) -> None:
    def cut(one: ForwardInput, rows: slice) -> ForwardInput:
        return ForwardInput(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in vars(one).items()})

    whole = values(model(passes()))
    parts = [values(model({n: cut(one, rows) for n, one in passes().items()})) for rows in (slice(0, 2), slice(2, 5))]
    for name, value in whole.items():
        joined = torch.cat([part[name] for part in parts]) if value.dim() else parts[0][name]
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-5)


def test_reading_only_what_heads_need_equals_reading_everything(model: VLMo) -> None:
    everything = model(with_tokens(passes()))
    assert everything["pair"]["tokens"].shape == (ROWS, LENGTH + 5, 24)
    assert everything["masked"]["tokens"].shape == (ROWS, 5 + 5, 24)
    needed = {name: {k: v for k, v in result.items() if k != "tokens"} for name, result in everything.items()}
    same(model(passes()), needed)


def test_several_heads_share_one_forward(model: VLMo) -> None:
    pair, masked = passes()["pair"], passes()["masked_text"]
    both = model({"both": replace(pair, heads=("itm", "mlm"), mask_positions=masked.mask_positions)})["both"]
    itm = model({"one": pair})["one"]["itm"]
    mlm = model({"one": replace(pair, heads=("mlm",), mask_positions=masked.mask_positions)})["one"]["mlm"]
    torch.testing.assert_close(both["itm"], itm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both["mlm"], mlm, rtol=1e-5, atol=1e-5)


def test_kept_branch_is_scaled_by_its_drop_path_rate(model: VLMo) -> None:
    image = passes()["image"].image
    kept = model(
        {"one": ForwardInput(("tokens",), image=image, drop_path_mask=torch.ones(ROWS, 4, 2, dtype=torch.bool))}
    )
    for block, rate in zip(model.blocks, model.config.drop_path_rates, strict=True):
        for branch in (block.attention.projection, block.experts["vision"].contract):
            with torch.no_grad():
                branch.weight.div_(1 - rate)
                branch.bias.div_(1 - rate)
    same(model({"one": ForwardInput(("tokens",), image=image)}), kept)


def test_example_that_drops_every_branch_is_its_embedding(model: VLMo) -> None:
    one = passes()["image"]
    dropped = replace(one, heads=("tokens",), drop_path_mask=torch.zeros(ROWS, 4, 2, dtype=torch.bool))
    expected = model.norm(model.image_embedding(one.image))
    torch.testing.assert_close(model({"one": dropped})["one"]["tokens"], expected)


def test_drop_path_rates_rise_linearly_to_the_last_layer() -> None:
    assert RELATIVE.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3))


def test_forward_draws_no_random_numbers(model: VLMo) -> None:
    before = torch.get_rng_state()
    first, second = model(passes()), model(passes())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(values(first).values(), values(second).values(), strict=True))


class NoHostSynchronisation(TorchDispatchMode):
    """Dispatch mode that fails on operations that make the host wait for the device.

    These read a value of a tensor, or have a shape that depends on values.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), func
        if func.__name__.startswith("index."):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


def test_forward_never_waits_for_the_device(model: VLMo) -> None:
    with NoHostSynchronisation():
        model(with_tokens(passes()))
        model(passes())


def test_masked_patches_are_not_read(model: VLMo) -> None:
    one = passes()["mim"]
    patches = torch.rand(ROWS, 4).argsort(dim=1)[:, :2]
    painted = one.image.unflatten(1, (2, 8)).unflatten(3, (2, 8)).clone()
    for row in range(ROWS):
        for place in patches[row].tolist():
            painted[row, place // 2, :, place % 2] = 0
    first = replace(one, patch_positions=patches)
    second = replace(first, image=painted.reshape(one.image.shape))
    assert not torch.equal(first.image, second.image)
    same(model({"one": first}), model({"one": second}))
    with pytest.raises(AssertionError):
        same(model({"one": replace(first, patch_positions=1 - patches % 2)}), model({"one": first}))


def test_uint8_images_equal_float_images(model: VLMo) -> None:
    one = passes()["image"]
    same(model({"one": one}), model({"one": replace(one, image=one.image / 127.5 - 1)}))


def test_bfloat16_gives_float32_results_near_those_of_float32(model: VLMo) -> None:
    exact = values(model(passes()))
    rough = values(model.to(torch.bfloat16)(passes()))
    for name, value in rough.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
        if name.endswith(("itc", "itc_vl")):
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(ROWS))
            assert (value * exact[name]).sum(dim=-1).min() > 0.99


def test_scales_never_exceed_their_bound(model: VLMo) -> None:
    with torch.no_grad():
        model.itc_head.log_scale.fill_(9.0)
    out = model(passes())
    assert out["image"]["scale"] == 100
    assert out["text"]["scale_vl"] < 100


def test_trap_10_example_of_only_padding_is_finite(model: VLMo) -> None:
    empty = replace(passes()["text"], text_keep=torch.zeros(ROWS, LENGTH, dtype=torch.bool), drop_path_mask=None)
    for dtype in (torch.float32, torch.bfloat16):
        found = gradients(model.to(dtype), model({"text": empty}))
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_second_image_differs_by_its_modality_only(model: VLMo) -> None:
    """With equal modality vectors two images equal two single ones; with different ones their order matters."""
    one = fine_tuning_passes()["nlvr2"]
    swapped = replace(one, image=one.second_image, second_image=one.image)

    def pooled(which: ForwardInput) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            halves = model({"two": replace(which, heads=("tokens",))})["two"]["tokens"].chunk(2, dim=1)
        return halves[0][:, 0], halves[1][:, 0]

    first, second = pooled(one)
    turned_first, turned_second = pooled(swapped)
    assert not torch.allclose(first, turned_second, atol=1e-4)
    with torch.no_grad():
        model.image_embedding.second.copy_(model.image_embedding.modality)  # type: ignore[union-attr]
    first, second = pooled(one)
    turned_first, turned_second = pooled(swapped)
    torch.testing.assert_close((first, second), (turned_second, turned_first))


def test_empty_batch_without_masks_runs_the_same_graph(model: VLMo) -> None:
    def empty(one: ForwardInput) -> ForwardInput:
        return ForwardInput(**{k: v[:0] if isinstance(v, Tensor) else v for k, v in vars(one).items()})

    out = model({name: empty(one) for name, one in passes().items()})
    assert set(gradients(model, out)) == set(gradients(model, model(passes())))
    none = replace(passes()["masked_text"], mask_positions=torch.zeros(ROWS, 0, dtype=torch.int64))
    assert model({"one": none})["one"]["mlm"].shape == (ROWS, 0, VOCABULARY)


def test_text_longer_than_the_positions_is_rejected(model: VLMo) -> None:
    with pytest.raises(ValueError, match=r"13 tokens.*12.*model\.max_text_length"):
        model({"one": ForwardInput(("itc",), text=torch.zeros(2, 13, dtype=torch.int64))})


def test_images_of_another_size_are_rejected(model: VLMo) -> None:
    with pytest.raises(ValueError, match="16, 16, 3"):
        model({"one": ForwardInput(("itc",), image=torch.zeros(2, 24, 24, 3, dtype=torch.uint8))})


def test_head_without_its_inputs_is_rejected(model: VLMo) -> None:
    given = passes()
    for head, one in [("itc", given["pair"]), ("itm", given["image"]), ("mlm", given["text"])]:
        with pytest.raises(ValueError, match=f"head '{head}'"):
            model({"one": replace(one, heads=(head,))})
    with pytest.raises(ValueError, match="image target"):
        build_model(RELATIVE, VOCABULARY)({"one": given["mim"]})


# ---- parts


def test_modules_partition_the_parameters(model: VLMo) -> None:
    found = {model.part_of(name) for name, _ in model.named_parameters()}
    absent = {"positions.cross"} if model.config.positions == "absolute" else set()
    assert found == set(PARTS) - absent


READINGS = {
    ("itc", "pairs"): ("image", "text"),
    ("itm", "pairs"): ("pair",),
    ("mlm", "pairs"): ("masked",),
    ("mlm", "text"): ("masked_text",),
    ("mim", "images"): ("mim",),
    ("mim", "pairs"): ("mim",),
    ("classification", "labelled"): ("classes",),
    ("vqa", "questions"): ("answers",),
    ("nlvr2", "statements"): ("nlvr2",),
}
STAGES = [
    ({"mim"}, "images"),
    ({"mlm"}, "text"),
    ({"itc", "itm", "mlm"}, "pairs"),
]


def cases() -> Iterator[tuple[frozenset[str], str]]:
    yield from ((frozenset({objective}), source_type) for objective, source_type in READINGS)
    yield from ((frozenset(objectives), source_type) for objectives, source_type in STAGES)


@pytest.mark.parametrize(("objectives", "source_type"), cases())
def test_declared_modules_are_those_with_a_gradient(model: VLMo, objectives: frozenset[str], source_type: str) -> None:
    wanted = {name for objective in objectives for name in READINGS[objective, source_type]}
    every = passes() | fine_tuning_passes()
    kept = {name: replace(one, drop_path_mask=None) for name, one in every.items() if name in wanted}
    found = gradients(model, model(kept))
    used = trained_modules(model, objectives, source_type)
    assert {model.part_of(name) for name in found} == used
    for name, _ in model.named_parameters():
        assert (model.part_of(name) in used) == (name in found), name
        assert name not in found or found[name].abs().max() > 0, name


def test_objective_without_its_source_type_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"itc.*pairs.*text"):
        trained_modules(skeleton(RELATIVE), frozenset({"itc"}), "text")


def test_published_language_stage_freezes_named_modules() -> None:
    model = skeleton(RELATIVE)
    frozen = model.parts_named(["image_embedding", "attention", "vision_expert"])
    assert frozen == {"image_embedding", "attention", "vision_expert.lower", "vision_expert.upper"}
    left = trained_modules(model, frozenset({"mlm"}), "text") - frozen
    assert left == {
        "text_embedding",
        "positions.text",
        "language_expert.lower",
        "language_expert.upper",
        "norm",
        "mlm_head",
    }


def test_unknown_module_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vision_expert'"):
        skeleton(RELATIVE).parts_named(["vision_experts"])


# ---- weights


def test_only_copied_experts_change(model: VLMo) -> None:
    before = model.state_dict()
    after = copy_expert(before, "vision", "vision_language")
    for name, tensor in after.items():
        source = name.replace("experts.vision_language", "experts.vision")
        assert torch.equal(tensor, before[source])
    changed = {model.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_language_expert"}


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(RELATIVE, VOCABULARY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(RELATIVE, VOCABULARY, HeadConfig("pixels"), seed=3).state_dict()
    other = build_model(RELATIVE, VOCABULARY, seed=4).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.state_dict().items())
    drawn = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])}
    assert {"text_embedding.word.weight", "image_embedding.cls", "blocks.3.attention.weight"} <= drawn


def test_initialisation_is_the_published_one() -> None:
    model = build_model(RELATIVE, VOCABULARY)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("gamma"):
            assert (parameter == 0.5).all()
        elif name.endswith("bias") or name.startswith("positions"):
            assert (parameter == 0).all()
        elif parameter.numel() > 500:
            assert parameter.abs().max() <= 0.04
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.1)
