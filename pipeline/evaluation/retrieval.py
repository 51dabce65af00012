"""Zero-shot retrieval: images find their captions and captions their images among all held-out pairs.

The dual encoder scores every pair; its similarity is the mean of the contrastive heads' cosines (`itc`, and VLMo's
`itc_vl` through the vision-language expert, since it trains both). Where the stage trained matching, the fusion
encoder reorders each query's best few (`reranked`); a model that only fuses scores every pair by that.

The rule for ties is pessimistic: a wrong candidate with the score of the best right one stands before it, so a
collapsed model that scores everything alike recalls nothing. Candidates with the query's `image_id` are right.

Shapes: N images, M captions, Q queries, C candidates, D features of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.passes import Pass

KS = (1, 5, 10)
FusedHead = Literal["itm", "ranking"]
_ROWS = 256  # queries ranked at once: bounds the memory beside the similarities themselves


@dataclass(frozen=True)
class Recall:
    """One direction: the share of queries with a right candidate among the first k, and the ranks' middle."""

    at: dict[int, float]
    chance: dict[int, float]  # the same for a random order, exactly
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class Retrieval:
    image_to_text: Recall
    text_to_image: Recall

    def chance(self) -> dict[int, float]:
        """The higher of the two directions' chances, for a single figure to hold results against."""
        return {k: max(c, self.text_to_image.chance[k]) for k, c in self.image_to_text.chance.items()}


@contextmanager
def reading(model: nn.Module) -> Iterator[torch.device]:
    """The model in evaluation mode and without gradients; gives its device and restores its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows as (B, L) int64 with [PAD] behind, and (B, L) bool, False at padding; L is the longest row's."""
    length = max(len(row) for row in rows)
    text = torch.full((len(rows), length), pad, dtype=torch.int64)
    for place, row in enumerate(rows):
        text[place, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    keep = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return text, keep


def embed_images(model: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Unit vectors (N, HD) of `images` (N, H, W, 3) uint8; their dot products are the mean of the H heads' cosines."""
    with reading(model) as device:
        parts = [
            all_heads(model, Pass(heads=("itc",), image=images[start : start + batch].to(device)))
            for start in range(0, len(images), batch)
        ]
    return torch.cat(parts)


def embed_texts(model: nn.Module, rows: Sequence[Sequence[int]], pad: int, batch: int = 64) -> Tensor:
    """Unit vectors (M, HD) of token rows ([CLS] … [SEP], without padding)."""
    parts = []
    with reading(model) as device:
        for start in range(0, len(rows), batch):
            text, keep = padded(rows[start : start + batch], pad)
            parts.append(all_heads(model, Pass(heads=("itc",), text=text.to(device), text_keep=keep.to(device))))
    return torch.cat(parts)


def all_heads(model: nn.Module, wanted: Pass) -> Tensor:
    """Unit vectors (B, HD) of a pass's rows, of all contrastive heads together."""
    outputs = model({"only": wanted})["only"]
    heads = [outputs[name] for name in ("itc", "itc_vl") if name in outputs]
    return (torch.cat(heads, dim=1) / len(heads) ** 0.5).float().cpu()


def recall_at_k(
    similarity: Tensor, caption_of: Tensor, image_id: Tensor, ks: Sequence[int] = KS, transposed: Tensor | None = None
) -> Retrieval:
    """Recall both ways from `similarity` (N, M), the image of each caption (M,) and the images' ids (N,).

    Image to text counts a hit if any right caption is among the first k; text to image, if a right image is.
    `transposed` (M, N) replaces the similarities of text to image, where re-ranking made them differ.
    """
    caption_id = image_id[caption_of]
    other = similarity.T if transposed is None else transposed
    return Retrieval(
        image_to_text=_recall(ranks(similarity, image_id, caption_id), image_id, caption_id, ks),
        text_to_image=_recall(ranks(other, caption_id, image_id), caption_id, image_id, ks),
    )


def ranks(scores: Tensor, query_id: Tensor, candidate_id: Tensor) -> Tensor:
    """(Q,) int64: the place, from 1, of each query's best right candidate; C + 1 where no candidate is right.

    Raises ValueError where a score is not a number: such a model would otherwise seem perfect or hopeless.
    """
    found = []
    for start in range(0, len(scores), _ROWS):
        rows = scores[start : start + _ROWS]
        if torch.isnan(rows).any():
            raise ValueError("similarities hold NaN: the model's features are not numbers; evaluate another checkpoint")
        right = query_id[start : start + _ROWS, None] == candidate_id[None]
        best = rows.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(1 + ((rows >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def _recall(places: Tensor, query_id: Tensor, candidate_id: Tensor, ks: Sequence[int]) -> Recall:
    return Recall(
        at={k: (places <= k).double().mean().item() for k in ks},
        chance={k: chance_level(query_id, candidate_id, k) for k in ks},
        median_rank=places.double().quantile(0.5).item(),
        mean_rank=places.double().mean().item(),
    )


def chance_level(query_id: Tensor, candidate_id: Tensor, k: int) -> float:
    """Expected recall at k of a random order, exactly: 1 − Π_{j<k} (C − n − j)/(C − j) for n right among C."""
    ids, counts = candidate_id.unique(return_counts=True)
    held = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    total, asked = len(candidate_id), query_id.tolist()
    by_count = {n: _chance_of(n, total, k) for n in set(held.values()) | {0}}
    return sum(by_count[held.get(query, 0)] for query in asked) / len(asked)


def _chance_of(right: int, total: int, k: int) -> float:
    missed = 1.0
    for j in range(min(k, total)):
        missed *= max(total - right - j, 0) / (total - j)
    return 1.0 - missed


def matching_odds(
    model: nn.Module,
    images: Tensor,
    rows: Sequence[Sequence[int]],
    pad: int,
    pairs: Tensor,
    batch: int = 64,
    image_size: Tensor | None = None,
    head: FusedHead = "itm",
) -> Tensor:
    """The fusion encoder's log-odds of 'matched', or its ranking scores: (P,) for `pairs` (P, 2) of image and caption.

    `image_size` (N, 2) is how much of each of `images` is picture; None: all.
    """
    odds = []
    with reading(model) as device:
        for start in range(0, len(pairs), batch):
            chosen = pairs[start : start + batch]
            text, keep = padded([rows[caption] for caption in chosen[:, 1].tolist()], pad)
            fused = Pass(
                heads=(head,),
                image=images[chosen[:, 0]].to(device),
                image_size=None if image_size is None else image_size[chosen[:, 0]].to(device),
                text=text.to(device),
                text_keep=keep.to(device),
            )
            scores = model({"fused": fused})["fused"][head].float()
            odds.append((scores if head == "ranking" else scores[:, 1] - scores[:, 0]).cpu())
    return torch.cat(odds)


def rerank(similarity: Tensor, k: int, score: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Scores (N, M) and (M, N) in which each query's k best by `similarity` stand reordered by `score`.

    `score` takes (P, 2) image and caption numbers and gives (P,) numbers. A pair that is a candidate in both
    directions is scored once. What is not among a query's k best keeps its order behind them.
    """
    num_images, num_captions = similarity.shape
    captions = similarity.topk(min(k, num_captions), dim=1).indices
    images = similarity.T.topk(min(k, num_images), dim=1).indices
    wanted = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, captions, True)
    wanted |= torch.zeros_like(similarity.T, dtype=torch.bool).scatter_(1, images, True).T
    pairs = wanted.nonzero()
    odds = torch.zeros_like(similarity)
    odds[wanted] = score(pairs).to(odds.dtype)  # nonzero() and masks both go row by row
    return _lifted(similarity, captions, odds), _lifted(similarity.T, images, odds.T)


def _lifted(scores: Tensor, best: Tensor, odds: Tensor) -> Tensor:
    chosen = odds.gather(1, best)
    floor = scores.amax() + 1.0
    return scores.scatter(1, best, floor + chosen - chosen.amin(dim=1, keepdim=True))
