"""Contract C3: ranks that run different modules in one step are stopped before the update, and told apart."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config


def _guarded_step(diverging: bool) -> str:
    """One guarded step on this rank; with `diverging`, rank 1 reads texts where rank 0 reads images."""
    from pipeline.config.errors import RunFailed
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.models.model import HeadConfig
    from pipeline.training.collectives import Collectives
    from pipeline.training.guards import GraphGuard

    collectives = Collectives()
    config = tiny_config()
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    guard = GraphGuard(model, collectives, every=10)
    batch = tiny_batch(config, 0, collectives.rank, 2, 12)
    image = ForwardInput(heads=("itc",), image=batch.image)
    text = ForwardInput(heads=("itc",), text=batch.text, text_keep=batch.text_keep)
    guard.begin(0)
    try:
        model({"tower": text if diverging and collectives.rank == 1 else image})
        guard.check(0)
    except RunFailed as error:
        return str(error)
    return ""


def test_ranks_that_run_one_graph_pass_the_guard() -> None:
    assert run_ranks(_guarded_step, 2, False) == ["", ""]


def test_ranks_that_run_different_experts_are_stopped_with_the_names_of_the_modules() -> None:
    for told in run_ranks(_guarded_step, 2, True):
        assert "ranks ran different modules" in told
        assert "rank 0 ran 'image_embedding" in told
        assert "rank 1 ran 'text_embedding" in told


@pytest.mark.parametrize("step", [3, 9, 11])
def test_between_two_checks_nothing_is_compared(step: int) -> None:
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.models.model import HeadConfig
    from pipeline.training.guards import GraphGuard

    model = build_model(tiny_config().model, VOCABULARY, HeadConfig("pixels"), seed=5)
    guard = GraphGuard(model, None, every=10)  # type: ignore[arg-type] - a comparison would need collectives
    guard.begin(step)
    model({"tower": ForwardInput(heads=("itc",), image=torch.zeros(1, 16, 16, 3, dtype=torch.uint8))})
    guard.check(step)
