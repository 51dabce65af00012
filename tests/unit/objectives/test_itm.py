"""ITM: hard and random negatives are drawn correctly on any number of ranks, and the loss equals its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.objectives import NegativePool, ObjectiveContext
from pipeline.objectives.itm import ITM, draw_negatives, itm_loss, matched_examples
from tests.support.tiny_model import tiny_batch, tiny_config


def logits(rows: int, columns: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_negatives_follow_the_softmax_over_other_images() -> None:
    draws, columns = 20_000, 6
    ids = torch.tensor([0, 1, 2, 1, 4, 5])
    similarity = logits(1, columns)
    evenly = (torch.arange(draws) + 0.5) / draws
    drawn = draw_negatives(similarity.expand(draws, -1), torch.ones(draws, dtype=torch.int64), ids, evenly)
    share = torch.bincount(drawn, minlength=columns) / draws
    expected = similarity[0].masked_fill(ids == 1, float("-inf")).softmax(0)
    torch.testing.assert_close(share, expected, rtol=0, atol=2 / draws)


@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4, 1e30])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24, 1 - 2**-53])
def test_trap_03_equal_image_is_never_drawn(scale: float, uniform: float) -> None:
    rows, columns = 40, 50
    ids = torch.arange(columns) // 3
    row_id = torch.arange(rows) // 3
    numbers = torch.full((rows,), uniform, dtype=torch.float64)
    drawn = draw_negatives(logits(rows, columns, scale), row_id, ids, numbers)
    assert (ids[drawn] != row_id).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_draw_uniformly_among_other_images(poison: float) -> None:
    draws, ids = 4000, torch.tensor([0, 1, 1, 2, 3])
    evenly = (torch.arange(draws) + 0.5) / draws
    similarity = torch.full((draws, 5), poison)
    drawn = draw_negatives(similarity, torch.ones(draws, dtype=torch.int64), ids, evenly)
    share = torch.bincount(drawn, minlength=5) / draws
    torch.testing.assert_close(share, torch.tensor([1, 0, 0, 1, 1]) / 3, rtol=0, atol=1e-3)


def test_trap_02_confident_row_still_draws_a_negative() -> None:
    similarity = torch.full((1, 4), -1e4)
    similarity[0, 2] = 1e4
    drawn = draw_negatives(similarity, torch.tensor([2]), torch.arange(4), torch.tensor([0.9]))
    assert drawn.item() == 3


def test_batch_of_equal_images_still_draws() -> None:
    drawn = draw_negatives(logits(3, 3), torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.5, 0.999]))
    assert drawn.shape == (3,)
    assert ((drawn >= 0) & (drawn < 3)).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharded_batch_draws_the_same_negatives(ranks: int) -> None:
    similarity, ids = logits(12, 12), torch.arange(12) // 2
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1))
    parts = zip(similarity.chunk(ranks), ids.chunk(ranks), uniform.chunk(ranks), strict=True)
    drawn = torch.cat([draw_negatives(rows, row_id, ids, numbers) for rows, row_id, numbers in parts])
    assert torch.equal(drawn, draw_negatives(similarity, ids, ids, uniform))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharded_batch_has_the_same_sum(ranks: int) -> None:
    scores, matched = logits(12, 2), torch.arange(12) % 3 == 0
    parts = zip(scores.chunk(ranks), matched.chunk(ranks), strict=True)
    total = sum(itm_loss(rows, labels) for rows, labels in parts)
    torch.testing.assert_close(total, itm_loss(scores, matched))


def test_second_logit_is_matched() -> None:
    scores, matched = logits(8, 2), torch.tensor([True, False] * 4)
    chance = scores.softmax(dim=1)
    expected = -torch.where(matched, chance[:, 1], chance[:, 0]).log().sum()
    torch.testing.assert_close(itm_loss(scores, matched), expected)
    torch.testing.assert_close(itm_loss(scores, matched), F.cross_entropy(scores, matched.long()) * 8)


# ---- random negatives


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(tiny_config(), 3, 0, 1, 12)


def random_negatives(seed: int, examples: Batch, pool: NegativePool) -> Tensor:
    context = ObjectiveContext(tiny_config().stages[3], "pairs", seed, 8, None, lambda *_: None)
    return ITM(context).random_negatives(examples, pool, "test")


def test_half_of_the_examples_stay_matched(batch: Batch) -> None:
    stage = tiny_config().stages[3]
    for step in range(6):
        indices = torch.nonzero((batch.place + step) % 2 == 0).flatten()
        examples = Batch(**{**vars(batch.rows(indices)), "step": step})
        assert matched_examples(examples, stage).sum() == len(examples) / 2


def test_random_negative_has_the_same_source_and_another_image(batch: Batch) -> None:
    pool = NegativePool(batch.image_id, batch.source)
    drawn = torch.stack([random_negatives(seed, batch, pool) for seed in range(200)])
    assert (batch.source[drawn] == batch.source).all()
    assert (batch.image_id[drawn] != batch.image_id).all()
    others = [(batch.source == s) & (batch.image_id != i) for s, i in zip(batch.source, batch.image_id, strict=True)]
    for row, allowed in enumerate(others):
        assert set(drawn[:, row].tolist()) == set(torch.nonzero(allowed).flatten().tolist())


def test_example_alone_in_its_source_draws_from_the_others(batch: Batch) -> None:
    pool = NegativePool(batch.image_id, torch.tensor([7, *[1] * 11]))
    assert random_negatives(1, batch, pool)[0] != 0


def test_negatives_do_not_depend_on_the_other_examples_of_a_rank(batch: Batch) -> None:
    pool = NegativePool(batch.image_id, batch.source)
    part = random_negatives(1, batch.rows(slice(5, 9)), pool)
    assert torch.equal(random_negatives(1, batch, pool)[5:9], part)
