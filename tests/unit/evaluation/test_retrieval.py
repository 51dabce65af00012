"""Ranks, computed whole, in blocks or re-ranked, equal a NumPy brute force; chance equals its mean over all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluation import retrieval
from pipeline.evaluation.retrieval import (
    chance_level,
    dot_products,
    first_few,
    pad_token_ids,
    rankings,
    recall_at_k,
    rerank,
)

EVERY_KIND = pytest.mark.parametrize(
    ("per_image", "levels", "duplicates"), [(1, None, 0), (5, None, 4), (1, 1, 4), (5, 3, 0), (5, 3, 4)]
)


def ranks_by_sorting(scores, query_id, candidate_id):
    """Sort each row with negatives first among equal scores, and return the rank of the first positive."""
    ranks = []
    for row, query in zip(scores, query_id, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_id[c] == query))
        ranks.append(1 + [candidate_id[c] == query for c in order].index(True))
    return np.array(ranks)


def ranked(similarity, caption_of, image_id):
    scores = torch.tensor(similarity)
    return rankings(scores.__getitem__, scores.T.__getitem__, torch.tensor(caption_of), torch.tensor(image_id))


def recall_of(similarity, caption_of, image_id):
    result = ranked(similarity, caption_of, image_id)
    ranks = result.image_to_text.rank, result.text_to_image.rank
    return recall_at_k(*ranks, torch.tensor(caption_of), torch.tensor(image_id))


def drawn(num_images, per_image, levels, duplicates, seed):
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


@EVERY_KIND
def test_recall_and_ranks_equal_a_brute_force(per_image, levels, duplicates):
    similarity, caption_of, image_id = drawn(37, per_image, levels, duplicates, seed=per_image)
    result, caption_id = recall_of(similarity, caption_of, image_id), image_id[caption_of]
    for recall, ranks in (
        (result.image_to_text, ranks_by_sorting(similarity, image_id, caption_id)),
        (result.text_to_image, ranks_by_sorting(similarity.T, caption_id, image_id)),
    ):
        assert recall.at == {k: np.mean(ranks <= k) for k in (1, 5, 10)}
        assert recall.mean_rank == pytest.approx(np.mean(ranks), abs=1e-12)
        assert recall.median_rank == np.median(ranks)


@EVERY_KIND
def test_reranked_ranks_equal_a_brute_force(per_image, levels, duplicates):
    similarity, caption_of, image_id = drawn(23, per_image, levels, duplicates, seed=7)
    second = np.round(np.random.default_rng(1).normal(size=similarity.shape) * 2)
    requested = []

    def score(pairs):
        requested.append(pairs)
        return torch.tensor(second)[pairs[:, 0], pairs[:, 1]]

    first = ranked(similarity, caption_of, image_id)
    result = rerank(first, 4, score, torch.tensor(caption_of), torch.tensor(image_id))
    caption_id = image_id[caption_of]
    for ranks, coarse, exact, query_id, candidate_id in (
        (result[0], similarity, second, image_id, caption_id),
        (result[1], similarity.T, second.T, caption_id, image_id),
    ):
        best = np.argsort(-coarse, axis=1, kind="stable")[:, :4]
        lifted = coarse.copy()
        np.put_along_axis(lifted, best, 1000 + np.take_along_axis(exact, best, axis=1), axis=1)
        assert ranks.tolist() == ranks_by_sorting(lifted, query_id, candidate_id).tolist()
    assert len(requested[0].unique(dim=0)) == len(requested[0]) <= 4 * sum(similarity.shape)


def test_blocks_of_queries_have_equal_ranks(monkeypatch):
    """The inputs include equal vectors, whose float32 sums would differ with the order of summation."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 96), dim=1) for n in (130, 650))
    images[40:60], texts[300:400] = images[7], texts[11]
    whole = (images.double() @ texts.double().T).float()
    captions, ids = torch.arange(130).repeat_interleave(5), torch.arange(130)
    expected = rankings(whole.__getitem__, whole.T.__getitem__, captions, ids)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        result = rankings(dot_products(images, texts), dot_products(texts, images), captions, ids)
        for direction in ("image_to_text", "text_to_image"):
            own, other = (vars(getattr(both, direction)).values() for both in (result, expected))
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_equal_scores_keep_their_order(levels):
    scores = torch.randint(0, levels, (40, 90), generator=torch.Generator().manual_seed(1)).float()
    expected = scores.argsort(dim=1, descending=True, stable=True)
    assert all(torch.equal(first_few(scores, k), expected[:, :k]) for k in (1, 3, 10, 90))


def test_margin_is_best_positive_minus_best_negative_score():
    result = ranked(np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.7]]), np.array([0, 0, 1]), np.array([4, 9]))
    torch.testing.assert_close(result.image_to_text.margin.float(), torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(result.text_to_image.margin.float(), torch.tensor([0.7, 0.2, 0.6]))


def test_equal_scores_have_zero_recall_and_a_perfect_model_has_full():
    equal = recall_of(np.zeros((30, 30)), np.arange(30), np.arange(30))
    assert equal.image_to_text.at == equal.text_to_image.at == {1: 0.0, 5: 0.0, 10: 0.0}
    assert equal.image_to_text.median_rank == 30
    caption_of = np.arange(20).repeat(5)
    perfect = recall_of((np.arange(20)[:, None] == caption_of[None]).astype(float), caption_of, np.arange(20))
    assert perfect.image_to_text.at[1] == perfect.text_to_image.at[1] == perfect.image_to_text.mean_rank == 1.0


def test_duplicate_of_the_image_is_a_positive():
    similarity = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    recalls = [recall_of(similarity, np.arange(3), np.array(ids)) for ids in ([7, 7, 8], [7, 6, 8])]
    assert [recall.image_to_text.at[1] for recall in recalls] == [1.0, pytest.approx(1 / 3)]


def test_nan_scores_are_rejected():
    with pytest.raises(ValueError, match="NaN"):
        recall_of(np.full((3, 3), np.nan), np.arange(3), np.arange(3))


@pytest.mark.parametrize(("counts", "k"), [((1, 1, 1, 1), 2), ((2, 1, 3), 1), ((2, 1, 3), 2), ((1, 4), 3), ((1,), 10)])
def test_chance_equals_the_mean_over_every_order(counts, k):
    candidates = [query for query, n in enumerate(counts) for _ in range(n)]
    hits = [query in order[:k] for order in itertools.permutations(candidates) for query in range(len(counts))]
    chance = chance_level(torch.arange(len(counts)), torch.tensor(candidates), k)
    assert chance == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_mask_excludes_only_padding():
    text, keep = pad_token_ids([[2, 5, 3], [2, 3]], pad=0)
    assert text.tolist() == [[2, 5, 3], [2, 3, 0]]
    assert keep.tolist() == [[True, True, True], [True, True, False]]
