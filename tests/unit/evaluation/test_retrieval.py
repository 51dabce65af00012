"""Recall against an independent count in NumPy; chance against every order; re-ranking against a full sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.evaluation.retrieval import chance_level, padded, ranks, recall_at_k, rerank


def brute_force(similarity: np.ndarray, caption_of: np.ndarray, image_id: np.ndarray, k: int) -> tuple[float, float]:
    """Sorts every row with wrong candidates first among equals, and looks at the first k."""

    def direction(scores: np.ndarray, query_id: np.ndarray, candidate_id: np.ndarray) -> float:
        hits = 0
        for row, query in zip(scores, query_id, strict=True):
            order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_id[c] == query))
            hits += any(candidate_id[c] == query for c in order[:k])
        return hits / len(scores)

    caption_id = image_id[caption_of]
    return direction(similarity, image_id, caption_id), direction(similarity.T, caption_id, image_id)


def drawn(num_images: int, per_image: int, levels: int | None, duplicates: int, seed: int):
    """Random similarities, of few `levels` where ties are wanted, with some images shown twice."""
    random = np.random.default_rng(seed)
    similarity = random.normal(size=(num_images, num_images * per_image))
    caption_of = np.repeat(np.arange(num_images), per_image)
    similarity[caption_of, np.arange(len(caption_of))] += 1.0
    if levels:
        similarity = np.round(similarity * levels) / levels
    image_id = random.permutation(10 * num_images)[:num_images]
    image_id[:duplicates] = image_id[-1]
    return similarity, caption_of, image_id


@pytest.mark.parametrize("per_image", [1, 5])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("duplicates", [0, 4])
def test_recall_equals_a_brute_force_count(per_image: int, levels: int | None, duplicates: int) -> None:
    similarity, caption_of, image_id = drawn(37, per_image, levels, duplicates, seed=per_image)
    found = recall_at_k(torch.tensor(similarity), torch.tensor(caption_of), torch.tensor(image_id))
    for k in (1, 5, 10):
        expected = brute_force(similarity, caption_of, image_id, k)
        assert (found.image_to_text.at[k], found.text_to_image.at[k]) == pytest.approx(expected, abs=1e-12)


def test_ranking_in_slices_changes_nothing() -> None:
    scores = torch.randint(0, 50, (700, 700)).float()
    ids = torch.arange(700)
    assert torch.equal(ranks(scores, ids, ids), torch.cat([ranks(scores[i : i + 1], ids[i : i + 1], ids) for i in ids]))


def test_a_model_that_scores_everything_alike_recalls_nothing() -> None:
    same = recall_at_k(torch.zeros(30, 30), torch.arange(30), torch.arange(30))
    assert same.image_to_text.at == same.text_to_image.at == {1: 0.0, 5: 0.0, 10: 0.0}
    assert same.image_to_text.median_rank == 30


def test_a_perfect_model_recalls_everything() -> None:
    caption_of = torch.arange(20).repeat_interleave(5)
    perfect = recall_at_k((torch.arange(20)[:, None] == caption_of[None]).float(), caption_of, torch.arange(20))
    assert perfect.image_to_text.at[1] == perfect.text_to_image.at[1] == 1.0
    assert perfect.image_to_text.mean_rank == 1.0


def test_a_second_picture_of_the_same_image_is_right_too() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    assert recall_at_k(similarity, torch.arange(3), torch.tensor([7, 7, 8])).image_to_text.at[1] == 1.0
    assert recall_at_k(similarity, torch.arange(3), torch.tensor([7, 6, 8])).image_to_text.at[1] == pytest.approx(1 / 3)


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(torch.full((3, 3), torch.nan), torch.arange(3), torch.arange(3))


@pytest.mark.parametrize(("counts", "k"), [((1, 1, 1, 1), 2), ((2, 1, 3), 1), ((2, 1, 3), 2), ((1, 4), 3)])
def test_chance_equals_the_mean_over_every_order(counts: tuple[int, ...], k: int) -> None:
    candidates = [query for query, n in enumerate(counts) for _ in range(n)]
    orders = list(itertools.permutations(candidates))
    hits = [query in order[:k] for order in orders for query in range(len(counts))]
    found = chance_level(torch.arange(len(counts)), torch.tensor(candidates), k)
    assert found == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_chance_among_single_captions_is_k_of_n() -> None:
    assert chance_level(torch.arange(200), torch.arange(200), 10) == pytest.approx(0.05)
    assert chance_level(torch.arange(4), torch.arange(4), 10) == 1.0


def test_reranking_orders_the_first_k_by_the_second_score_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    similarity, second = torch.randn(9, 18), 10 * torch.randn(9, 18)
    asked: list[torch.Tensor] = []

    def score(pairs: torch.Tensor) -> torch.Tensor:
        asked.append(pairs)
        return second[pairs[:, 0], pairs[:, 1]]

    captions, images = rerank(similarity, 4, score)
    for scores, first, exact in ((captions, similarity, second), (images, similarity.T, second.T)):
        for row, before, odds in zip(scores, first, exact, strict=True):
            was = before.argsort(descending=True)
            expected = torch.cat([was[:4][odds[was[:4]].argsort(descending=True)], was[4:]])
            assert torch.equal(row.argsort(descending=True), expected)
    assert len(asked[0].unique(dim=0)) == len(asked[0]) <= 9 * 4 + 18 * 4


def test_padding_marks_only_what_stands_behind_a_row() -> None:
    text, keep = padded([[2, 5, 3], [2, 3]], pad=0)
    assert text.tolist() == [[2, 5, 3], [2, 3, 0]]
    assert keep.tolist() == [[True, True, True], [True, True, False]]
