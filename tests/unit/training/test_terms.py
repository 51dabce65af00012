"""What terms read: which rows, which negatives, and the same whoever asks."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput
from pipeline.training.steps import _merged
from pipeline.training.terms.matched import draw_of_source, matched_rows
from pipeline.training.terms.term import Candidates
from tests.support.tiny_model import tiny_batch, tiny_config


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(tiny_config(), 3, 0, 1, 12)


def test_half_of_the_rows_that_random_matching_reads_are_true_pairs(batch: Batch) -> None:
    stage = tiny_config().stages[3]
    for step in range(6):
        read = torch.nonzero((batch.place + step) % 2 == 0).flatten()
        rows = Batch(**{**vars(batch.rows(read)), "step": step})
        assert matched_rows(rows, stage).sum() == len(rows) / 2


def test_a_random_negative_is_of_the_same_source_and_shows_another_image(batch: Batch) -> None:
    candidates = Candidates(batch.image_id, batch.source)
    drawn = torch.stack([draw_of_source(seed, batch, candidates, "test") for seed in range(200)])
    assert (batch.source[drawn] == batch.source).all()
    assert (batch.image_id[drawn] != batch.image_id).all()
    others = [(batch.source == s) & (batch.image_id != i) for s, i in zip(batch.source, batch.image_id, strict=True)]
    for row, allowed in enumerate(others):
        assert set(drawn[:, row].tolist()) == set(torch.nonzero(allowed).flatten().tolist())


def test_a_row_alone_in_its_source_draws_from_the_others(batch: Batch) -> None:
    alone = Candidates(batch.image_id, torch.tensor([7, *[1] * 11]))
    assert draw_of_source(1, batch, alone, "test")[0] != 0


def test_negatives_do_not_depend_on_which_rows_ask(batch: Batch) -> None:
    candidates = Candidates(batch.image_id, batch.source)
    whole = draw_of_source(1, batch, candidates, "test")
    part = draw_of_source(1, batch.rows(slice(5, 9)), candidates, "test")
    assert torch.equal(whole[5:9], part)


def test_what_two_objectives_ask_of_the_same_rows_is_one_pass(batch: Batch) -> None:
    words = ForwardInput(heads=("mlm",), text=batch.text, mask_positions=batch.mask_positions)
    merged = _merged(words, ForwardInput(heads=("moc",), text=batch.text, region_positions=batch.mask_positions))
    assert merged.heads == ("mlm", "moc")
    assert merged.mask_positions is batch.mask_positions
    assert merged.region_positions is batch.mask_positions
