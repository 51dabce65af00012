"""VLMo's weights are converted to the release's names and back exactly, and sizes are inferred from tensors."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models import build_model
from pipeline.models.checkpoints.vlmo import from_published, infer_section, to_published
from pipeline.models.model import HeadConfig

CONFIG = VLMoConfig(
    width=16,
    layers=3,
    heads=2,
    vision_language_layers=1,
    image_size=16,
    patch_size=8,
    max_text_length=6,
    layer_scale=0.1,
)
ABSOLUTE = CONFIG.model_copy(update={"positions": "absolute", "layer_scale": None})


@pytest.mark.parametrize("config", [CONFIG, ABSOLUTE])
def test_round_trip_is_exact(config: VLMoConfig) -> None:
    state = build_model(config, vocabulary=11).state_dict()
    back = from_published(to_published(state, config), config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_published_names_and_shapes_are_those_of_the_release() -> None:
    published = to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    assert published["relative_position_bias_table"].shape == (3**2 + 3 + 2 * 6 + 2, 2 * 3)
    assert published["transformer.patch_embed.proj.weight"].shape == (16, 3, 8, 8)
    assert published["token_type_embeddings.weight"].shape == (2, 16)
    assert {"transformer.blocks.2.norm2_vl.weight", "transformer.blocks.0.gamma_1", "mlm_score.bias"} <= set(published)
    assert "transformer.blocks.1.mlp_vl.fc1.weight" not in published


def test_masked_image_head_is_left_out() -> None:
    model = build_model(CONFIG, vocabulary=11, heads=HeadConfig("pixels"))
    assert set(to_published(model.state_dict(), CONFIG)) == set(
        to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    )


def test_language_stage_checkpoint_lacks_only_whole_modules() -> None:
    published = to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    stage = {n: t for n, t in published.items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    ours = from_published(stage, CONFIG)
    assert not any("vision_language" in name or "itc" in name for name in ours)


def test_every_fault_is_listed_by_name() -> None:
    published = to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    del published["transformer.norm.bias"]
    published["rank_output.weight"] = torch.zeros(3)
    published["transformer.blocks.0.attn.q_bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        from_published(published, CONFIG)
    message = str(error.value)
    assert "missing: transformer.norm.bias" in message
    assert "unexpected: rank_output.weight" in message
    assert "transformer.blocks.0.attn.q_bias (is (3,), must be (16,))" in message


def test_index_tensors_and_a_leading_module_are_ignored() -> None:
    state = build_model(CONFIG, vocabulary=11).state_dict()
    published = {f"module.{name}": tensor for name, tensor in to_published(state, CONFIG).items()}
    published["module.relative_position_index"] = torch.zeros(5, 5)
    published["module.text_embeddings.position_embeddings.weight"] = torch.zeros(40, 16)
    assert set(from_published(published, CONFIG)) == set(state)


@pytest.mark.parametrize("config", [CONFIG, ABSOLUTE])
def test_fine_tuned_heads_and_second_modality_round_trip(config: VLMoConfig) -> None:
    state = build_model(config, 11, HeadConfig(answers=7, nlvr2=True)).state_dict()
    published = to_published(state, config)
    assert published["token_type_embeddings.weight"].shape == (3, 16)
    assert torch.equal(published["token_type_embeddings.weight"][2], state["image_embedding.second"])
    assert published["vqa_classifier.0.weight"].shape == (32, 16)
    assert published["vqa_classifier.3.weight"].shape == (7, 32)
    assert published["nlvr2_classifier.0.weight"].shape == (32, 32)
    assert {f"nlvr2_classifier.{n}.bias" for n in (0, 1, 3)} <= set(published)
    back = from_published(published, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_third_modality_without_its_classifier_round_trips() -> None:
    published = to_published(build_model(CONFIG, 11, HeadConfig(nlvr2=True)).state_dict(), CONFIG)
    kept = {name: tensor for name, tensor in published.items() if "nlvr2" not in name}
    back = to_published(from_published(kept, CONFIG), CONFIG)
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], kept[name]) for name in kept)


def test_allowed_differences_are_skipped() -> None:
    state = build_model(CONFIG, 11).state_dict()
    published = to_published(state, CONFIG)
    del published["relative_position_bias_table"]
    published["rank_output.weight"] = torch.zeros(1, 16)
    back = from_published(published, CONFIG, ["relative_position_bias_table", "rank_output.*"])
    assert state.keys() - back.keys() == {"positions.image", "positions.cross", "positions.text"}


@pytest.mark.parametrize("indexed", [True, False], ids=["downloaded", "self_trained"])
@pytest.mark.parametrize("config", [CONFIG, ABSOLUTE], ids=["relative", "absolute"])
def test_sizes_are_inferred_from_the_tensors(config: VLMoConfig, indexed: bool) -> None:
    published = to_published(build_model(config, 11).state_dict(), config)
    if indexed and config.positions == "relative":
        published["text_relative_position_index"] = torch.zeros(6, 6)
    given = {"heads": 2} if config.positions == "absolute" else {} if indexed else {"max_text_length": 6}
    section = VLMoConfig(**infer_section(published, given))
    assert section.architecture() == config.architecture()


@pytest.mark.parametrize(("image_size", "rows"), [(224, 1126), (384, 2606), (480, 3878)])
def test_image_size_is_inferred_from_published_tables(image_size: int, rows: int) -> None:
    config = VLMoConfig(width=24, layers=2, heads=2, vision_language_layers=1, image_size=image_size)
    published = to_published(build_model(config, 11).state_dict(), config)
    assert len(published["relative_position_bias_table"]) == rows
    assert infer_section(published, {})["image_size"] == image_size


def test_sizes_that_cannot_be_inferred_are_required() -> None:
    published = to_published(build_model(CONFIG, 11).state_dict(), CONFIG)
    with pytest.raises(ConfigError, match="give image_size=… and max_text_length=…"):
        infer_section(published, {})
    with pytest.raises(ConfigError, match="no VLMo checkpoint"):
        infer_section({"conv1.weight": torch.zeros(1)}, {})
