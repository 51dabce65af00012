from __future__ import annotations

import pytest
import torch

from pipeline.config.errors import CheckpointError
from pipeline.config.model import VLMoConfig
from pipeline.models import build_model
from pipeline.models.checkpoints.vlmo import from_published, to_published
from pipeline.models.model import Heads

CONFIG = VLMoConfig(
    width=16, layers=3, heads=2, vision_language_layers=1, image_size=16, patch_size=8, max_text=6, layer_scale=0.1
)
ABSOLUTE = CONFIG.model_copy(update={"positions": "absolute", "layer_scale": None})


@pytest.mark.parametrize("config", [CONFIG, ABSOLUTE])
def test_there_and_back_is_exact(config: VLMoConfig) -> None:
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
    model = build_model(CONFIG, vocabulary=11, heads=Heads("pixels"))
    assert set(to_published(model.state_dict(), CONFIG)) == set(
        to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    )


def test_a_language_stage_checkpoint_lacks_whole_parts_only() -> None:
    published = to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    stage = {n: t for n, t in published.items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    ours = from_published(stage, CONFIG)
    assert not any("vision_language" in name or "contrastive" in name for name in ours)


def test_every_fault_is_listed_by_name() -> None:
    published = to_published(build_model(CONFIG, vocabulary=11).state_dict(), CONFIG)
    del published["transformer.norm.bias"]
    published["vqa_classifier.0.weight"] = torch.zeros(3)
    published["transformer.blocks.0.attn.q_bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        from_published(published, CONFIG)
    message = str(error.value)
    assert "missing: transformer.norm.bias" in message
    assert "unexpected: vqa_classifier.0.weight" in message
    assert "transformer.blocks.0.attn.q_bias (is (3,), must be (16,))" in message


def test_index_tensors_and_a_leading_module_are_ignored() -> None:
    state = build_model(CONFIG, vocabulary=11).state_dict()
    published = {f"module.{name}": tensor for name, tensor in to_published(state, CONFIG).items()}
    published["module.relative_position_index"] = torch.zeros(5, 5)
    published["module.text_embeddings.position_embeddings.weight"] = torch.zeros(40, 16)
    assert set(from_published(published, CONFIG)) == set(state)
