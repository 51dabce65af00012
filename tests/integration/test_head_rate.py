"""A head's own learning rate: its step is a multiple of what it would be, and nothing else moves differently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

FACTOR = 20.0


def _moved(zero_stage: int, factor: float) -> dict[str, Tensor]:
    """How far one step of the vision stage moves each trained parameter."""
    from pipeline.models import build_model
    from pipeline.models.model import HeadConfig
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.stages import trained_parts
    from pipeline.training.steps import TrainingStep

    config, collectives = tiny_config(zero_stage=zero_stage), Collectives()
    stage = config.stages[0]
    stage = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"head_lr_multiplier": factor})})
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    trained = trained_parts(model, config, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = DeepSpeedEngine(model, config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    step(tiny_batch(config, 0, collectives.rank, collectives.world_size, stage.global_batch_size))
    engine.step(1e-3)
    after = engine.weights() or {}
    return {name: after[name] - before[name] for name in names & after.keys()}


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_heads_move_by_the_factor_and_the_rest_as_ever(world_size: int, zero_stage: int) -> None:
    plain = run_ranks(_moved, world_size, zero_stage, 1.0)[0]
    found = run_ranks(_moved, world_size, zero_stage, FACTOR)[0]
    heads = {name for name in plain if name.startswith("mim_head") or name == "image_embedding.mask"}
    assert len(heads) >= 2
    for name, moved in plain.items():
        expected = moved * (FACTOR if name in heads else 1.0)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6, msg=name)
