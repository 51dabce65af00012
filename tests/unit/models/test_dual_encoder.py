"""Properties of the dual encoder. Shapes: B = 5 examples, L = 7 tokens, 2 x 2 patches; towers of 3 and 2 layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import DualEncoderConfig
from pipeline.models import build_model, skeleton
from pipeline.models.dual_encoder import PARTS, DualEncoder
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import modules_for, trained_modules

VOCABULARY, ROWS, LENGTH = 23, 5, 7
CONFIG = DualEncoderConfig(
    width=24,
    layers=3,
    text_layers=2,
    heads=3,
    mlp_ratio=2,
    image_size=16,
    patch_size=8,
    max_text_length=12,
    embedding=10,
    drop_path=0.4,
)


@pytest.fixture
def model() -> DualEncoder:
    model = build_model(CONFIG, VOCABULARY)
    assert isinstance(model, DualEncoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def passes() -> dict[str, ForwardInput]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (ROWS, 16, 16, 3), generator=generator, dtype=torch.uint8)
    text = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    keep = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3, 4])[:, None]
    drop_path_mask = torch.rand(ROWS, 3, 2, generator=generator) > 0.3
    return {
        "image": ForwardInput(("itc",), image=image, drop_path_mask=drop_path_mask),
        "text": ForwardInput(("itc",), text=text, text_keep=keep, drop_path_mask=drop_path_mask),
    }


def values(outputs: ForwardOutput) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, result in outputs.items() for key, value in result.items()}


def gradients(model: DualEncoder, outputs: ForwardOutput) -> dict[str, Tensor]:
    model.zero_grad()
    weighted = [(v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values(outputs).values()]
    torch.stack(weighted).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_towers_give_unit_vectors_and_one_scale(model: DualEncoder) -> None:
    out = model(passes())
    for name in ("image", "text"):
        assert set(out[name]) == {"itc", "scale"}
        assert out[name]["itc"].shape == (ROWS, 10)
        torch.testing.assert_close(out[name]["itc"].norm(dim=-1), torch.ones(ROWS))
    assert out["image"]["scale"] == out["text"]["scale"]
    with torch.no_grad():
        model.itc_head.log_scale.fill_(9.0)
    assert model(passes())["image"]["scale"] == 100


def test_padding_changes_no_output_or_gradient(model: DualEncoder) -> None:
    short = passes()["text"]
    assert short.text is not None
    assert short.text_keep is not None
    longer = replace(
        short,
        text=torch.cat([short.text, torch.full((ROWS, 4), 3)], dim=1),
        text_keep=torch.cat([short.text_keep, torch.zeros(ROWS, 4, dtype=torch.bool)], dim=1),
    )
    one, other = model({"text": short}), model({"text": longer})
    torch.testing.assert_close(values(one), values(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, one), gradients(model, other), rtol=1e-4, atol=1e-5)


def test_padding_tokens_are_never_read(model: DualEncoder) -> None:
    one = passes()["text"]
    assert one.text is not None
    assert one.text_keep is not None
    scribbled = replace(one, text=one.text.where(one.text_keep, (one.text + 1) % VOCABULARY))
    assert torch.equal(model({"text": one})["text"]["itc"], model({"text": scribbled})["text"]["itc"])


def test_tower_gets_gradients_from_its_own_modality_only(model: DualEncoder) -> None:
    found = {name: gradients(model, model({name: one})) for name, one in passes().items()}
    assert {model.part_of(name) for name in found["image"]} == {"image_embedding", "image_tower", "itc_head"}
    assert {model.part_of(name) for name in found["text"]} == {"text_embedding", "text_tower", "itc_head"}


def test_reading_only_the_first_token_equals_reading_all(model: DualEncoder) -> None:
    needed = model(passes())
    everything = model({name: replace(one, heads=("itc", "tokens")) for name, one in passes().items()})
    assert everything["image"]["tokens"].shape == (ROWS, 5, 24)
    assert everything["text"]["tokens"].shape == (ROWS, LENGTH, 24)
    for name in needed:
        torch.testing.assert_close(everything[name]["itc"], needed[name]["itc"], rtol=1e-5, atol=1e-5)


def test_example_that_drops_every_branch_is_its_embedding(model: DualEncoder) -> None:
    one = replace(passes()["text"], heads=("tokens",), drop_path_mask=torch.zeros(ROWS, 3, 2, dtype=torch.bool))
    expected = model.text_tower.norm(model.text_embedding(one.text))
    torch.testing.assert_close(model({"one": one})["one"]["tokens"], expected)


def test_drop_path_rates_of_towers_are_aligned_at_the_end(model: DualEncoder) -> None:
    assert pytest.approx((0.0, 0.2, 0.4)) == CONFIG.drop_path_rates
    assert [block.drop_path for block in model.image_tower.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert [block.drop_path for block in model.text_tower.blocks] == pytest.approx([0.2, 0.4])
    one = passes()["text"]
    keep = torch.ones(ROWS, 3, 2, dtype=torch.bool)
    kept = model({"one": replace(one, drop_path_mask=keep)})["one"]["itc"]
    first = model({"one": replace(one, drop_path_mask=keep & torch.tensor([False, True, True])[:, None])})["one"]["itc"]
    last = model({"one": replace(one, drop_path_mask=keep & torch.tensor([True, True, False])[:, None])})["one"]["itc"]
    assert torch.equal(first, kept)
    assert not torch.allclose(last, kept)


def test_empty_batch_runs_the_same_graph(model: DualEncoder) -> None:
    empty = {
        name: ForwardInput(**{k: v[:0] if isinstance(v, Tensor) else v for k, v in vars(one).items()})
        for name, one in passes().items()
    }
    assert set(gradients(model, model(empty))) == set(gradients(model, model(passes())))


def test_image_and_text_in_one_forward_are_rejected(model: DualEncoder) -> None:
    fused = replace(passes()["text"], image=passes()["image"].image, heads=("tokens",))
    with pytest.raises(ValueError, match="never both in one input"):
        model({"one": fused})


def test_heads_of_other_models_are_rejected_by_name(model: DualEncoder) -> None:
    masked = replace(passes()["text"], heads=("mlm",), mask_positions=torch.zeros(ROWS, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="without the head 'mlm'"):
        model({"one": masked})


def test_itc_on_pairs_is_the_only_objective() -> None:
    model = skeleton(CONFIG)
    assert (
        modules_for(model, "itc", "pairs")
        == frozenset(PARTS)
        == {model.part_of(n) for n, _ in model.named_parameters()}
    )
    with pytest.raises(ConfigError, match="mome objectives"):
        trained_modules(model, ["itm"], "pairs")
    with pytest.raises(ConfigError, match=r"itc.*pairs.*text"):
        trained_modules(model, ["itc"], "text")


def test_only_positions_change_with_image_size_and_text_length() -> None:
    before = build_model(CONFIG, VOCABULARY).state_dict()
    changes = {"image_size": CONFIG.image_size + CONFIG.patch_size, "max_text_length": CONFIG.max_text_length - 2}
    other = build_model(CONFIG.model_copy(update=changes), VOCABULARY)
    after = other.resize_state(before, CONFIG)
    other.load_state_dict(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"image_embedding.positions", "text_embedding.positions"}
    assert torch.equal(after["image_embedding.positions"][0], before["image_embedding.positions"][0])
    assert torch.equal(after["text_embedding.positions"], before["text_embedding.positions"][:-2])
