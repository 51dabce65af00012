"""ViLT equals Hugging Face's on random weights, which round-trip through both published formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViltConfig as HFConfig
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import ViLTConfig
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig

VOCABULARY, LENGTH, PATCH, EPSILON = 29, 7, 8, 1e-12
CONFIG = ViLTConfig(
    width=24,
    layers=3,
    heads=3,
    mlp_ratio=2,
    image_size=32,
    longest_side=48,
    patch_size=PATCH,
    max_text_length=10,
    max_visible_patches=None,
    norm_eps=EPSILON,
)
# Images of mixed shapes on one canvas: rows and columns of pixels.
SIZES = torch.tensor([[32, 48], [48, 32], [32, 32], [8, 48], [40, 16]])
ROWS = len(SIZES)


def theirs(kind: type, **more: int) -> nn.Module:
    config = HFConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=PATCH,
        max_position_embeddings=10,
        layer_norm_eps=EPSILON,
        **more,
    )
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def ours(state: dict[str, Tensor], heads: HeadConfig = HeadConfig()) -> nn.Module:
    model = build_model(CONFIG, VOCABULARY, heads)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(model.part_of(name) in model.HEAD_PARTS for name in found.missing_keys)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(ROWS, 48, 48, dtype=torch.int64)
    for row, (height, width) in enumerate(SIZES.tolist()):
        mask[row, :height, :width] = 1
    keep = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3, 4])[:, None]
    return {
        "input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator),
        "attention_mask": keep.long(),
        "pixel_values": (torch.rand(ROWS, 3, 48, 48, generator=generator) * 2 - 1) * mask[:, None],
        "pixel_mask": mask,
    }


def the_pass(*heads: str, **more: Tensor) -> ForwardInput:
    given = inputs()
    return ForwardInput(
        heads=heads,  # type: ignore[arg-type]
        image=given["pixel_values"].permute(0, 2, 3, 1),
        image_size=SIZES,
        text=given["input_ids"],
        text_keep=given["attention_mask"].bool(),
        **more,
    )


def agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_fused_forward_equals_hugging_faces_vilt_model() -> None:
    other = theirs(ViltModel)
    model = ours(FORMATS["vilt-hf"].read(other.state_dict(), CONFIG))
    # Hugging Face pads short images with shuffled patches; one image at a time has no padding.
    found = model({"one": the_pass("tokens")})["one"]["tokens"]
    given = inputs()
    for row, (height, width) in enumerate(SIZES.tolist()):
        one = {name: tensor[row : row + 1] for name, tensor in given.items()}
        one["pixel_values"] = one["pixel_values"][:, :, :height, :width]
        one["pixel_mask"] = one["pixel_mask"][:, :height, :width]
        torch.manual_seed(2)
        expected = other(**one)
        words, patches = int(given["attention_mask"][row].sum()), height * width // PATCH**2
        agree(found[row, :words], expected.last_hidden_state[0, :words])
        agree(found[row, LENGTH], expected.last_hidden_state[0, LENGTH])
        # Hugging Face returns patches in random order.
        mine = found[row, LENGTH + 1 : LENGTH + 1 + patches]
        order = torch.cdist(expected.last_hidden_state[0, LENGTH + 1 :], mine).argmin(dim=0)
        assert len(order.unique()) == patches
        agree(mine, expected.last_hidden_state[0, LENGTH + 1 :][order])
        agree(model.pooler(found[row, :1]), expected.pooler_output)


def test_masked_words_equal_hugging_faces_vilt_for_masked_lm() -> None:
    other = theirs(ViltForMaskedLM)
    other.mlm_score.decoder.weight = nn.Parameter(torch.randn(VOCABULARY, 24))  # untied, as in the release
    model = ours(FORMATS["vilt-hf"].read(other.state_dict(), CONFIG))
    everywhere = torch.arange(LENGTH).expand(ROWS, LENGTH)
    found = model({"one": the_pass("mlm", mask_positions=everywhere)})["one"]["mlm"]
    keep = inputs()["attention_mask"].bool()
    agree(found[keep], other(**inputs()).logits[keep])


@pytest.mark.parametrize(
    ("kind", "more", "heads", "head"),
    [
        (ViltForImageAndTextRetrieval, {}, HeadConfig(ranking=True), "ranking"),
        (ViltForQuestionAnswering, {"num_labels": 5}, HeadConfig(answers=5), "answers"),
    ],
)
def test_fine_tuned_head_equals_hugging_faces(kind: type, more: dict[str, int], heads: HeadConfig, head: str) -> None:
    other = theirs(kind, **more)
    model = ours(FORMATS["vilt-hf"].read(other.state_dict(), CONFIG), heads)
    agree(model({"one": the_pass(head)})["one"][head], other(**inputs()).logits.squeeze(1))


def test_nlvr2_equals_hugging_faces_two_image_model() -> None:
    other = theirs(ViltForImagesAndTextClassification, num_images=2, num_labels=2, modality_type_vocab_size=3)
    model = ours(FORMATS["vilt-hf"].read(other.state_dict(), CONFIG), HeadConfig(nlvr2=True))
    given, second = inputs(), torch.arange(ROWS).roll(1)
    both = {name: torch.stack([given[name], given[name][second]], dim=1) for name in ("pixel_values", "pixel_mask")}
    one = the_pass("nlvr2", second_image=the_pass().image[second], second_image_size=SIZES[second])
    expected = other(input_ids=given["input_ids"], attention_mask=given["attention_mask"], **both).logits
    agree(model({"one": one})["one"]["nlvr2"], expected)


def test_gradients_equal_hugging_faces() -> None:
    other = theirs(ViltForImageAndTextRetrieval)
    model = ours(FORMATS["vilt-hf"].read(other.state_dict(), CONFIG), HeadConfig(ranking=True))
    weights = torch.linspace(-1, 1, ROWS)
    (model({"one": the_pass("ranking")})["one"]["ranking"] * weights).sum().backward()
    (other(**inputs()).logits[:, 0] * weights).sum().backward()
    theirs_by_ours = FORMATS["vilt-hf"].read(
        {n: p.grad for n, p in other.named_parameters() if p.grad is not None}, CONFIG
    )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs_by_ours[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (ViltModel, {}),
        (ViltForMaskedLM, {}),
        (ViltForImageAndTextRetrieval, {}),
        (ViltForQuestionAnswering, {"num_labels": 5}),
        (ViltForImagesAndTextClassification, {"num_images": 2, "num_labels": 2, "modality_type_vocab_size": 3}),
    ],
)
def test_hugging_face_weights_round_trip(kind: type, more: dict[str, int]) -> None:
    other = theirs(kind, **more)
    state = other.state_dict()
    back = FORMATS["vilt-hf"].write(FORMATS["vilt-hf"].read(state, CONFIG), CONFIG)
    if kind is ViltModel:
        back = {name.removeprefix("vilt."): tensor for name, tensor in back.items()}
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_published_names_and_shapes_are_those_of_the_release() -> None:
    published = FORMATS["vilt"].write(build_model(CONFIG, VOCABULARY, HeadConfig(nlvr2=True)).state_dict(), CONFIG)
    assert published["transformer.pos_embed"].shape == (1, 17, 24)
    assert published["transformer.cls_token"].shape == (1, 1, 24)
    assert published["transformer.patch_embed.proj.weight"].shape == (24, 3, 8, 8)
    assert published["transformer.blocks.2.attn.qkv.bias"].shape == (72,)
    assert published["token_type_embeddings.weight"].shape == (3, 24)
    assert {"mlm_score.bias", "itm_score.fc.weight", "pooler.dense.bias", "nlvr2_classifier.3.weight"} <= set(published)
    assert "mlm_score.decoder.bias" not in published


def test_query_key_and_value_biases_keep_their_order() -> None:
    state = build_model(CONFIG, VOCABULARY).state_dict()
    for number, name in enumerate(("query", "key", "value")):
        state[f"blocks.1.attention.{name}_bias"].fill_(number)
    assert (
        FORMATS["vilt"].write(state, CONFIG)["transformer.blocks.1.attn.qkv.bias"].tolist()
        == [0] * 24 + [1] * 24 + [2] * 24
    )


def test_checkpoint_of_one_task_lacks_only_other_heads() -> None:
    published = FORMATS["vilt"].write(build_model(CONFIG, VOCABULARY).state_dict(), CONFIG)
    published["text_embeddings.position_ids"] = torch.arange(10)[None]
    task = {name: tensor for name, tensor in published.items() if not name.startswith(("mlm", "itm"))}
    assert {name.split(".")[0] for name in FORMATS["vilt"].read(task, CONFIG)} == {
        *("text_embedding", "image_embedding", "blocks", "norm", "pooler")
    }


def test_tied_decoder_may_be_missing() -> None:
    state = theirs(ViltForMaskedLM).state_dict()
    del state["mlm_score.decoder.weight"]
    found = FORMATS["vilt-hf"].read(state, CONFIG)
    assert torch.equal(found["mlm_head.decode.weight"], found["text_embedding.word.weight"])


def test_two_heads_with_one_name_are_rejected() -> None:
    state = build_model(CONFIG, VOCABULARY, HeadConfig(answers=5, nlvr2=True)).state_dict()
    with pytest.raises(CheckpointError, match="one classifier"):
        FORMATS["vilt-hf"].write(state, CONFIG)
