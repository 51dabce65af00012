"""Contract C3: ranks that run different modules in one step are stopped before the update and named."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config


def _checked_step(diverging: bool) -> str:
    """Run one checked step; with `diverging`, rank 1 reads texts and rank 0 images. Return the error message."""
    from pipeline.config.errors import RunFailed
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.models.model import HeadConfig
    from pipeline.training.collectives import Collectives
    from pipeline.training.health import ExecutionOrderCheck

    collectives = Collectives()
    config = tiny_config()
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    check = ExecutionOrderCheck(collectives, every=10)
    check.on_model_built(model)
    batch = tiny_batch(config, 0, collectives.rank, 2, 12)
    image = ForwardInput(heads=("itc",), image=batch.image)
    text = ForwardInput(heads=("itc",), text=batch.text, text_keep=batch.text_keep)
    check.before_step(0)
    try:
        model({"tower": text if diverging and collectives.rank == 1 else image})
        check.after_backward(0)
    except RunFailed as error:
        return str(error)
    return ""


def test_ranks_running_the_same_modules_pass() -> None:
    assert run_ranks(_checked_step, 2, False) == ["", ""]


def test_ranks_running_different_experts_are_stopped_by_name() -> None:
    for message in run_ranks(_checked_step, 2, True):
        assert "ranks ran different modules" in message
        assert "rank 0 ran 'image_embedding" in message
        assert "rank 1 ran 'text_embedding" in message


@pytest.mark.parametrize("step", [3, 9, 11])
def test_steps_between_checks_compare_nothing(step: int) -> None:
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.models.model import HeadConfig
    from pipeline.training.health import ExecutionOrderCheck

    model = build_model(tiny_config().model, VOCABULARY, HeadConfig("pixels"), seed=5)
    check = ExecutionOrderCheck(None, every=10)  # type: ignore[arg-type] - a comparison would need collectives
    check.on_model_built(model)
    check.before_step(step)
    model({"tower": ForwardInput(heads=("itc",), image=torch.zeros(1, 16, 16, 3, dtype=torch.uint8))})
    check.after_backward(step)
