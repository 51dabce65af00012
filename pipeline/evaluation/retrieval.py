"""Zero-shot retrieval among all held-out pairs: images retrieve their captions and captions their images.

The dual encoder scores every pair by the mean cosine of its contrastive heads: `itc`, and `itc_vl` of a VLMo with two
contrasts. VLMo's release scores by the first alone, as does a model with one (`model.contrasts: 1`), such as its
checkpoints fine-tuned for retrieval. A stage that trained matching lets the fusion encoder rerank each query's best
candidates; a model without a contrast scores every pair by fusion.

Ties are resolved pessimistically: a wrong candidate with the score of the best right one ranks before it, so that a
collapsed model, which scores all pairs equally, recalls nothing. Candidates with the query's `image_id` are right.

Queries are ranked in blocks, so that the N x M scores are never in memory at once; each query keeps its rank, margin
and best few candidates. Ranks share the blocks.

Shapes: N images, M captions, P pairs, Q queries, C candidates, K best candidates, D features of a head, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, compute_batches
from pipeline.models.forward import ForwardInput

KS = (1, 5, 10)
KEPT = 10  # best candidates kept per query by default
FusedHead = Literal["itm", "ranking"]
Scores = Callable[[slice], Tensor]  # some queries' scores of all candidates: (rows, C)
T = TypeVar("T")
_ROWS = 256  # queries ranked at once


class Images(Protocol):
    """Images by index: a tensor (N, H, W, 3) uint8, or an object that decodes them on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class BothDirections(NamedTuple, Generic[T]):
    image_to_text: T
    text_to_image: T


@dataclass(frozen=True)
class Recall:
    """The fraction of queries with a right candidate among the first k, and statistics of the ranks."""

    at: dict[int, float]
    chance: dict[int, float]  # expected for a random order
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class Ranked:
    """The ranking of the candidates of each query in one direction."""

    rank: Tensor  # (Q,) int64 from 1: of the best right candidate; C + 1 where no candidate is right
    margin: Tensor  # (Q,) float32: score of the best right candidate minus that of the best wrong one
    best: Tensor  # (Q, K) int64: the best candidates; among equal scores by index
    score: Tensor  # (Q, K) float32: their scores


def run_forward(model: nn.Module, forward_input: ForwardInput) -> dict[str, Tensor]:
    """Return the outputs of one forward on the model's device, in evaluation mode and without gradients."""
    device, was_training = next(model.parameters()).device, model.training
    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(forward_input).items() if isinstance(v, Tensor)}
    model.eval()
    try:
        with torch.no_grad():
            outputs: dict[str, Tensor] = model({"only": replace(forward_input, **moved)})["only"]
            return outputs
    finally:
        model.train(was_training)


def pad_token_ids(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids (B, L) int64, padded to the longest row, and (B, L) bool, False at padding."""
    text = pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=pad)
    return text, torch.arange(text.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]


def contrastive_features(model: nn.Module, forward_input: ForwardInput) -> Tensor:
    """Return unit vectors (B, HD) on the CPU; their dot products are the mean of the H contrastive heads' cosines."""
    outputs = run_forward(model, forward_input)
    heads = [outputs[name] for name in ("itc", "itc_vl") if name in outputs]
    return (torch.cat(heads, dim=1).float() / len(heads) ** 0.5).cpu()


def embed_images(model: nn.Module, images: Images, batch: int = 64, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Return the unit vectors (N, HD) of images (N, H, W, 3) uint8."""

    def embed(rows: slice) -> tuple[Tensor]:
        return (contrastive_features(model, ForwardInput(heads=("itc",), image=images[rows])),)

    return compute_batches(len(images), batch, ranks, embed)[0]


def embed_texts(
    model: nn.Module, token_ids: Sequence[Sequence[int]], pad: int, batch: int = 64, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """Return the unit vectors (M, HD) of token ids ([CLS] … [SEP], without padding)."""

    def embed(rows: slice) -> tuple[Tensor]:
        text, keep = pad_token_ids(token_ids[rows], pad)
        return (contrastive_features(model, ForwardInput(heads=("itc",), text=text, text_keep=keep)),)

    return compute_batches(len(token_ids), batch, ranks, embed)[0]


def dot_products(queries: Tensor, candidates: Tensor) -> Scores:
    """Return a function of the scores, float32, of unit vectors (Q, D) and (C, D).

    Scores are rounded from float64 sums: a pair then has the same score in both directions and in every block, and
    equal vectors have equal scores, whatever the order in which a kernel adds.
    """
    transposed = candidates.double().T
    return lambda rows: (queries[rows].double() @ transposed).float()


def rankings(
    image_scores: Scores,
    text_scores: Scores,
    caption_of: Tensor,
    image_id: Tensor,
    keep: int = KEPT,
    ranks: Ranks = SINGLE_PROCESS,
) -> BothDirections[Ranked]:
    """Rank both directions, from the images' scores of captions and the captions' scores of images.

    `caption_of` (M,) is the image of each caption, `image_id` (N,) the images' ids. Raises ValueError for a NaN score,
    which would otherwise make a model look perfect or hopeless.
    """
    caption_id = image_id[caption_of]
    of_image = functools.partial(_rank_block, image_scores, image_id, caption_id, keep)
    of_caption = functools.partial(_rank_block, text_scores, caption_id, image_id, keep)
    return BothDirections(
        Ranked(*compute_batches(len(image_id), _ROWS, ranks, of_image)),
        Ranked(*compute_batches(len(caption_id), _ROWS, ranks, of_caption)),
    )


def _rank_block(
    scores: Scores, query_id: Tensor, candidate_id: Tensor, keep: int, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the members of `Ranked` for a block of queries."""
    block = scores(rows)
    if torch.isnan(block).any():
        raise ValueError("similarities are NaN: the model's features are not finite; evaluate another checkpoint")
    right = (query_id[rows, None] == candidate_id[None]).to(block.device)
    best_right = block.masked_fill(~right, -torch.inf).amax(dim=1)
    best_wrong = block.masked_fill(right, -torch.inf).amax(dim=1)
    position = 1 + ((block >= best_right[:, None]) & ~right).sum(dim=1)
    # The best candidates by descending score; among equals, where `topk` leaves the choice open, by index.
    num_best = min(keep, block.shape[1])
    last = block.topk(num_best, dim=1).values[:, -1:]
    above, level = block > last, block == last
    missing = num_best - above.sum(dim=1, keepdim=True)
    chosen = (above | (level & (level.cumsum(dim=1) <= missing))).nonzero()[:, 1].view(-1, num_best)
    best = chosen.gather(1, block.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    return position.cpu(), (best_right - best_wrong).cpu(), best.cpu(), block.gather(1, best).cpu()


def recall_at_k(ranks: Sequence[Tensor], caption_of: Tensor, image_id: Tensor) -> BothDirections[Recall]:
    """Return recall in both directions from the ranks of each image's (N,) and caption's (M,) best right candidate."""
    caption_id, recalls = image_id[caption_of], []
    for rank, (query_id, candidate_id) in zip(ranks, ((image_id, caption_id), (caption_id, image_id)), strict=True):
        at = {k: (rank <= k).double().mean().item() for k in KS}
        chance = {k: chance_level(query_id, candidate_id, k) for k in KS}
        recalls.append(Recall(at, chance, rank.double().quantile(0.5).item(), rank.double().mean().item()))
    return BothDirections(*recalls)


def chance_level(query_id: Tensor, candidate_id: Tensor, k: int) -> float:
    """Return the expected recall at k of a random order: 1 − Π_{j<k} (C − n − j)/(C − j) for n right among C."""
    ids, counts = candidate_id.unique(return_counts=True)
    num_right = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    total = len(candidate_id)
    chance: dict[int, float] = {}  # by the number of right candidates
    for right in {0, *num_right.values()}:
        missed = 1.0
        for j in range(min(k, total)):
            missed *= max(total - right - j, 0) / (total - j)
        chance[right] = 1.0 - missed
    return sum(chance[num_right.get(query, 0)] for query in query_id.tolist()) / len(query_id)


def fusion_scores(
    model: nn.Module,
    images: Images,
    token_ids: Sequence[Sequence[int]],
    pad: int,
    pairs: Tensor,
    batch: int = 64,
    image_size: Tensor | None = None,
    head: FusedHead = "itm",
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """Return the fusion encoder's log-odds of 'matched', or its ranking scores: (P,).

    `pairs` (P, 2) are indices of image and caption, and are read image by image. `image_size` (N, 2) is the extent of
    each image on its canvas; None: all of it.
    """
    order = pairs[:, 0].argsort(stable=True)

    def score(rows: slice) -> tuple[Tensor]:
        image, caption = pairs[order[rows]].unbind(dim=1)
        text, keep = pad_token_ids([token_ids[number] for number in caption.tolist()], pad)
        size = None if image_size is None else image_size[image]
        fused = ForwardInput(heads=(head,), image=images[image], image_size=size, text=text, text_keep=keep)
        scores = run_forward(model, fused)[head].float()
        return ((scores if head == "ranking" else scores[:, 1] - scores[:, 0]).cpu(),)

    (scores,) = compute_batches(len(pairs), batch, ranks, score)
    return torch.empty_like(scores).index_copy_(0, order, scores)


def rerank(
    ranked: BothDirections[Ranked], k: int, score: Callable[[Tensor], Tensor], caption_of: Tensor, image_id: Tensor
) -> list[Tensor]:
    """Return the ranks (N,) and (M,) after ordering each query's first k candidates by `score`, the others behind.

    `score` maps indices (P, 2) of image and caption to scores (P,). A pair that is a candidate in both directions is
    scored once. `ranked` holds at least k candidates of each query, or all. A query without a right candidate among
    its first k keeps its rank.
    """
    captions, images = ranked.image_to_text.best[:, :k], ranked.text_to_image.best[:, :k]
    num_captions, caption_id = len(caption_of), image_id[caption_of]
    of_images = torch.arange(len(image_id))[:, None] * num_captions + captions  # a pair as one number
    of_captions = images * num_captions + torch.arange(num_captions)[:, None]
    pairs = torch.cat([of_images.flatten(), of_captions.flatten()]).unique()
    scores = score(torch.stack([pairs // num_captions, pairs % num_captions], dim=1))
    new_ranks = []
    for old, candidates, right in (
        (ranked.image_to_text, of_images, caption_id[captions] == image_id[:, None]),
        (ranked.text_to_image, of_captions, image_id[images] == caption_id[:, None]),
    ):
        own = scores[torch.searchsorted(pairs, candidates)]
        best = own.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        new_ranks.append(torch.where(right.any(dim=1), 1 + ((own >= best) & ~right).sum(dim=1), old.rank))
    return new_ranks
