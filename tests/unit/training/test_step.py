"""The training step: losses per source, diagnostics, and merged forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.models.forward import ForwardInput
from pipeline.training.metrics import StepMetrics
from pipeline.training.step import merge_forwards
from tests.support.engines import build_engine, tiny_model
from tests.support.tiny_model import tiny_batch, tiny_config

WAYS = pytest.mark.parametrize(("index", "micro_batch_size"), [(2, None), (2, 5), (3, None), (3, 5)])


@WAYS
def test_losses_by_source_add_up_to_the_loss(index: int, micro_batch_size: int | None) -> None:
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage = config.stages[index].model_copy(update={"sources": {"pairs": 0.5, "more_pairs": 0.5}})
    config = config.model_copy(update={"stages": (*config.stages[:index], stage)})
    step = build_engine(config, index, plain=True).step
    batch = tiny_batch(config, 4, 0, 1, 12)
    batch = replace(batch, source=batch.place // 3 % 2)

    alone = step(batch)
    assert step.by_source == {}
    losses = step(batch, with_metrics=True)

    assert step.by_source.keys() == stage.objectives.keys()
    for objective, shares in step.by_source.items():
        total, count = shares.sum(dim=0)
        torch.testing.assert_close(total / count, losses[objective])
        assert (shares[:, 1] > 0).all()
        assert losses[objective] == alone[objective]


@WAYS
def test_diagnostics_count_every_pair(index: int, micro_batch_size: int | None) -> None:
    """The head classifies every pair as matched."""
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage, model = config.stages[index], tiny_model(config, index)
    with torch.no_grad():
        model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))
    step = build_engine(config, index, model=model, plain=True).step
    step(tiny_batch(config, 0, 0, 1, stage.global_batch_size), with_metrics=True)
    read = stage.global_batch_size // stage.objectives["itm"].every
    matched, mismatched = (read, 2 * read) if stage.negatives == "hard" else (read // 2, read - read // 2)
    diagnostics = {name: float(value) for name, value in step.diagnostics.items()}
    assert diagnostics["itm_matched"] == diagnostics["itm_matched_correct"] == matched
    assert (diagnostics["itm_mismatched"], diagnostics["itm_mismatched_correct"]) == (mismatched, 0)
    if "itc" in stage.objectives:
        metrics = StepMetrics(0, True, diagnostics, [0.0], [0.0]).metrics()
        assert metrics["train/itc_temperature"] == pytest.approx(0.07, rel=1e-6)


def test_forwards_over_the_same_examples_are_merged() -> None:
    batch = tiny_batch(tiny_config(), 3, 0, 1, 12)
    words = ForwardInput(heads=("mlm",), text=batch.text, mask_positions=batch.mask_positions)
    regions = ForwardInput(heads=("moc",), text=batch.text, region_positions=batch.mask_positions)
    merged = merge_forwards(words, regions)
    assert merged.heads == ("mlm", "moc")
    assert merged.mask_positions is merged.region_positions is batch.mask_positions
