"""Ranking: negative texts are distinct and drawn per example, and the loss is the first text's cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pipeline.data.batch import Batch
from pipeline.objectives import NegativePool
from pipeline.objectives.ranking import draw_distinct_negatives
from pipeline.training.collectives import Collectives
from pipeline.training.step import TrainingStep
from tests.support.trial import ROWS, Cell, begin, invented_batch, trial_config


def keys(rows: int, candidates: int) -> torch.Tensor:
    return torch.rand(rows, candidates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_negative_texts_are_distinct_and_of_other_images() -> None:
    image_id = torch.tensor([3, 3, 5, 6, 7, 8, 9, 9])
    drawn = draw_distinct_negatives(keys(8, 8), image_id, image_id, 4)
    assert (image_id[drawn] != image_id[:, None]).all()
    assert all(len(row.unique()) == 4 for row in drawn)


def test_negatives_do_not_depend_on_other_rows() -> None:
    image_id, drawn_by = torch.arange(8), keys(8, 8)
    whole = draw_distinct_negatives(drawn_by, image_id, image_id, 3)
    assert torch.equal(draw_distinct_negatives(drawn_by[2:5], image_id[2:5], image_id, 3), whole[2:5])


def test_negatives_repeat_if_there_are_too_few() -> None:
    drawn = draw_distinct_negatives(keys(3, 3), torch.arange(3), torch.arange(3), 5)
    for row, others in enumerate(drawn.tolist()):
        assert set(others) == {0, 1, 2} - {row}
        assert others[:2] == others[2:4]
    equal = torch.zeros(3, dtype=torch.int64)
    assert draw_distinct_negatives(keys(3, 3), equal, equal, 2).shape == (3, 2)


def test_negatives_are_drawn_uniformly() -> None:
    image_id = torch.arange(6)
    counts = torch.zeros(6)
    for seed in range(600):
        uniform = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed))
        counts[draw_distinct_negatives(uniform, image_id[:1], image_id, 2)[0]] += 1
    assert counts[0] == 0
    assert ((counts[1:] - 240).abs() < 60).all()


def training_step() -> tuple[TrainingStep, Batch]:
    config = trial_config(Cell("ranking", "vilt", "pairs"))
    return begin(config, Collectives()).step, invented_batch(config.model, "pairs", 1, ROWS)


def test_each_image_is_read_with_its_own_and_negative_texts() -> None:
    step, batch = training_step()
    calls: list[dict[str, Any]] = []
    step.engine.model.register_forward_hook(
        lambda module, given, outputs: calls.append({"passes": given[0], "outputs": outputs})
    )
    losses = step(batch)
    passes, outputs = calls[0]["passes"], calls[0]["outputs"]
    assert set(passes) == {"ranked", "wrong_text_0", "wrong_text_1", "wrong_text_2"}
    for name, one in passes.items():
        assert torch.equal(one.image, batch.image)
        assert torch.equal(one.visible_patches, batch.visible_patches)
        differs = (one.text != batch.text).any(dim=1)
        assert differs.all() if name != "ranked" else not differs.any()
    scores = torch.stack([outputs[name]["ranking"] for name in passes], dim=1)
    torch.testing.assert_close(losses["ranking"], -scores.log_softmax(dim=1)[:, 0].mean().detach())


def test_negative_texts_do_not_depend_on_the_other_examples() -> None:
    step, batch = training_step()
    ranking = step.objectives["ranking"]
    pool = NegativePool(batch.image_id, batch.source)
    whole, part = (ranking.swaps(rows, pool) for rows in (batch, batch.rows(slice(3, 6))))
    for name, swaps in whole.items():
        assert torch.equal(swaps[0].places[3:6], part[name][0].places)
    later = ranking.swaps(replace(batch, step=2), pool)
    assert any(not torch.equal(later[name][0].places, whole[name][0].places) for name in whole)
