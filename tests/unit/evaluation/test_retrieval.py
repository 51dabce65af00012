"""Ranks, computed whole, in blocks or re-ranked, equal a NumPy brute force; chance equals its mean over all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.evaluation import retrieval
from pipeline.evaluation.retrieval import (
    Rankings,
    chance_level,
    dot_products,
    first_few,
    pad_token_ids,
    rankings,
    recall_at_k,
    rerank,
)


def places_by_sorting(scores: np.ndarray, query_id: np.ndarray, candidate_id: np.ndarray) -> np.ndarray:
    """Sort each row with negatives first among equal scores, and return the rank of the first positive."""
    places = []
    for row, query in zip(scores, query_id, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_id[c] == query))
        places.append(1 + [candidate_id[c] == query for c in order].index(True))
    return np.array(places)


def ranked(similarity: np.ndarray, caption_of: np.ndarray, image_id: np.ndarray, keep: int = 10) -> Rankings:
    scores = torch.tensor(similarity)
    of, ids = torch.tensor(caption_of), torch.tensor(image_id)
    return rankings(scores.__getitem__, scores.T.__getitem__, of, ids, keep)


def recall_of(similarity: np.ndarray, caption_of: np.ndarray, image_id: np.ndarray):
    found = ranked(similarity, caption_of, image_id)
    places = found.image_to_text.rank, found.text_to_image.rank
    return recall_at_k(*places, torch.tensor(caption_of), torch.tensor(image_id))


def drawn(num_images: int, per_image: int, levels: int | None, duplicates: int, seed: int):
    """Draw random similarities, from few `levels` to produce ties, with some images shown twice."""
    random = np.random.default_rng(seed)
    similarity = random.normal(size=(num_images, num_images * per_image))
    caption_of = np.repeat(np.arange(num_images), per_image)
    similarity[caption_of, np.arange(len(caption_of))] += 1.0
    if levels:
        similarity = np.round(similarity * levels) / levels
    image_id = random.permutation(10 * num_images)[:num_images]
    image_id[:duplicates] = image_id[-1]
    return similarity, caption_of, image_id


every_kind = pytest.mark.parametrize(
    ("per_image", "levels", "duplicates"), list(itertools.product((1, 5), (None, 1, 3), (0, 4)))
)


@every_kind
def test_recall_and_ranks_equal_a_brute_force(per_image: int, levels: int | None, duplicates: int) -> None:
    similarity, caption_of, image_id = drawn(37, per_image, levels, duplicates, seed=per_image)
    found = recall_of(similarity, caption_of, image_id)
    caption_id = image_id[caption_of]
    for recall, places in (
        (found.image_to_text, places_by_sorting(similarity, image_id, caption_id)),
        (found.text_to_image, places_by_sorting(similarity.T, caption_id, image_id)),
    ):
        assert recall.at == {k: np.mean(places <= k) for k in (1, 5, 10)}
        assert recall.mean_rank == pytest.approx(np.mean(places), abs=1e-12)
        assert recall.median_rank == np.median(places)


@every_kind
def test_reranked_ranks_equal_a_brute_force(per_image: int, levels: int | None, duplicates: int) -> None:
    similarity, caption_of, image_id = drawn(23, per_image, levels, duplicates, seed=7)
    second = np.round(np.random.default_rng(1).normal(size=similarity.shape) * 2)
    asked: list[torch.Tensor] = []

    def score(pairs: torch.Tensor) -> torch.Tensor:
        asked.append(pairs)
        return torch.tensor(second)[pairs[:, 0], pairs[:, 1]]

    found = rerank(ranked(similarity, caption_of, image_id), 4, score, torch.tensor(caption_of), torch.tensor(image_id))
    caption_id = image_id[caption_of]
    for places, first, exact, query_id, candidate_id in (
        (found[0], similarity, second, image_id, caption_id),
        (found[1], similarity.T, second.T, caption_id, image_id),
    ):
        expected = []
        for row, odds, query in zip(first, exact, query_id, strict=True):
            few = sorted(range(len(row)), key=lambda c: (-row[c], c))[:4]
            lifted = np.array([1000 + odds[c] if c in few else row[c] for c in range(len(row))])
            expected.append(places_by_sorting(lifted[None], np.array([query]), candidate_id)[0])
        assert places.tolist() == expected
    assert len(asked[0].unique(dim=0)) == len(asked[0]) <= 4 * sum(similarity.shape)


def test_blocks_of_queries_have_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs include equal vectors, whose float32 sums would differ with the order of summation."""
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 96), dim=1) for n in (130, 650))
    images[40:60], texts[300:400] = images[7], texts[11]
    caption_of, ids = torch.arange(130).repeat_interleave(5), torch.arange(130)
    both = dot_products(images, texts), dot_products(texts, images)
    whole = (images.double() @ texts.double().T).float()
    expected = rankings(whole.__getitem__, whole.T.__getitem__, caption_of, ids)
    for rows in (1, 7, 256, 1000):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        found = rankings(*both, caption_of, ids)
        for mine, other in (
            (found.image_to_text, expected.image_to_text),
            (found.text_to_image, expected.text_to_image),
        ):
            assert torch.equal(mine.rank, other.rank)
            assert torch.equal(mine.best, other.best)
            assert torch.equal(mine.score, other.score)
            assert torch.equal(mine.margin, other.margin)


def test_equal_scores_keep_their_order() -> None:
    torch.manual_seed(1)
    for levels in (1, 2, 5, 1000):
        scores = torch.randint(0, levels, (40, 90)).float()
        expected = scores.argsort(dim=1, descending=True, stable=True)
        for k in (1, 3, 10, 90):
            assert torch.equal(first_few(scores, k), expected[:, :k])


def test_margin_is_best_positive_minus_best_negative_score() -> None:
    found = ranked(np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.7]]), np.array([0, 0, 1]), np.array([4, 9]))
    torch.testing.assert_close(found.image_to_text.margin.float(), torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(found.text_to_image.margin.float(), torch.tensor([0.7, 0.2, 0.6]))


def test_equal_scores_have_zero_recall() -> None:
    same = recall_of(np.zeros((30, 30)), np.arange(30), np.arange(30))
    assert same.image_to_text.at == same.text_to_image.at == {1: 0.0, 5: 0.0, 10: 0.0}
    assert same.image_to_text.median_rank == 30


def test_perfect_model_has_full_recall() -> None:
    caption_of = np.arange(20).repeat(5)
    perfect = recall_of((np.arange(20)[:, None] == caption_of[None]).astype(float), caption_of, np.arange(20))
    assert perfect.image_to_text.at[1] == perfect.text_to_image.at[1] == 1.0
    assert perfect.image_to_text.mean_rank == 1.0


def test_duplicate_of_the_image_is_a_positive() -> None:
    similarity = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    assert recall_of(similarity, np.arange(3), np.array([7, 7, 8])).image_to_text.at[1] == 1.0
    assert recall_of(similarity, np.arange(3), np.array([7, 6, 8])).image_to_text.at[1] == pytest.approx(1 / 3)


def test_nan_scores_are_rejected() -> None:
    with pytest.raises(ValueError, match="NaN"):
        recall_of(np.full((3, 3), np.nan), np.arange(3), np.arange(3))


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


def test_mask_excludes_only_padding() -> None:
    text, keep = pad_token_ids([[2, 5, 3], [2, 3]], pad=0)
    assert text.tolist() == [[2, 5, 3], [2, 3, 0]]
    assert keep.tolist() == [[True, True, True], [True, True, False]]
