"""Ranks, computed whole, in blocks or re-ranked, equal a NumPy brute force; chance equals its mean over all orders."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluation import retrieval
from pipeline.evaluation.retrieval import dot_products, rankings, recall_at_k, rerank


def ranks_by_sorting(scores, query_id, candidate_id):
    """Sort each row with negatives first among equal scores, and return the rank of the first positive."""
    ranks = []
    for row, query in zip(scores, query_id, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_id[c] == query))
        ranks.append(1 + [candidate_id[c] == query for c in order].index(True))
    return np.array(ranks)


def evaluated(similarity, caption_of, image_id):
    """Return the rankings and recalls of a matrix of scores."""
    scores, captions, ids = (torch.as_tensor(values) for values in (similarity, caption_of, image_id))
    ranked = rankings(scores.__getitem__, scores.T.__getitem__, captions, ids)
    return ranked, recall_at_k([direction.rank for direction in ranked], captions, ids)


@pytest.mark.parametrize(
    ("per_image", "levels", "duplicates"), [(1, None, 0), (5, None, 4), (1, 1, 4), (5, 3, 0), (5, 3, 4)]
)
def test_recall_and_reranked_ranks_equal_a_brute_force(per_image, levels, duplicates):
    """Similarities are drawn from few `levels` to produce ties, with some images shown twice."""
    random = np.random.default_rng(per_image)
    similarity, caption_of = random.normal(size=(37, 37 * per_image)), np.repeat(np.arange(37), per_image)
    similarity[caption_of, np.arange(len(caption_of))] += 1.0
    similarity = np.round(similarity * levels) / levels if levels else similarity
    image_id = random.permutation(370)[:37]
    image_id[:duplicates] = image_id[-1]
    ranked, recalls = evaluated(similarity, caption_of, image_id)
    second, requested = np.round(random.normal(size=similarity.shape) * 2), []

    def score(pairs):
        requested.append(pairs)
        return torch.tensor(second)[pairs[:, 0], pairs[:, 1]]

    reranked = rerank(ranked, 4, score, torch.tensor(caption_of), torch.tensor(image_id))
    caption_id = image_id[caption_of]
    for recall, new_ranks, coarse, exact, query_id, candidate_id in (
        (recalls.image_to_text, reranked[0], similarity, second, image_id, caption_id),
        (recalls.text_to_image, reranked[1], similarity.T, second.T, caption_id, image_id),
    ):
        ranks = ranks_by_sorting(coarse, query_id, candidate_id)
        expected = {f"r{k}": np.mean(ranks <= k) for k in (1, 5, 10)} | {"median_rank": np.median(ranks)}
        assert recall.values == expected | {"mean_rank": pytest.approx(np.mean(ranks), abs=1e-12)}
        best = np.argsort(-coarse, axis=1, kind="stable")[:, :4]
        lifted = coarse.copy()
        np.put_along_axis(lifted, best, 1000 + np.take_along_axis(exact, best, axis=1), axis=1)
        assert new_ranks.tolist() == ranks_by_sorting(lifted, query_id, candidate_id).tolist()
    assert len(requested[0].unique(dim=0)) == len(requested[0]) <= 4 * sum(similarity.shape)


def test_ranks_are_equal_in_blocks_and_equal_scores_keep_their_order(monkeypatch):
    """The vectors include equal ones, whose float32 sums would differ with the order of summation."""
    torch.manual_seed(0)
    for levels, k in itertools.product((1, 2, 5, 1000), (1, 3, 10, 90)):
        scores = torch.randint(0, levels, (40, 90)).float()
        best = rankings(scores.__getitem__, scores.T.__getitem__, torch.arange(90) % 40, torch.arange(40), keep=k)
        assert torch.equal(best.image_to_text.best, scores.argsort(dim=1, descending=True, stable=True)[:, :k])
    images, texts = (F.normalize(torch.randn(n, 96), dim=1) for n in (130, 650))
    images[40:60], texts[300:400] = images[7], texts[11]
    captions, ids = torch.arange(130).repeat_interleave(5), torch.arange(130)
    expected, _ = evaluated((images.double() @ texts.double().T).float(), captions, ids)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        result = rankings(dot_products(images, texts), dot_products(texts, images), captions, ids)
        for own, other in zip(result, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_margins_ties_perfect_models_duplicates_and_chance(monkeypatch):
    ranked, _ = evaluated([[0.9, 0.5, 0.1], [0.2, 0.3, 0.7]], [0, 0, 1], [4, 9])
    torch.testing.assert_close(ranked.image_to_text.margin, torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(ranked.text_to_image.margin, torch.tensor([0.7, 0.2, 0.6]))
    _, equal = evaluated(np.zeros((30, 30)), np.arange(30), np.arange(30))
    assert equal.image_to_text == equal.text_to_image
    assert [equal.image_to_text.values[key] for key in ("r1", "r5", "r10", "median_rank")] == [0.0, 0.0, 0.0, 30]
    caption_of = np.arange(20).repeat(5)
    _, perfect = evaluated((np.arange(20)[:, None] == caption_of[None]).astype(float), caption_of, np.arange(20))
    assert perfect.image_to_text.values == perfect.text_to_image.values
    assert perfect.image_to_text.values["r1"] == perfect.image_to_text.values["mean_rank"] == 1.0
    similarity = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    recalls = [evaluated(similarity, np.arange(3), ids)[1] for ids in ([7, 7, 8], [7, 6, 8])]
    assert [recall.image_to_text.values["r1"] for recall in recalls] == [1.0, pytest.approx(1 / 3)]
    with pytest.raises(ValueError, match="NaN"):
        evaluated(np.full((3, 3), np.nan), np.arange(3), np.arange(3))

    monkeypatch.setattr(retrieval, "KS", (1, 2, 10))
    for counts in ((1, 1, 1, 1), (2, 1, 3), (1, 4), (1,)):
        captions, ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), torch.arange(len(counts))
        (recall, _), orders = (
            recall_at_k([ids, captions], captions, ids),
            list(itertools.permutations(captions.tolist())),
        )
        for k in (1, 2, 10):
            hits = [query in order[:k] for order in orders for query in range(len(counts))]
            assert recall.chance[f"r{k}"] == pytest.approx(sum(hits) / len(hits), abs=1e-12), (counts, k)
