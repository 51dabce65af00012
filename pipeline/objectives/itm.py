"""Image-text matching (ITM) with hard negatives from the global batch (ALBEF, VLMo) or random ones (ViLT, ImageBERT).

Shapes: n examples, B candidates of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import TEXT, VISUAL, NegativePool, Objective, RowSwap, require


def itm_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Return the cross-entropy summed over pairs; logits (n, 2) of (mismatched, matched), `matched` (n,) bool."""
    return F.cross_entropy(logits.float(), matched.long(), reduction="sum")


def draw_negatives(similarity: Tensor, row_id: Tensor, column_id: Tensor, uniform: Tensor) -> Tensor:
    """Draw one candidate per row, with probability softmax(similarity) among those with another image: (n,) int64.

    similarity (n, B) are scaled logits, row_id (n,) and column_id (B,) image ids, uniform (n,) numbers in [0, 1) that
    decide the draw. Candidates with the same image are removed before the softmax, so that a confident row still has
    probability left for the others. A row whose logits are not finite draws uniformly among the others; a row without
    others draws among all.
    """
    allowed = row_id[:, None] != column_id[None, :]
    allowed = allowed | ~allowed.any(dim=1, keepdim=True)
    chance = similarity.float().masked_fill(~allowed, float("-inf")).softmax(dim=1)
    chance = torch.where(chance.isfinite().all(dim=1, keepdim=True), chance, allowed.float()).double()
    edges = chance.cumsum(dim=1)
    # A comparison with every edge instead of a binary search: a parallel cumulative sum need not be monotone, and
    # removed candidates have zero width.
    possible = chance > 0
    reached = possible & (edges > uniform.double()[:, None] * edges[:, -1:])
    last = chance.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(reached.any(dim=1), reached.int().argmax(dim=1), last)


class ITM(Objective):
    """Classification of pairs as matched or mismatched.

    Hard negatives: each example is read as it is, with another image and with another text, both drawn by ITC
    similarity. Random negatives: every second example is read with the image of another example of its source; with
    regions, half of these get another example's text instead (ImageBERT).
    """

    source_types = frozenset({"pairs", "regions"})
    head = "itm"
    shared_heads: ClassVar = {"wpa": "alignment"}
    evaluations: ClassVar = {"pairs": "matching"}
    forward_name = "pair"
    compares_similarity = True

    @classmethod
    def faults(cls, config: RunConfig, stage: StageConfig) -> Iterator[str]:
        if stage.negatives == "hard" and "itc" not in stage.objectives:
            yield "objectives: itm draws hard negatives by itc similarity; add itc, or set negatives: random"

    def count(self, examples: Batch) -> int:
        return 3 * len(examples) if self.needs_similarity else len(examples)

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        # Random negatives replace examples of this forward, which is then one over swapped examples.
        return super().forwards(examples) if self.needs_similarity else {}

    def swaps(self, examples: Batch, pool: NegativePool) -> dict[str, list[RowSwap]]:
        own = examples.place.to(pool.image_id.device)

        def uniform(purpose: str) -> Tensor:
            """Return one number in [0, 1) per example, (n,) float32: a function of seed, step, place and purpose."""
            numbers = uniform_array(hash64(self.context.seed, examples.step, purpose), examples.place.numpy())
            return torch.from_numpy(numbers).to(torch.float32)

        if self.needs_similarity:
            image, text, scale = require(pool.image), require(pool.text), require(pool.scale)
            swaps = {}
            for name, fields, scores, purpose in (
                ("wrong_image", VISUAL, scale * text[own] @ image.T, "negative image"),
                ("wrong_text", TEXT, scale * image[own] @ text.T, "negative text"),
            ):
                places = draw_negatives(scores, pool.image_id[own], pool.image_id, uniform(purpose).to(scores.device))
                swaps[name] = [RowSwap(fields, places)]
            return swaps
        # Another example of the same source, with another image; if there is none, any with another image.
        scores = torch.where(pool.source[own, None] == pool.source[None, :], 0.0, float("-inf"))
        random = uniform("random negative").to(scores.device)
        other = draw_negatives(scores, pool.image_id[own], pool.image_id, random).cpu()
        other = other.masked_fill(matched_examples(examples, self.stage), -1)
        if self.context.source_type != "regions":
            return {"pair": [RowSwap(VISUAL, other)]}
        swap_text = uniform("which is wrong") < 0.5
        return {"pair": [RowSwap(VISUAL, other.masked_fill(swap_text, -1)), RowSwap(TEXT, other.where(swap_text, -1))]}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return itm_loss(*self._logits(outputs, examples))

    def diagnostics(self, outputs: ForwardOutput, examples: Batch) -> dict[str, Tensor]:
        """Return the number of pairs and of correct ones per class, whose recalls reveal a collapsed head."""
        logits, matched = self._logits(outputs, examples)
        predicted = logits.detach().argmax(dim=1).bool()
        return {
            "itm_matched": matched.sum(),
            "itm_matched_correct": (matched & predicted).sum(),
            "itm_mismatched": (~matched).sum(),
            "itm_mismatched_correct": (~matched & ~predicted).sum(),
        }

    def _logits(self, outputs: ForwardOutput, examples: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of all pairs (m, 2) and whether each pair is matched (m,) bool."""
        pair = outputs["pair"]["itm"]
        if not self.needs_similarity:
            return pair, matched_examples(examples, self.stage).to(pair.device)
        logits = torch.cat([pair, outputs["wrong_image"]["itm"], outputs["wrong_text"]["itm"]])
        return logits, torch.arange(len(logits), device=logits.device) < len(pair)


def matched_examples(examples: Batch, stage: StageConfig) -> Tensor:
    """Return which examples stay matched with random negatives: every second one that ITM reads; (n,) bool on CPU."""
    every = stage.objectives["itm"].every
    return torch.div(examples.place + examples.step, every, rounding_mode="floor") % 2 == 0
