"""Properties of every kind of model: packing, padding, drop path, empty batches, parts, initialisation, and errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.config.errors import ConfigError
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput
from pipeline.models.model import Model
from pipeline.objectives import trained_modules
from tests.support import forwards as tiny
from tests.support.forwards import MODELS, ROWS, VOCABULARY, assert_same, examples, forwards, gradients, run, values

close = torch.testing.assert_close
READS_TEXT = pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("vit")], indirect=True)


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
    """Forwards of other text lengths, canvases and heads share a run; no examples run the same graph."""
    together, alone = model(inputs), {key: run(model, one) for key, one in inputs.items()}
    assert list(together) == list(alone)
    assert_same(together, alone)
    expected = gradients(model, together)
    close(expected, gradients(model, alone), rtol=1e-4, atol=1e-5)
    for one in (one for one in inputs.values() if "decoded_image" not in one.heads):  # which reads everything
        everything = run(model, one, *one.heads, "tokens")
        assert everything["tokens"].shape[2] == 24
        for head in one.heads:
            close(run(model, one, head), everything[head], rtol=1e-5, atol=1e-5)
        if "mlm" in one.heads:
            none = replace(one, mask_positions=torch.zeros(ROWS, 0, dtype=torch.int64))
            assert run(model, none, "mlm").shape == (ROWS, 0, VOCABULARY)
    first, others, none = (model(examples(inputs, rows)) for rows in (slice(1), slice(1, ROWS), slice(0)))
    parts = values(first), values(others)
    for key, value in values(together).items():
        joined = torch.cat([part[key] for part in parts]) if value.dim() else parts[0][key]
        close(joined, value, rtol=1e-5, atol=1e-5)
    assert gradients(model, none).keys() == expected.keys()


# ---- what is read


@READS_TEXT
def test_trap_10_padding_of_texts_is_never_read_and_only_padding_is_finite(
    model: Model, inputs: dict[str, Any]
) -> None:
    short = {key: one for key, one in inputs.items() if one.text is not None}
    longer = {}
    for key, one in short.items():
        text = F.pad(one.text.where(one.text_keep, (one.text + 1) % VOCABULARY), (0, 4), value=3)
        longer[key] = replace(one, text=text, text_keep=F.pad(one.text_keep, (0, 4)))
    assert_same(model(short), model(longer))
    close(gradients(model, model(longer)), gradients(model, model(short)), rtol=1e-4, atol=1e-5)
    nothing = {k: replace(one, text_keep=one.text_keep & False, drop_path_mask=None) for k, one in short.items()}
    for dtype in (torch.float32, torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(model, model.to(dtype)(nothing)).values())


@pytest.mark.parametrize("name", ["vlmo", "vlmo_absolute", "vilt", "vit", "vit_decoded"], indirect=True)
def test_masked_patches_are_never_read(model: Model, inputs: dict[str, Any]) -> None:
    one, patch = inputs["mim"], tiny.PATCH
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
    given = {key: replace(one, drop_path_mask=dropped) for key, one in inputs.items() if key != "nlvr2"}
    given = {key: one for key, one in given.items() if one.visible_patches is None}  # an image decoder has blocks too
    before = model(given)
    with torch.no_grad():
        for block in (module for module in model.modules() if isinstance(module, model.BLOCK)):
            for parameter in block.parameters():
                parameter.mul_(3)
    assert all(torch.equal(value, values(model(given))[key]) for key, value in values(before).items())


def test_images_may_be_floats_weights_bfloat16_and_nothing_is_drawn(model: Model, inputs: dict[str, Any]) -> None:
    before, first, second = torch.get_rng_state(), values(model(inputs)), values(model(inputs))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    given = {key: one for key, one in inputs.items() if one.image is not None and one.second_image is None}
    assert_same(model(given), model({key: replace(one, image=one.image / 127.5 - 1) for key, one in given.items()}))
    for key, value in values(model.to(torch.bfloat16)(inputs)).items():
        assert value.dtype == torch.float32, key
        if key.endswith(("itc", "itc_vl")):
            close(value.norm(dim=-1), torch.ones(ROWS))
        assert F.cosine_similarity(value.flatten(), first[key].flatten(), dim=0) > 0.98, key


@pytest.mark.parametrize("name", ["vlmo", "dual_encoder"], indirect=True)
def test_contrast_gives_unit_vectors_and_a_bounded_scale(model: Any, inputs: dict[str, Any]) -> None:
    given = {key: inputs[key] for key in ("image", "text")}
    outputs = values(model(given))
    for key in given:
        close(outputs[f"{key}.itc"].norm(dim=-1), torch.ones(ROWS))
    assert outputs["image.scale"] == outputs["text.scale"]
    with torch.no_grad():
        model.itc_head.log_scale.fill_(9.0)
    outputs = values(model(given))
    assert outputs["image.scale"] == 100
    assert outputs.get("text.scale_vl", torch.zeros(())) < 100


@pytest.mark.parametrize("name", ["vlmo", "vlmo_absolute", "vilt"], indirect=True)
def test_second_image_differs_by_its_modality_only(model: Any, inputs: dict[str, Any]) -> None:
    """With equal modality vectors two images equal two single ones; with different ones their order matters."""
    one = inputs["nlvr2"]
    images = {"image": one.second_image, "image_size": one.second_image_size}
    turned = replace(one, **images, second_image=one.image, second_image_size=one.image_size)
    for is_equal in (False, True):
        first, other = (run(model, pair, "tokens").chunk(2, dim=1) for pair in (one, turned))
        for half, twin in zip(first, other[::-1], strict=True):
            assert torch.allclose(half[:, 0], twin[:, 0], rtol=1e-5, atol=1e-4) == is_equal
        with torch.no_grad():
            model.image_embedding.second.copy_(model.image_embedding.modality)


# ---- parameters


def test_parts_partition_the_parameters_and_weights_depend_on_the_seed_alone(model: Model, name: str) -> None:
    absent = {"positions.cross"} if name == "vlmo_absolute" else set()
    assert {model.part_of(parameter) for parameter, _ in model.named_parameters()} == set(model.PARTS) - absent
    config, heads = MODELS[name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config, VOCABULARY, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(config, VOCABULARY, heads, seed=3).state_dict()
    assert all(torch.equal(tensor, second[parameter]) for parameter, tensor in first.items())
    other = build_model(config, VOCABULARY, seed=4).state_dict()
    drawn = [tensor for parameter, tensor in first.items() if not torch.equal(tensor, other[parameter])]
    assert len(drawn) > len(first) / 5
    assert not any(tensor.isnan().any() for tensor in drawn)


# ---- errors


TEXT, IMAGE = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
SHAPED: dict[str, Any] = {"image": IMAGE, "image_size": torch.tensor([[16, 8]] * 2)}


@pytest.mark.parametrize(
    ("name", "one", "message"),
    [
        ("vlmo", ForwardInput(("itc",), text=torch.zeros(2, 13, dtype=torch.int64)), r"13 tokens.*max_text_length"),
        ("imagebert", ForwardInput(("itm",), text=TEXT.repeat(1, 3)), r"head 'itm'"),
        ("imagebert", ForwardInput(("tokens",), text=TEXT.repeat(1, 3)), r"15 tokens.*model\.max_text_length"),
        ("imagebert", ForwardInput(("itm",), text=TEXT, image=IMAGE), "no pixels"),
        ("vlmo", ForwardInput(("itc",), image=IMAGE.repeat(1, 2, 2, 1)), "16, 16, 3"),
        ("vlmo", ForwardInput(("tokens",), **SHAPED), "whole square images"),
        ("vlmo", ForwardInput(("itc",), image=IMAGE, text=TEXT), "head 'itc'"),
        ("vlmo", ForwardInput(("itm",), image=IMAGE), "head 'itm'"),
        ("vlmo", ForwardInput(("mlm",), text=TEXT), "head 'mlm'"),
        ("vilt", ForwardInput(("tokens",), image=IMAGE[:, :12]), "multiples of 8"),
        ("vit", ForwardInput(("tokens",), text=TEXT), "no text"),
        ("vit", ForwardInput(("tokens",), **SHAPED), "square"),
        ("dual_encoder", ForwardInput(("tokens",), image=IMAGE, text=TEXT), "never both in one input"),
        ("dual_encoder", ForwardInput(("tokens",), **SHAPED), "whole square images"),
        ("dual_encoder", ForwardInput(("mlm",), text=TEXT, mask_positions=TEXT), "without the head 'mlm'"),
    ],
)
def test_inputs_that_a_model_cannot_read_are_rejected(model: Model, one: ForwardInput, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model({"one": one})


@pytest.mark.parametrize(
    ("name", "head"), [("vilt", "ranking"), ("vlmo", "answers"), ("vit", "classes"), ("imagebert", "alignment")]
)
def test_heads_that_the_stage_does_not_need_are_rejected_by_name(name: str, head: Any, inputs: dict[str, Any]) -> None:
    config, _ = MODELS[name]
    model = build_model(config, VOCABULARY)
    one = next(one for one in inputs.values() if head in one.heads or head == "alignment")
    with pytest.raises(ValueError, match=f"{config.kind} model was built without the head '{head}'"):
        run(model, one, head)
    if "mim" in inputs:
        with pytest.raises(ValueError, match="built with an image target"):
            run(model, inputs["mim"])


def test_unsupported_objectives_and_weights_of_another_architecture_are_rejected() -> None:
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
