from __future__ import annotations

import torch

from pipeline.objectives.ranking import draw_distinct_negatives, ranking_loss


def keys(rows: int, candidates: int) -> torch.Tensor:
    return torch.rand(rows, candidates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_wrong_texts_are_different_and_never_of_an_equal_picture() -> None:
    image_id = torch.tensor([3, 3, 5, 6, 7, 8, 9, 9])
    drawn = draw_distinct_negatives(keys(8, 8), image_id, image_id, 4)
    assert (image_id[drawn] != image_id[:, None]).all()
    assert all(len(row.unique()) == 4 for row in drawn)


def test_rows_draw_the_same_whichever_rows_ask_beside_them() -> None:
    image_id, drawn_by = torch.arange(8), keys(8, 8)
    whole = draw_distinct_negatives(drawn_by, image_id, image_id, 3)
    assert torch.equal(draw_distinct_negatives(drawn_by[2:5], image_id[2:5], image_id, 3), whole[2:5])


def test_too_few_others_come_round_again_and_with_none_any_serves() -> None:
    drawn = draw_distinct_negatives(keys(3, 3), torch.arange(3), torch.arange(3), 5)
    for row, others in enumerate(drawn.tolist()):
        assert set(others) == {0, 1, 2} - {row}
        assert others[:2] == others[2:4]
    equal = torch.zeros(3, dtype=torch.int64)
    assert draw_distinct_negatives(keys(3, 3), equal, equal, 2).shape == (3, 2)


def test_every_other_is_drawn_as_often() -> None:
    image_id = torch.arange(6)
    counts = torch.zeros(6)
    for seed in range(600):
        uniform = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed))
        counts[draw_distinct_negatives(uniform, image_id[:1], image_id, 2)[0]] += 1
    assert counts[0] == 0
    assert ((counts[1:] - 240).abs() < 60).all()


def test_the_loss_is_the_cross_entropy_of_the_first_text() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, -1.0]], requires_grad=True)
    expected = -(scores.log_softmax(dim=1)[:, 0]).sum()
    torch.testing.assert_close(ranking_loss(scores), expected)
    none = torch.zeros(0, 3, requires_grad=True)
    ranking_loss(none).backward()
    assert none.grad is not None
