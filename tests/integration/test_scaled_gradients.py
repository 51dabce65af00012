"""Gradients and updates that a key of the config scales: the heads' learning rate, and VLMo's released gathers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_model import tiny_config

FACTOR = 20.0


def _updates(zero_stage: int, factor: float) -> dict[str, Tensor]:
    """Return the change of each trained parameter in one step of the vision stage."""
    from tests.support.engines import build_engine, tiny_model

    config = tiny_config(zero_stage=zero_stage)
    optimizer = config.stages[0].optimizer.model_copy(update={"head_lr_multiplier": factor})
    stage = config.stages[0].model_copy(update={"optimizer": optimizer})
    config = config.model_copy(update={"stages": (stage, *config.stages[1:])})
    model = tiny_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    built = build_engine(config, model=model)
    built.train([0])
    after = built.engine.weights() or {}
    return {name: after[name] - before[name] for name in before.keys() & after.keys()}


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_head_lr_multiplier_scales_the_heads_alone(world_size: int, zero_stage: int) -> None:
    plain = run_ranks(_updates, world_size, zero_stage, 1.0)[0]
    scaled = run_ranks(_updates, world_size, zero_stage, FACTOR)[0]
    heads = {name for name in plain if name.startswith("mim_head") or name == "image_embedding.mask"}
    assert len(heads) >= 2
    for name, update in plain.items():
        expected = update * (FACTOR if name in heads else 1.0)
        torch.testing.assert_close(scaled[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def _itc_gradients() -> list[dict[str, Tensor]]:
    """Return the gradients of ITC with this project's gathers and with those of VLMo's release."""
    from pipeline.config.load import validate
    from tests.support.engines import gradients_and_losses

    values = tiny_config().model_dump(mode="json")
    values["stages"] = [values["stages"][2] | {"objectives": {"itc": {}}}]
    configs = [validate(values | {"reproduce_vlmo_release": released}, "tiny") for released in (False, True)]
    return [gradients_and_losses(config)[0] for config in configs]


def test_trap_01_released_itc_gradient_is_half_on_two_ranks() -> None:
    """The release does not differentiate gathered features: on W ranks they get 1 / W of the gradient."""
    ours, released = run_ranks(_itc_gradients, 2)[0]
    assert ours.keys() == released.keys()
    for name, gradient in ours.items():
        ranks = 1 if "log_scale" in name else 2
        torch.testing.assert_close(ranks * released[name], gradient, rtol=1e-4, atol=1e-7)
