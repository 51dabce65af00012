"""Properties of the dual encoder alone, with towers of 4 and 2 layers. See also test_every_model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.models import build_model, skeleton
from pipeline.models.towers import DualEncoder
from pipeline.objectives import modules_for
from tests.support.forwards import LAYERS, MODELS, ROWS, VOCABULARY, forwards, gradients, lively_model, run

CONFIG = MODELS["dual_encoder"][0]


@pytest.fixture
def model() -> DualEncoder:
    return lively_model("dual_encoder")


def test_tower_gets_gradients_from_its_own_modality_only(model: DualEncoder) -> None:
    found = {name: gradients(model, model({name: one})) for name, one in forwards("dual_encoder").items()}
    for name in ("image", "text"):
        assert {model.part_of(n) for n in found[name]} == {f"{name}_embedding", f"{name}_tower", "itc_head"}
    assert modules_for(skeleton(CONFIG), "itc", "pairs") == frozenset(DualEncoder.PARTS)


def test_drop_path_rates_of_towers_are_aligned_at_the_end(model: DualEncoder) -> None:
    assert [block.drop_path for block in model.image_tower.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in model.text_tower.blocks] == pytest.approx([0.2, 0.3])
    one, keep = forwards("dual_encoder")["text"], torch.ones(ROWS, LAYERS, 2, dtype=torch.bool)

    def with_layers(*kept: bool) -> torch.Tensor:
        return run(model, replace(one, drop_path_mask=keep & torch.tensor(kept)[:, None]))["itc"]

    everything = with_layers(True, True, True, True)
    assert torch.equal(with_layers(False, False, True, True), everything)
    assert not torch.allclose(with_layers(True, True, True, False), everything)


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
