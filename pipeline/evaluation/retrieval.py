"""Zero-shot retrieval among all held-out pairs: images retrieve their captions and captions their images.

The dual encoder scores every pair by the mean cosine of its contrastive heads: `itc`, and `itc_vl` of a VLMo with two
contrasts. VLMo's release scores by the first alone, as does a model with one (`model.contrasts: 1`), such as its
checkpoints fine-tuned for retrieval. A stage that trained matching lets the fusion encoder rerank each query's best
candidates (`reranked`); a model without a contrast scores every pair by fusion.

Ties are resolved pessimistically: a wrong candidate with the score of the best right one ranks before it, so that a
collapsed model, which scores all pairs equally, recalls nothing. Candidates with the query's `image_id` are right.

Queries are ranked in blocks, so that the N x M scores are never in memory at once; each query keeps its rank, margin
and best few candidates. Ranks share the blocks.

Shapes: N images, M captions, P pairs, Q queries, C candidates, K best candidates, D features of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, compute_batches
from pipeline.models.forward import ForwardInput

KS = (1, 5, 10)
KEPT = 10  # best candidates kept per query by default
FusedHead = Literal["itm", "ranking"]
Scores = Callable[[slice], Tensor]  # some queries' scores of all candidates: (rows, C)
_ROWS = 256  # queries ranked at once


class Images(Protocol):
    """Images by index: a tensor (N, H, W, 3) uint8, or an object that decodes them on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Recall:
    """One direction: the fraction of queries with a right candidate among the first k, and statistics of the ranks."""

    at: dict[int, float]
    chance: dict[int, float]  # expected for a random order
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class Retrieval:
    image_to_text: Recall
    text_to_image: Recall


@dataclass(frozen=True)
class Ranked:
    """The ranking of the candidates of each query in one direction."""

    rank: Tensor  # (Q,) int64 from 1: of the best right candidate; C + 1 where no candidate is right
    margin: Tensor  # (Q,) float32: score of the best right candidate minus that of the best wrong one
    best: Tensor  # (Q, K) int64: the best candidates; among equal scores by index
    score: Tensor  # (Q, K) float32: their scores


@dataclass(frozen=True)
class Rankings:
    image_to_text: Ranked
    text_to_image: Ranked


def run_forward(model: nn.Module, forward_input: ForwardInput) -> dict[str, Tensor]:
    """Return the outputs of one forward on the model's device, in evaluation mode and without gradients."""
    device, was_training = next(model.parameters()).device, model.training
    members = {name: value for name, value in vars(forward_input).items() if isinstance(value, Tensor)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in members.items()}
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


def embed_images(model: nn.Module, images: Images, batch: int = 64, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Return unit vectors (N, HD) of images (N, H, W, 3) uint8; dot products are the mean of the H heads' cosines."""

    def embed(rows: slice) -> tuple[Tensor]:
        return (contrastive_features(model, ForwardInput(heads=("itc",), image=images[rows])),)

    return compute_batches(len(images), batch, ranks, embed)[0]


def embed_texts(
    model: nn.Module, token_ids: Sequence[Sequence[int]], pad: int, batch: int = 64, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """Return unit vectors (M, HD) of token ids ([CLS] … [SEP], without padding)."""

    def embed(rows: slice) -> tuple[Tensor]:
        text, keep = pad_token_ids(token_ids[rows], pad)
        return (contrastive_features(model, ForwardInput(heads=("itc",), text=text, text_keep=keep)),)

    return compute_batches(len(token_ids), batch, ranks, embed)[0]


def contrastive_features(model: nn.Module, forward_input: ForwardInput) -> Tensor:
    """Return unit vectors (B, HD): the concatenated features of all contrastive heads, on the CPU."""
    outputs = run_forward(model, forward_input)
    heads = [outputs[name] for name in ("itc", "itc_vl") if name in outputs]
    return (torch.cat(heads, dim=1).float() / len(heads) ** 0.5).cpu()


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
) -> Rankings:
    """Rank both directions, from the images' scores of captions and the captions' scores of images.

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
    """Rank every candidate for every query; candidates with the query's id are right.

    Raises ValueError for a NaN score, which would otherwise make a model look perfect or hopeless.
    """

    def rank(rows: slice) -> tuple[Tensor, ...]:
        block = scores(rows)
        if torch.isnan(block).any():
            raise ValueError("similarities are NaN: the model's features are not finite; evaluate another checkpoint")
        right = (query_id[rows, None] == candidate_id[None]).to(block.device)
        best_right = block.masked_fill(~right, -torch.inf).amax(dim=1)
        best_wrong = block.masked_fill(right, -torch.inf).amax(dim=1)
        position = 1 + ((block >= best_right[:, None]) & ~right).sum(dim=1)
        best = first_few(block, min(keep, block.shape[1]))
        return tuple(t.cpu() for t in (position, best_right - best_wrong, best, block.gather(1, best)))

    return Ranked(*compute_batches(len(query_id), _ROWS, ranks, rank))


def first_few(scores: Tensor, k: int) -> Tensor:
    """Return the k best candidates of each row (Q, C) by descending score: (Q, k) int64, among equals by index.

    `topk` alone leaves the choice among equals open.
    """
    last = scores.topk(k, dim=1).values[:, -1:]
    above, level = scores > last, scores == last
    missing = k - above.sum(dim=1, keepdim=True)
    chosen = (above | (level & (level.cumsum(dim=1) <= missing))).nonzero()[:, 1].view(-1, k)
    order = scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order)


def recall_at_k(image_ranks: Tensor, caption_ranks: Tensor, caption_of: Tensor, image_id: Tensor) -> Retrieval:
    """Return recall in both directions from the ranks of each image's (N,) and caption's (M,) best right candidate."""
    caption_id = image_id[caption_of]

    def recall(ranks: Tensor, query_id: Tensor, candidate_id: Tensor) -> Recall:
        return Recall(
            at={k: (ranks <= k).double().mean().item() for k in KS},
            chance={k: chance_level(query_id, candidate_id, k) for k in KS},
            median_rank=ranks.double().quantile(0.5).item(),
            mean_rank=ranks.double().mean().item(),
        )

    return Retrieval(recall(image_ranks, image_id, caption_id), recall(caption_ranks, caption_id, image_id))


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
    queries = query_id.tolist()
    return sum(chance[num_right.get(query, 0)] for query in queries) / len(queries)


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
    ranked: Rankings, k: int, score: Callable[[Tensor], Tensor], caption_of: Tensor, image_id: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ranks (N,) and (M,) after ordering each query's first k candidates by `score`, the others behind.

    `score` maps indices (P, 2) of image and caption to scores (P,). A pair that is a candidate in both directions is
    scored once. `ranked` holds at least k candidates of each query, or all.
    """
    captions, images = ranked.image_to_text.best[:, :k], ranked.text_to_image.best[:, :k]
    num_captions = len(caption_of)
    of_images = torch.arange(len(image_id))[:, None] * num_captions + captions  # a pair as one number
    of_captions = images * num_captions + torch.arange(num_captions)[:, None]
    pairs = torch.cat([of_images.flatten(), of_captions.flatten()]).unique()
    scores = score(torch.stack([pairs // num_captions, pairs % num_captions], dim=1))
    caption_id = image_id[caption_of]

    def new_ranks(old: Ranked, candidates: Tensor, candidate_id: Tensor, query_id: Tensor) -> Tensor:
        """Return new ranks; a query without a right candidate among its first k keeps its rank."""
        own = scores[torch.searchsorted(pairs, candidates)]
        right = candidate_id == query_id[:, None]
        best = own.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        return torch.where(right.any(dim=1), 1 + ((own >= best) & ~right).sum(dim=1), old.rank)

    return (
        new_ranks(ranked.image_to_text, of_images, caption_id[captions], image_id),
        new_ranks(ranked.text_to_image, of_captions, image_id[images], caption_id),
    )
