"""The training step: losses per source, and merged forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.data.storage import Storage
from pipeline.models.forward import ForwardInput
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep, merge_forwards
from tests.support.gradients import PlainEngine
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("index", [2, 3])
def test_losses_by_source_add_up_to_the_loss(index: int, micro_batch_size: int | None) -> None:
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage = config.stages[index].model_copy(
        update={"start_from": "random", "sources": {"pairs": 0.5, "more_pairs": 0.5}}
    )
    config = config.model_copy(update={"stages": (*config.stages[:index], stage)})
    model = build_stage_model(Stage(config, index), Storage(), VOCABULARY)
    step = TrainingStep(PlainEngine(model, stage.optimizer), Stage(config, index), Collectives())
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


def test_forwards_over_the_same_examples_are_merged() -> None:
    batch = tiny_batch(tiny_config(), 3, 0, 1, 12)
    words = ForwardInput(heads=("mlm",), text=batch.text, mask_positions=batch.mask_positions)
    regions = ForwardInput(heads=("moc",), text=batch.text, region_positions=batch.mask_positions)
    merged = merge_forwards(words, regions)
    assert merged.heads == ("mlm", "moc")
    assert merged.mask_positions is batch.mask_positions
    assert merged.region_positions is batch.mask_positions
