"""Zero-shot retrieval: images find their captions and captions their images among all held-out pairs.

The dual encoder scores every pair; its similarity is the mean of the contrastive heads' cosines: `itc`, and `itc_vl`
through the vision-language expert of a VLMo with two contrasts, since it trains both. VLMo's release scores by the
first alone, as does a model with one (`model.contrasts: 1`), such as its checkpoints fine-tuned for retrieval. Where
the stage trained matching, the fusion encoder reorders each query's best few (`reranked`); a model that only fuses
scores every pair by that.

The rule for ties is pessimistic: a wrong candidate with the score of the best right one stands before it, so a
collapsed model that scores everything alike recalls nothing. Candidates with the query's `image_id` are right.

Every query is ranked against every candidate, a block of queries at a time: the N x M scores are never held whole, and
of each query only its place, its margin and its best few candidates are kept. Ranks share the blocks.

Shapes: N images, M captions, Q queries, C candidates, K best candidates kept, D features of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, compute_batches
from pipeline.models.forward import ForwardInput

KS = (1, 5, 10)
KEPT = 10  # best candidates of each query that are kept, where nobody asks for more
FusedHead = Literal["itm", "ranking"]
Scores = Callable[[slice], Tensor]  # some queries' scores of all candidates: (rows, C)
_ROWS = 256  # queries ranked at once


class Images(Protocol):
    """Pictures by number: a tensor (N, H, W, 3) uint8, or what reads those that are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Any) -> Tensor: ...


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


@dataclass(frozen=True)
class Ranked:
    """How the candidates of each query of one direction stand."""

    place: Tensor  # (Q,) int64, from 1: of the best right candidate; C + 1 where no candidate is right
    margin: Tensor  # (Q,) float32: the score of the best right candidate above that of the best wrong one
    best: Tensor  # (Q, K) int64: the first candidates; of equal scores the first stands first
    score: Tensor  # (Q, K) float32: theirs


@dataclass(frozen=True)
class Rankings:
    image_to_text: Ranked
    text_to_image: Ranked


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[torch.device]:
    """The model in evaluation mode and without gradients; gives its device and restores its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def pad_token_ids(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows as (B, L) int64 with [PAD] behind, and (B, L) bool, False at padding; L is the longest row's."""
    length = max(len(row) for row in rows)
    text = torch.full((len(rows), length), pad, dtype=torch.int64)
    for place, row in enumerate(rows):
        text[place, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    keep = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return text, keep


def embed_images(model: nn.Module, images: Images, batch: int = 64, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Unit vectors (N, HD) of `images` (N, H, W, 3) uint8; their dot products are the mean of the H heads' cosines."""
    with eval_mode(model) as device:

        def embed(rows: slice) -> tuple[Tensor]:
            return (contrastive_features(model, ForwardInput(heads=("itc",), image=images[rows].to(device))),)

        return compute_batches(len(images), batch, ranks, embed)[0]


def embed_texts(
    model: nn.Module, rows: Sequence[Sequence[int]], pad: int, batch: int = 64, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """Unit vectors (M, HD) of token rows ([CLS] … [SEP], without padding)."""
    with eval_mode(model) as device:

        def embed(chosen: slice) -> tuple[Tensor]:
            text, keep = pad_token_ids(rows[chosen], pad)
            return (
                contrastive_features(
                    model, ForwardInput(heads=("itc",), text=text.to(device), text_keep=keep.to(device))
                ),
            )

        return compute_batches(len(rows), batch, ranks, embed)[0]


def contrastive_features(model: nn.Module, wanted: ForwardInput) -> Tensor:
    """Unit vectors (B, HD) of a pass's rows, of all contrastive heads together."""
    outputs = model({"only": wanted})["only"]
    heads = [outputs[name] for name in ("itc", "itc_vl") if name in outputs]
    return (torch.cat(heads, dim=1).float() / len(heads) ** 0.5).cpu()


def dot_products(queries: Tensor, candidates: Tensor) -> Scores:
    """Scores of unit vectors (Q, D) and (C, D), float32.

    They are rounded from sums in float64: a pair's score is then the same in both directions and in every block, and
    equal vectors score equally, which float32's own sums would leave to the order in which a kernel adds.
    """
    wide = candidates.double().T
    return lambda rows: (queries[rows].double() @ wide).float()


def rankings(
    image_scores: Scores,
    text_scores: Scores,
    caption_of: Tensor,
    image_id: Tensor,
    keep: int = KEPT,
    ranks: Ranks = SINGLE_PROCESS,
) -> Rankings:
    """Both directions, from the images' scores of the captions and the captions' of the images.

    `caption_of` (M,) is the image of each caption, `image_id` (N,) the images' ids.
    """
    caption_id = image_id[caption_of]
    return Rankings(
        image_to_text=rank_candidates(image_scores, image_id, caption_id, keep, ranks),
        text_to_image=rank_candidates(text_scores, caption_id, image_id, keep, ranks),
    )


def rank_candidates(
    scores: Scores, query_id: Tensor, candidate_id: Tensor, keep: int = KEPT, ranks: Ranks = SINGLE_PROCESS
) -> Ranked:
    """Every query against every candidate. Those of one id are right for each other.

    Raises ValueError where a score is not a number: such a model would otherwise seem perfect or hopeless.
    """

    def rank(rows: slice) -> tuple[Tensor, ...]:
        block = scores(rows)
        if torch.isnan(block).any():
            raise ValueError("similarities hold NaN: the model's features are not numbers; evaluate another checkpoint")
        right = (query_id[rows, None] == candidate_id[None]).to(block.device)
        best_right = block.masked_fill(~right, -torch.inf).amax(dim=1)
        best_wrong = block.masked_fill(right, -torch.inf).amax(dim=1)
        place = 1 + ((block >= best_right[:, None]) & ~right).sum(dim=1)
        best = first_few(block, min(keep, block.shape[1]))
        return tuple(t.cpu() for t in (place, best_right - best_wrong, best, block.gather(1, best)))

    return Ranked(*compute_batches(len(query_id), _ROWS, ranks, rank))


def first_few(scores: Tensor, k: int) -> Tensor:
    """The k highest of each row (Q, C), by falling score: (Q, k) int64. Of equal scores the first stands first.

    `topk` alone leaves open which of several equals it takes.
    """
    last = scores.topk(k, dim=1).values[:, -1:]
    above, level = scores > last, scores == last
    missing = k - above.sum(dim=1, keepdim=True)
    chosen = (above | (level & (level.cumsum(dim=1) <= missing))).nonzero()[:, 1].view(-1, k)
    order = scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order)


def recall_at_k(
    image_places: Tensor, caption_places: Tensor, caption_of: Tensor, image_id: Tensor, ks: Sequence[int] = KS
) -> Retrieval:
    """Recall both ways from the places of each image's (N,) and each caption's (M,) best right candidate.

    Image to text counts a hit if any right caption is among the first k; text to image, if a right image is.
    """
    caption_id = image_id[caption_of]
    return Retrieval(
        image_to_text=_recall(image_places, image_id, caption_id, ks),
        text_to_image=_recall(caption_places, caption_id, image_id, ks),
    )


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


def fusion_scores(
    model: nn.Module,
    images: Images,
    rows: Sequence[Sequence[int]],
    pad: int,
    pairs: Tensor,
    batch: int = 64,
    image_size: Tensor | None = None,
    head: FusedHead = "itm",
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """The fusion encoder's log-odds of 'matched', or its ranking scores: (P,) for `pairs` (P, 2) of image and caption.

    `image_size` (N, 2) is how much of each of `images` is picture; None: all. Pairs are read picture after picture.
    """
    order = pairs[:, 0].argsort(stable=True)
    ordered = pairs[order]
    with eval_mode(model) as device:

        def score(span: slice) -> tuple[Tensor]:
            chosen = ordered[span]
            text, keep = pad_token_ids([rows[caption] for caption in chosen[:, 1].tolist()], pad)
            fused = ForwardInput(
                heads=(head,),
                image=images[chosen[:, 0]].to(device),
                image_size=None if image_size is None else image_size[chosen[:, 0]].to(device),
                text=text.to(device),
                text_keep=keep.to(device),
            )
            scores = model({"fused": fused})["fused"][head].float()
            return ((scores if head == "ranking" else scores[:, 1] - scores[:, 0]).cpu(),)

        (odds,) = compute_batches(len(pairs), batch, ranks, score)
    return torch.empty_like(odds).index_copy_(0, order, odds)


def rerank(
    found: Rankings, k: int, score: Callable[[Tensor], Tensor], caption_of: Tensor, image_id: Tensor
) -> tuple[Tensor, Tensor]:
    """Places (N,) and (M,) where each query's first k stand in the order of `score`, before all others in theirs.

    `score` takes (P, 2) image and caption numbers and gives (P,) numbers. A pair that is a candidate in both
    directions is scored once. `found` holds at least k candidates of each query, or all.
    """
    captions, images = found.image_to_text.best[:, :k], found.text_to_image.best[:, :k]
    num_captions = len(caption_of)
    of_images = torch.arange(len(image_id))[:, None] * num_captions + captions  # a pair as one number
    of_captions = images * num_captions + torch.arange(num_captions)[:, None]
    pairs = torch.cat([of_images.flatten(), of_captions.flatten()]).unique()
    odds = score(torch.stack([pairs // num_captions, pairs % num_captions], dim=1))
    caption_id = image_id[caption_of]
    return (
        _place_again(
            found.image_to_text.place, odds[torch.searchsorted(pairs, of_images)], caption_id[captions], image_id
        ),
        _place_again(
            found.text_to_image.place, odds[torch.searchsorted(pairs, of_captions)], image_id[images], caption_id
        ),
    )


def _place_again(place: Tensor, odds: Tensor, candidate_id: Tensor, query_id: Tensor) -> Tensor:
    """A query without a right candidate among its first k keeps its place: those were all before it already."""
    right = candidate_id == query_id[:, None]
    best = odds.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    again = 1 + ((odds >= best) & ~right).sum(dim=1)
    return torch.where(right.any(dim=1), again, place)
