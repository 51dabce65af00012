"""Image-text matching (ITM) with hard negatives from the global batch (ALBEF, VLMo) or random ones (ViLT, ImageBERT).

Shapes: n examples, B candidates of the global batch, m pairs that are read.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import TEXT, VISUAL, NegativePool, Objective, RowSwap, cross_entropy, require


def draw_negatives(similarity: Tensor, row_id: Tensor, column_id: Tensor, uniform: Tensor) -> Tensor:
    """Draw one candidate per row, with probability softmax(similarity) among those with another image: (n,) int64.

    similarity (n, B) are scaled logits, row_id (n,) and column_id (B,) image ids; uniform (n,) in [0, 1) decides the
    draw. Candidates with the same image are removed before the softmax, which leaves a confident row probability for
    the others. A row whose logits are not finite draws uniformly among the others; a row without others, among all.
    """
    allowed = row_id[:, None] != column_id[None, :]
    allowed = allowed | ~allowed.any(dim=1, keepdim=True)
    chance = similarity.float().masked_fill(~allowed, float("-inf")).softmax(dim=1)
    chance = torch.where(chance.isfinite().all(dim=1, keepdim=True), chance, allowed.float()).double()
    edges = chance.cumsum(dim=1)
    # A comparison with every edge instead of a binary search: a parallel cumulative sum need not be monotone, and
    # removed candidates have zero width.
    possible = chance > 0
    reached = possible & (edges > uniform.to(edges)[:, None] * edges[:, -1:])
    last = chance.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(reached.any(dim=1), reached.int().argmax(dim=1), last)


def matched_examples(examples: Batch, stage: StageConfig) -> Tensor:
    """Return which examples stay matched with random negatives: every second one that ITM reads; (n,) bool on CPU."""
    every = stage.objectives["itm"].every
    return torch.div(examples.place + examples.step, every, rounding_mode="floor") % 2 == 0


class ITM(Objective):
    """Classification of pairs as matched or mismatched.

    Hard negatives: each example is also read with another image and with another text, drawn by ITC similarity. Random
    ones: every second example is read with the image (half of those with regions: the text) of another of its source.
    """

    source_types = frozenset({"pairs", "regions"})
    head = "itm"
    shared_heads: ClassVar = {"wpa": "alignment"}
    evaluations: ClassVar = {"pairs": "matching"}
    forward_name, compares_similarity = "pair", True

    @staticmethod
    def faults(config: RunConfig, stage: StageConfig) -> Iterator[str]:
        if stage.negatives == "hard" and "itc" not in stage.objectives:
            yield "objectives: itm draws hard negatives by itc similarity; add itc, or set negatives: random"

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        # Random negatives replace examples of this forward, which is then one over swapped examples.
        return super().forwards(examples) if self.needs_similarity else {}

    def swaps(self, examples: Batch, pool: NegativePool) -> dict[str, list[RowSwap]]:
        ids, own = pool.image_id, examples.place.to(pool.image_id.device)

        def uniform(purpose: str) -> Tensor:
            """Return one number in [0, 1) per example, (n,) float32: a function of seed, step, place and purpose."""
            numbers = uniform_array(hash64(self.context.seed, examples.step, purpose), examples.place.numpy())
            return torch.from_numpy(numbers).to(torch.float32)

        if self.needs_similarity:
            image, text, scale = require(pool.image), require(pool.text), require(pool.scale)
            wrong_image = draw_negatives(scale * text[own] @ image.T, ids[own], ids, uniform("negative image"))
            wrong_text = draw_negatives(scale * image[own] @ text.T, ids[own], ids, uniform("negative text"))
            return {"wrong_image": [RowSwap(VISUAL, wrong_image)], "wrong_text": [RowSwap(TEXT, wrong_text)]}
        # Another example of the same source, with another image; if there is none, any with another image.
        scores = torch.where(pool.source[own, None] == pool.source[None, :], 0.0, float("-inf"))
        other = draw_negatives(scores, ids[own], ids, uniform("random negative")).cpu()
        other = other.masked_fill(matched_examples(examples, self.stage), -1)
        if self.context.source_type != "regions":
            return {"pair": [RowSwap(VISUAL, other)]}
        swap_text = uniform("which is wrong") < 0.5
        return {"pair": [RowSwap(VISUAL, other.masked_fill(swap_text, -1)), RowSwap(TEXT, other.where(swap_text, -1))]}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return cross_entropy(*self._pairs(outputs, examples))

    def diagnostics(self, outputs: ForwardOutput, examples: Batch) -> dict[str, Tensor]:
        """Return the number of pairs and of correct ones per class, whose recalls reveal a collapsed head."""
        logits, matched = self._pairs(outputs, examples)
        is_correct = logits.detach().argmax(dim=1).bool() == matched
        return {
            "itm_matched": matched.sum(),
            "itm_matched_correct": (matched & is_correct).sum(),
            "itm_mismatched": (~matched).sum(),
            "itm_mismatched_correct": (~matched & is_correct).sum(),
        }

    def _pairs(self, outputs: ForwardOutput, examples: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (m, 2) of all pairs that are read, and whether each pair is matched, (m,) bool."""
        pair = outputs["pair"]["itm"]
        if not self.needs_similarity:
            return pair, matched_examples(examples, self.stage).to(pair.device)
        logits = torch.cat([pair, outputs["wrong_image"]["itm"], outputs["wrong_text"]["itm"]])
        return logits, torch.arange(len(logits), device=logits.device) < len(pair)
