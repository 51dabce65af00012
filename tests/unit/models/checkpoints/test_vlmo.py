"""VLMo's weights are converted to the release's names and back exactly, and sizes are inferred from tensors."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import VLMoConfig
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
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


def test_published_names_and_shapes_are_those_of_the_release() -> None:
    published = FORMATS["vlmo"].write(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    assert published["relative_position_bias_table"].shape == (3**2 + 3 + 2 * 6 + 2, 2 * 3)
    assert published["transformer.patch_embed.proj.weight"].shape == (16, 3, 8, 8)
    assert published["token_type_embeddings.weight"].shape == (2, 16)
    assert {"transformer.blocks.2.norm2_vl.weight", "transformer.blocks.0.gamma_1", "mlm_score.bias"} <= set(published)
    assert "transformer.blocks.1.mlp_vl.fc1.weight" not in published


def test_language_stage_checkpoint_lacks_only_whole_modules() -> None:
    published = FORMATS["vlmo"].write(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    stage = {n: t for n, t in published.items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    ours = FORMATS["vlmo"].read(stage, CONFIG)
    assert not any("vision_language" in name or "itc" in name for name in ours)


def test_index_tensors_and_a_leading_module_are_ignored() -> None:
    state = build_model(CONFIG, vocabulary=11).state_dict()
    published = {f"module.{name}": tensor for name, tensor in FORMATS["vlmo"].write(state, CONFIG).items()}
    published["module.relative_position_index"] = torch.zeros(5, 5)
    published["module.text_embeddings.position_embeddings.weight"] = torch.zeros(40, 16)
    assert set(FORMATS["vlmo"].read(published, CONFIG)) == set(state)


def test_fine_tuned_heads_have_the_names_of_the_release() -> None:
    state = build_model(CONFIG, 11, HeadConfig(answers=7, nlvr2=True)).state_dict()
    published = FORMATS["vlmo"].write(state, CONFIG)
    assert published["token_type_embeddings.weight"].shape == (3, 16)
    assert torch.equal(published["token_type_embeddings.weight"][2], state["image_embedding.second"])
    assert published["vqa_classifier.3.weight"].shape == (7, 32)
    assert published["nlvr2_classifier.0.weight"].shape == (32, 32)
    assert {f"nlvr2_classifier.{n}.bias" for n in (0, 1, 3)} <= set(published)


def test_joined_table_may_differ_as_a_whole() -> None:
    state = build_model(CONFIG, 11).state_dict()
    published = FORMATS["vlmo"].write(state, CONFIG)
    del published["relative_position_bias_table"]
    back = FORMATS["vlmo"].read(published, CONFIG, ["relative_position_bias_table"])
    assert state.keys() - back.keys() == {"positions.image", "positions.cross", "positions.text"}


def test_third_modality_without_its_classifier_round_trips() -> None:
    published = FORMATS["vlmo"].write(build_model(CONFIG, 11, HeadConfig(nlvr2=True)).state_dict(), CONFIG)
    kept = {name: tensor for name, tensor in published.items() if "nlvr2" not in name}
    back = FORMATS["vlmo"].write(FORMATS["vlmo"].read(kept, CONFIG), CONFIG)
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], kept[name]) for name in kept)


def test_text_length_is_inferred_from_the_index_of_downloaded_checkpoints() -> None:
    published = FORMATS["vlmo"].write(build_model(CONFIG, 11).state_dict(), CONFIG)
    published["text_relative_position_index"] = torch.zeros(6, 6)
    assert VLMoConfig(**FORMATS["vlmo"].infer(published, {})).architecture() == CONFIG.architecture()


@pytest.mark.parametrize(("image_size", "rows"), [(224, 1126), (384, 2606), (480, 3878)])
def test_image_size_is_inferred_from_published_tables(image_size: int, rows: int) -> None:
    config = VLMoConfig(width=24, layers=2, heads=2, vision_language_layers=1, image_size=image_size)
    published = FORMATS["vlmo"].write(build_model(config, 11).state_dict(), config)
    assert len(published["relative_position_bias_table"]) == rows
    assert FORMATS["vlmo"].infer(published, {})["image_size"] == image_size


def test_sizes_that_cannot_be_inferred_are_required() -> None:
    published = FORMATS["vlmo"].write(build_model(CONFIG, 11).state_dict(), CONFIG)
    with pytest.raises(ConfigError, match="give image_size=… and max_text_length=…"):
        FORMATS["vlmo"].infer(published, {})
