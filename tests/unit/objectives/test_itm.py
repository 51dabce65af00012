"""ITM: hard and random negatives are drawn correctly on any number of ranks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.objectives import NegativePool, ObjectiveContext
from pipeline.objectives.itm import ITM, draw_negatives, matched_examples
from tests.support.tiny_model import tiny_batch, tiny_config

STAGE = tiny_config().stages[3]


def logits(rows: int, columns: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf"), float("-inf")])
def test_negatives_follow_the_softmax_over_other_images_if_it_is_finite(poison: float | None) -> None:
    image_id, draws = torch.tensor([0, 1, 2, 1, 4, 5]), 20_000
    similarity = logits(1, 6) if poison is None else torch.full((1, 6), poison)
    evenly, row_id = (torch.arange(draws) + 0.5) / draws, torch.ones(draws, dtype=torch.int64)
    drawn = draw_negatives(similarity.expand(draws, -1), row_id, image_id, evenly)
    scores = similarity[0] if poison is None else torch.zeros(6)
    expected = scores.masked_fill(image_id == 1, float("-inf")).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / draws, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 3.0, 1e30])
def test_trap_02_and_03_equal_image_is_never_drawn_and_confident_rows_still_draw(scale: float) -> None:
    image_id, row_id = torch.arange(50) // 3, torch.arange(40) // 3
    for uniform in (0.0, 0.3, 1 - 2**-24, 1 - 2**-53):
        drawn = draw_negatives(logits(40, 50, scale), row_id, image_id, torch.full((40,), uniform, dtype=torch.float64))
        assert (image_id[drawn] != row_id).all()
    similarity = torch.tensor([[-1e4, -1e4, 1e4, -1e4]])
    assert draw_negatives(similarity, torch.tensor([2]), torch.arange(4), torch.tensor([0.9])).item() == 3
    drawn = draw_negatives(logits(3, 3, scale), torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.5, 0.999]))
    assert ((drawn >= 0) & (drawn < 3)).all(), "a batch of one image draws among all"


def test_sharded_batch_draws_the_same_negatives() -> None:
    similarity, ids = logits(12, 12), torch.arange(12) // 2
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1))
    parts = zip(similarity.chunk(4), ids.chunk(4), uniform.chunk(4), strict=True)
    drawn = torch.cat([draw_negatives(rows, row_id, ids, numbers) for rows, row_id, numbers in parts])
    assert torch.equal(drawn, draw_negatives(similarity, ids, ids, uniform))


def test_random_negative_has_the_same_source_and_another_image_whatever_else_the_rank_reads() -> None:
    batch = tiny_batch(tiny_config(), 3, 0, 1, 12)

    def random_negatives(seed: int, examples: Batch, source: Tensor = batch.source) -> Tensor:
        """Return the examples whose image replaces each example's; -1 where a pair stays matched."""
        objective = ITM(ObjectiveContext(STAGE, "pairs", seed, 8, None, lambda *_: None))
        return objective.swaps(examples, NegativePool(batch.image_id, source))["pair"][0].places

    drawn = torch.stack([random_negatives(seed, batch) for seed in range(200)])
    is_matched = matched_examples(batch, STAGE)
    assert (drawn[:, is_matched] == -1).all()
    for row in torch.nonzero(~is_matched).flatten():
        allowed = (batch.source == batch.source[row]) & (batch.image_id != batch.image_id[row])
        assert set(drawn[:, row].tolist()) == set(torch.nonzero(allowed).flatten().tolist())
        alone = torch.ones(12, dtype=torch.int64).index_fill(0, row, 7)
        assert random_negatives(1, batch, alone)[row] not in (-1, row)
    assert torch.equal(random_negatives(1, batch)[5:9], random_negatives(1, batch.rows(slice(5, 9))))
    for step in range(6):
        indices = torch.nonzero((batch.place + step) % 2 == 0).flatten()
        examples = replace(batch.rows(indices), step=step)
        assert matched_examples(examples, STAGE).sum() == len(examples) / 2
