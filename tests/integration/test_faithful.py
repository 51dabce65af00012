"""Trap 1 through the engine: with `reproduce_vlmo_release`, W ranks give features 1 / W of the contrastive gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

RANKS = 2


def _gradients() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return _gradients_of(False), _gradients_of(True)


def _gradients_of(reproduce_vlmo_release: bool) -> dict[str, Tensor]:
    from pipeline.config.load import validate
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.steps import TrainingStep

    values = tiny_config().model_dump(mode="json") | {"reproduce_vlmo_release": reproduce_vlmo_release}
    values["stages"] = [values["stages"][2] | {"objectives": {"itc": {}}}]
    config = validate(values, "tiny")
    stage, collectives = config.stages[0], Collectives()
    engine = DeepSpeedEngine(_model(config), config, stage, collectives)
    batch = tiny_batch(config, 1, collectives.rank, collectives.world_size, stage.global_batch_size)
    TrainingStep(engine, config, stage, collectives)(batch)
    gradients = engine.gradients()
    engine.close()
    return gradients


def _model(config):
    from pipeline.models import build_model
    from pipeline.training.stages import heads, trained_parts

    model = build_model(config.model, VOCABULARY, heads(config, 0), seed=5)
    trained = trained_parts(model, config, config.stages[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    return model


def test_trap_01_on_two_ranks_the_faithful_gradient_is_half_except_of_the_scales() -> None:
    ours, theirs = run_ranks(_gradients, RANKS)[0]
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        share = 1 if "log_scale" in name else RANKS
        torch.testing.assert_close(share * theirs[name], gradient, rtol=1e-4, atol=1e-7)
