"""Zero-shot retrieval among all held-out pairs: images retrieve their captions and captions their images.

Pairs are scored by the mean cosine of the contrastive heads, or by the fusion encoder where a model has no contrast.
Candidates with the query's `image_id` are right. Among equal scores wrong candidates rank first, so that a collapsed
model, which scores all pairs equally, recalls nothing. Queries are ranked in blocks, which ranks share: the N x M
scores are never in memory at once.

Shapes: N images, M captions, P pairs, Q queries, C candidates, K best candidates, D features of a head, H heads.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.datasets import EvalPairs, Images, pad_token_ids
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, compute_batches
from pipeline.models.forward import ForwardInput

KS = (1, 5, 10)
KEPT = 10  # best candidates kept per query by default
FusedHead = Literal["itm", "ranking"]
Scores = Callable[[slice], Tensor]  # some queries' scores of all candidates: (rows, C)
T = TypeVar("T")
_ROWS = 256  # queries ranked at once


class BothDirections(NamedTuple, Generic[T]):
    image_to_text: T
    text_to_image: T


class Recall(NamedTuple):
    """Recall of one direction: the fraction of queries with a right candidate among the first k."""

    values: dict[str, float]  # r1, r5, r10, and the median_rank and mean_rank of the best right candidate
    chance: dict[str, float]  # r1, r5, r10 expected for a random order


class Ranked(NamedTuple):
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


def contrastive_features(model: nn.Module, forward_input: ForwardInput) -> Tensor:
    """Return unit vectors (B, HD) on the CPU; their dot products are the mean of the H contrastive heads' cosines.

    VLMo's release scores by the first of its two contrasts alone.
    """
    outputs = run_forward(model, forward_input)
    heads = [outputs[name] for name in ("itc", "itc_vl") if name in outputs]
    return (torch.cat(heads, dim=1).float() / len(heads) ** 0.5).cpu()


@dataclass(frozen=True)
class Predictor:
    """A model with its tokenizer, the batch size of its forwards, and the ranks that share them."""

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int = 64
    ranks: Ranks = SINGLE_PROCESS

    def embed_images(self, images: Images) -> Tensor:
        """Return the unit vectors (N, HD) of images (N, H, W, 3) uint8."""
        features = functools.partial(contrastive_features, self.model)
        batches = functools.partial(compute_batches, len(images), self.batch_size, self.ranks)
        return batches(lambda rows: (features(ForwardInput(heads=("itc",), image=images[rows])),))[0]

    def embed_texts(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the unit vectors (M, HD) of token ids ([CLS] … [SEP], without padding)."""

        def embed(rows: slice) -> tuple[Tensor]:
            text, keep = pad_token_ids(token_ids[rows], self.tokenizer.pad_id)
            return (contrastive_features(self.model, ForwardInput(heads=("itc",), text=text, text_keep=keep)),)

        return compute_batches(len(token_ids), self.batch_size, self.ranks, embed)[0]

    def fusion_scores(self, held_out: EvalPairs, pairs: Tensor, head: FusedHead = "itm") -> Tensor:
        """Return log-odds of 'matched', or ranking scores (P,), of `pairs` (P, 2): indices of image and caption."""
        order = pairs[:, 0].argsort(stable=True)  # image by image

        def score(rows: slice) -> tuple[Tensor]:
            image, caption = pairs[order[rows]].unbind(dim=1)
            token_ids = [held_out.tokens[number].ids for number in caption.tolist()]
            text, keep = pad_token_ids(token_ids, self.tokenizer.pad_id)
            size = None if held_out.image_size is None else held_out.image_size[image]
            shown = held_out.images[image]
            fused = ForwardInput(heads=(head,), image=shown, image_size=size, text=text, text_keep=keep)
            scores = run_forward(self.model, fused)[head].float()
            return ((scores if head == "ranking" else scores[:, 1] - scores[:, 0]).cpu(),)

        (scores,) = compute_batches(len(pairs), self.batch_size, self.ranks, score)
        return torch.empty_like(scores).index_copy_(0, order, scores)


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
    caption_id, ranked = image_id[caption_of], []
    for scores, queries, candidates in ((image_scores, image_id, caption_id), (text_scores, caption_id, image_id)):
        block = functools.partial(_rank_block, scores, queries, candidates, keep)
        ranked.append(Ranked(*compute_batches(len(queries), _ROWS, ranks, block)))
    return BothDirections(*ranked)


def _rank_block(scores: Scores, query_id: Tensor, candidate_id: Tensor, keep: int, rows: slice) -> tuple[Tensor, ...]:
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
    """Return recall in both directions from the ranks of each image's (N,) and caption's (M,) best right candidate.

    Among C candidates of which n are right, chance is 1 - (C - n choose k) / (C choose k), averaged over the queries.
    """
    caption_id, recalls = image_id[caption_of], []
    for rank, query_id, candidate_id in zip(ranks, (image_id, caption_id), (caption_id, image_id), strict=True):
        values, chance = {}, {}
        num_right, total = Counter(candidate_id.tolist()), len(candidate_id)
        for k in KS:
            values[f"r{k}"] = (rank <= k).double().mean().item()
            missed = {n: math.comb(total - n, min(k, total)) for n in {0, *num_right.values()}}
            hit = {n: 1 - count / missed[0] for n, count in missed.items()}
            chance[f"r{k}"] = sum(hit[num_right[query]] for query in query_id.tolist()) / len(query_id)
        values["median_rank"], values["mean_rank"] = rank.double().quantile(0.5).item(), rank.double().mean().item()
        recalls.append(Recall(values, chance))
    return BothDirections(*recalls)


def rerank(
    ranked: BothDirections[Ranked], k: int, score: Callable[[Tensor], Tensor], caption_of: Tensor, image_id: Tensor
) -> list[Tensor]:
    """Return the ranks (N,) and (M,) after ordering each query's first k candidates by `score`, the others behind.

    `score` maps indices (P, 2) of image and caption to scores (P,), once for each pair. `ranked` holds at least k
    candidates of each query, or all. A query without a right candidate among its first k keeps its rank.
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
