"""A VLMo whose vision stage starts from BEiT equals Hugging Face's BEiT (C8), and exports its weights back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, BeitModel, PreTrainedModel

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import VLMoConfig
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints import FORMATS
from pipeline.models.checkpoints.beit import (
    LAYER_TABLE,
    NORMS,
    SHARED_TABLE,
)
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig, Model
from pipeline.objectives import modules_for
from pipeline.training.stages import load_matching
from tests.support.hugging_face import randomised, saved

CONFIG = VLMoConfig(
    width=24, layers=3, heads=2, vision_language_layers=1, image_size=24, patch_size=8, max_text_length=8
)
TOKENS, VOCABULARY = 20, 11
THEIRS = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 24,
    "patch_size": 8,
    "vocab_size": TOKENS,
    "drop_path_rate": 0.0,
    "layer_norm_eps": 1e-6,  # value of BEiT's release; Hugging Face's 1e-12 differs only for vectors near zero
}
SHARED, EACH = {"use_shared_relative_position_bias": True}, {"use_relative_position_bias": True}


def started(state: dict[str, Tensor], heads: HeadConfig = HeadConfig()) -> Model:
    """Build a VLMo that starts from these weights, which may lack only modules that BEiT does not have."""
    model = build_model(CONFIG, VOCABULARY, heads)
    absent = {"text_embedding", "positions.text", "positions.cross", "vision_language_expert"}
    load_matching(model, state, "vision", frozenset({*absent, "language_expert.lower", "language_expert.upper"}))
    return model


def pictures() -> Tensor:
    return torch.rand(3, 24, 24, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("table", [SHARED, EACH], ids=["one table", "a table for each layer"])
def test_image_forward_equals_hugging_face(tmp_path: Path, table: dict[str, bool]) -> None:
    theirs = randomised(BeitModel(BeitConfig(**THEIRS, **table, use_mean_pooling=False), add_pooling_layer=False))
    model = started(FORMATS["beit"].read(saved(theirs, tmp_path), CONFIG))
    image = pictures()
    tokens = model({"one": ForwardInput(heads=("tokens",), image=image)})["one"]["tokens"]
    torch.testing.assert_close(tokens, theirs(image.permute(0, 3, 1, 2)).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_trap_section_3_shared_table_gives_equal_logits(
    tmp_path: Path,
) -> None:
    """VLMo's release fails at `int("relative_position_bias_table")` here."""
    theirs = randomised(BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)))
    model = started(
        FORMATS["beit"].read(saved(theirs, tmp_path), CONFIG),
        HeadConfig(image_target="visual_tokens", visual_tokens=TOKENS),
    )
    image, masked = pictures(), torch.tensor([[0, 3, 4, 8], [1, 2, 5, 6], [0, 1, 7, 8]])
    covered = torch.zeros(3, 9, dtype=torch.bool).scatter(1, masked, True)
    expected = theirs(image.permute(0, 3, 1, 2), bool_masked_pos=covered).logits
    found = model({"one": ForwardInput(heads=("mim",), image=image, patch_positions=masked)})["one"]["mim"]
    wanted = expected.gather(1, masked[..., None].expand(-1, -1, TOKENS))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_encoder_of_a_classifier_checkpoint_is_read(tmp_path: Path) -> None:
    theirs = randomised(BeitForImageClassification(BeitConfig(**THEIRS, **EACH, num_labels=4)))
    model = started(FORMATS["beit"].read(saved(theirs, tmp_path), CONFIG))
    image = pictures()
    tokens = model({"one": ForwardInput(heads=("tokens",), image=image)})["one"]["tokens"]
    hidden = theirs.beit(image.permute(0, 3, 1, 2)).last_hidden_state
    torch.testing.assert_close(tokens, theirs.beit.pooler.layernorm(hidden), rtol=1e-5, atol=1e-5)


def test_trap_section_3_layer_scale_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    """BEiT-large was trained from 1e-5; the 0.1 in VLMo-large's section is only for random initialisation."""
    theirs = BeitModel(BeitConfig(**THEIRS, **EACH, layer_scale_init_value=1e-5))
    assert CONFIG.layer_scale == 0.1
    model = started(FORMATS["beit"].read(saved(theirs, tmp_path), CONFIG))
    gammas = [tensor for name, tensor in model.state_dict().items() if name.endswith("gamma")]
    assert len(gammas) == 6
    assert all((gamma == 1e-5).all() for gamma in gammas)


@pytest.mark.parametrize(
    ("theirs", "norm", "shared"),
    [
        (BeitModel(BeitConfig(**THEIRS, **EACH, use_mean_pooling=False), add_pooling_layer=False), NORMS[1], False),
        (BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)), NORMS[0], True),
        (BeitForImageClassification(BeitConfig(**THEIRS, **EACH)), NORMS[2], False),
    ],
    ids=["BeitModel", "BeitForMaskedImageModeling", "BeitForImageClassification"],
)
def test_round_trips_are_exact(tmp_path: Path, theirs: PreTrainedModel, norm: str, shared: bool) -> None:
    published = saved(randomised(theirs), tmp_path)
    written = to_hugging_face(FORMATS["beit"].read(published, CONFIG), CONFIG, norm, shared)
    if isinstance(theirs, BeitModel):
        published = {f"beit.{name}": tensor for name, tensor in published.items()}
    assert written.keys() == {name for name in published if not name.startswith("classifier.")}
    assert all(torch.equal(published[name], tensor) for name, tensor in written.items())


def test_hugging_face_loads_our_export_with_equal_outputs(tmp_path: Path) -> None:
    heads = HeadConfig(image_target="visual_tokens", visual_tokens=TOKENS)
    model = build_model(CONFIG, VOCABULARY, heads, seed=3)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():  # in particular the modality vector, which BEiT does not have
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    BeitConfig(**THEIRS, **EACH, use_mask_token=True).save_pretrained(tmp_path)
    save_file(FORMATS["beit"].write(model.state_dict(), CONFIG), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, told = BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    image, masked = pictures(), torch.tensor([[0, 3], [1, 2], [7, 8]])
    covered = torch.zeros(3, 9, dtype=torch.bool).scatter(1, masked, True)
    expected = theirs.eval()(image.permute(0, 3, 1, 2), bool_masked_pos=covered).logits
    found = model({"one": ForwardInput(heads=("mim",), image=image, patch_positions=masked)})["one"]["mim"]
    wanted = expected.gather(1, masked[..., None].expand(-1, -1, TOKENS))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_shared_table_round_trips_through_hugging_face(tmp_path: Path) -> None:
    config = BeitConfig(**THEIRS, **SHARED, use_mask_token=True)
    theirs = randomised(BeitForMaskedImageModeling(config))
    written = FORMATS["beit"].write(FORMATS["beit"].read(saved(theirs, tmp_path / "before"), CONFIG), CONFIG)
    config.save_pretrained(tmp_path)
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    again, told = BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_different_tables_are_not_exported_as_one() -> None:
    state = dict(build_model(CONFIG, VOCABULARY).state_dict())
    assert SHARED_TABLE in to_hugging_face(state, CONFIG, shared=True)
    state["positions.image"] = torch.rand_like(state["positions.image"])
    with pytest.raises(CheckpointError, match="tables differ"):
        to_hugging_face(state, CONFIG, shared=True)
    assert LAYER_TABLE.format(2) in to_hugging_face(state, CONFIG)


def as_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face's tensors to BEiT's own release, by a table written independently."""
    outside = {
        "beit.embeddings.cls_token": "cls_token",
        "beit.embeddings.mask_token": "mask_token",
        "beit.encoder.relative_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
        "beit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "beit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
        "beit.pooler.layernorm.weight": "fc_norm.weight",
        "beit.pooler.layernorm.bias": "fc_norm.bias",
        "classifier.weight": "head.weight",
        "classifier.bias": "head.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    }
    inside = {
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
        "attention.attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "gamma_1",
        "lambda_2": "gamma_2",
    }
    released = {"blocks.0.attn.relative_position_index": torch.zeros(10, 10)}
    for name, tensor in state.items():
        layer = re.match(r"beit\.encoder\.layer\.(\d+)\.(.*)", name)
        if layer is None:
            released[outside[name]] = tensor
        elif ".query.weight" in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            released[f"blocks.{layer[1]}.attn.qkv.weight"] = torch.cat(parts)
        elif ".key.weight" not in name and ".value.weight" not in name:
            module, _, last = layer[2].rpartition(".")
            own = inside[layer[2]] if layer[2] in inside else f"{inside[module]}.{last}"
            released[f"blocks.{layer[1]}.{own}"] = tensor
    return released


@pytest.mark.parametrize(
    "theirs",
    [
        BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)),
        BeitForImageClassification(BeitConfig(**THEIRS, **EACH)),
    ],
    ids=["pretrained", "fine-tuned"],
)
def test_names_of_the_release_give_equal_weights(tmp_path: Path, theirs: PreTrainedModel) -> None:
    published = saved(randomised(theirs), tmp_path)
    expected, found = FORMATS["beit"].read(published, CONFIG), FORMATS["beit"].read(as_released(published), CONFIG)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_section_is_inferred_from_the_shapes(tmp_path: Path) -> None:
    published = saved(BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)), tmp_path)
    section = FORMATS["beit"].infer(published, {"max_text_length": 8, "vision_language_layers": 1})
    assert VLMoConfig.model_validate(section) == CONFIG


def test_only_modules_of_the_image_forward_are_imported(tmp_path: Path) -> None:
    published = saved(BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)), tmp_path)
    model = skeleton(CONFIG, VOCABULARY, HeadConfig(image_target="visual_tokens", visual_tokens=TOKENS))
    brought = {model.part_of(name) for name in FORMATS["beit"].read(published, CONFIG)}
    assert brought == modules_for(model, "mim", "images")


def test_table_of_another_size_is_rejected(tmp_path: Path) -> None:
    published = saved(BeitForMaskedImageModeling(BeitConfig(**THEIRS, **SHARED, use_mask_token=True)), tmp_path)
    published[SHARED_TABLE] = torch.zeros(5, 2)
    with pytest.raises(CheckpointError, match=r"\(is \(5, 2\), must be \(28, 2\)\)"):
        FORMATS["beit"].read(published, CONFIG)
