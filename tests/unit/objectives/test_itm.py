"""ITM: hard and random negatives are drawn correctly on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.objectives import NegativePool, ObjectiveContext
from pipeline.objectives.itm import ITM, draw_negatives, matched_examples
from tests.support.tiny_model import tiny_batch, tiny_config


def logits(rows: int, columns: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def frequencies(similarity: Tensor, image_id: Tensor, draws: int) -> Tensor:
    """Return how often a row that shows image 1 draws each candidate, over evenly spaced random numbers."""
    evenly = (torch.arange(draws) + 0.5) / draws
    drawn = draw_negatives(similarity.expand(draws, -1), torch.ones(draws, dtype=torch.int64), image_id, evenly)
    return torch.bincount(drawn, minlength=len(image_id)) / draws


def test_negatives_follow_the_softmax_over_other_images() -> None:
    image_id, similarity = torch.tensor([0, 1, 2, 1, 4, 5]), logits(1, 6)
    expected = similarity[0].masked_fill(image_id == 1, float("-inf")).softmax(0)
    torch.testing.assert_close(frequencies(similarity, image_id, 20_000), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_draw_uniformly_among_other_images(poison: float) -> None:
    actual = frequencies(torch.full((1, 5), poison), torch.tensor([0, 1, 1, 2, 3]), 4000)
    torch.testing.assert_close(actual, torch.tensor([1, 0, 0, 1, 1]) / 3, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 3.0, 1e30])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24, 1 - 2**-53])
def test_trap_03_equal_image_is_never_drawn(scale: float, uniform: float) -> None:
    image_id, row_id = torch.arange(50) // 3, torch.arange(40) // 3
    drawn = draw_negatives(logits(40, 50, scale), row_id, image_id, torch.full((40,), uniform, dtype=torch.float64))
    assert (image_id[drawn] != row_id).all()


def test_trap_02_confident_row_still_draws_a_negative() -> None:
    similarity = torch.tensor([[-1e4, -1e4, 1e4, -1e4]])
    assert draw_negatives(similarity, torch.tensor([2]), torch.arange(4), torch.tensor([0.9])).item() == 3


def test_batch_of_equal_images_still_draws() -> None:
    drawn = draw_negatives(logits(3, 3), torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.5, 0.999]))
    assert ((drawn >= 0) & (drawn < 3)).all()


def test_sharded_batch_draws_the_same_negatives() -> None:
    similarity, ids = logits(12, 12), torch.arange(12) // 2
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1))
    parts = zip(similarity.chunk(4), ids.chunk(4), uniform.chunk(4), strict=True)
    drawn = torch.cat([draw_negatives(rows, row_id, ids, numbers) for rows, row_id, numbers in parts])
    assert torch.equal(drawn, draw_negatives(similarity, ids, ids, uniform))


# ---- random negatives


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(tiny_config(), 3, 0, 1, 12)


def random_negatives(seed: int, examples: Batch, pool: NegativePool) -> Tensor:
    """Return the examples whose image replaces each example's; -1 where a pair stays matched."""
    context = ObjectiveContext(tiny_config().stages[3], "pairs", seed, 8, None, lambda *_: None)
    (swap,) = ITM(context).swaps(examples, pool)["pair"]
    return swap.places


def test_half_of_the_examples_stay_matched(batch: Batch) -> None:
    stage = tiny_config().stages[3]
    for step in range(6):
        indices = torch.nonzero((batch.place + step) % 2 == 0).flatten()
        examples = Batch(**{**vars(batch.rows(indices)), "step": step})
        assert matched_examples(examples, stage).sum() == len(examples) / 2


def test_random_negative_has_the_same_source_and_another_image(batch: Batch) -> None:
    drawn = torch.stack(
        [random_negatives(seed, batch, NegativePool(batch.image_id, batch.source)) for seed in range(200)]
    )
    is_matched = matched_examples(batch, tiny_config().stages[3])
    assert (drawn[:, is_matched] == -1).all()
    for row in torch.nonzero(~is_matched).flatten():
        allowed = (batch.source == batch.source[row]) & (batch.image_id != batch.image_id[row])
        assert set(drawn[:, row].tolist()) == set(torch.nonzero(allowed).flatten().tolist())


def test_example_alone_in_its_source_draws_from_the_others(batch: Batch) -> None:
    row = int(torch.nonzero(~matched_examples(batch, tiny_config().stages[3]))[0])
    source = torch.ones(12, dtype=torch.int64)
    source[row] = 7
    assert random_negatives(1, batch, NegativePool(batch.image_id, source))[row] not in (-1, row)


def test_negatives_do_not_depend_on_the_other_examples_of_a_rank(batch: Batch) -> None:
    pool = NegativePool(batch.image_id, batch.source)
    part = random_negatives(1, batch.rows(slice(5, 9)), pool)
    assert torch.equal(random_negatives(1, batch, pool)[5:9], part)
