"""Parameter groups: each trained parameter is in one group, matrices decay, and heads have their own rate."""

from __future__ import annotations

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OptimizerConfig
from pipeline.models import build_model
from pipeline.models.model import HeadConfig, Model
from pipeline.training.optimizer import parameter_groups
from tests.support.tiny_model import tiny_config


@pytest.fixture
def model() -> Model:
    return build_model(tiny_config().model, 50, HeadConfig(answers=7, nlvr2=True))


def test_matrices_decay_and_each_parameter_is_in_one_group(model: Model) -> None:
    frozen = model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.05))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter is not frozen)
    for group in groups:
        assert {parameter.dim() >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.05}
        assert group["rate_factor"] == 1.0


def test_head_lr_multiplier_applies_to_heads_but_not_the_pooler(model: Model) -> None:
    groups = parameter_groups(model, OptimizerConfig(head_lr_multiplier=20.0))
    fast = {id(parameter) for group in groups if group["rate_factor"] == 20.0 for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in fast) == model.part_of(name).endswith("_head"), name


def test_stage_without_trained_parameters_is_rejected(model: Model) -> None:
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        parameter_groups(model.requires_grad_(False), OptimizerConfig())
