"""Ranking of texts by how well they match an image (ViLT, section 4.2: fine-tuning for retrieval).

Shapes: n examples, N texts per image (the first is its own), B candidates of the global batch.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardOutput
from pipeline.objectives import TEXT, NegativePool, Objective, RowSwap, cross_entropy


def draw_distinct_negatives(keys: Tensor, row_id: Tensor, column_id: Tensor, count: int) -> Tensor:
    """Draw `count` different candidates per row that do not show the row's image: (n, count) int64.

    The smallest keys (n, B) are drawn. A row with fewer others than `count` repeats them; one without draws from all.
    """
    allowed = row_id[:, None] != column_id[None, :]
    allowed = allowed | ~allowed.any(dim=1, keepdim=True)
    order = keys.masked_fill(~allowed, float("inf")).argsort(dim=1, stable=True)
    index = torch.arange(count, device=keys.device) % allowed.sum(dim=1, keepdim=True)
    return order.gather(1, index)


class Ranking(Objective):
    """Cross-entropy of an image's own text being the first among `num_negative_texts` others of the global batch."""

    source_types = frozenset({"pairs"})
    head = "ranking"
    evaluations: ClassVar = {"pairs": "ranking"}
    head_options = staticmethod(lambda stage: {"ranking": True})
    forward_name = "ranked"

    def swaps(self, examples: Batch, pool: NegativePool) -> dict[str, list[RowSwap]]:
        size, count = len(pool.image_id), self.stage.num_negative_texts
        pairs = examples.place.numpy()[:, None] * size + np.arange(size)
        keys = torch.from_numpy(uniform_array(hash64(self.context.seed, examples.step, "wrong texts"), pairs))
        image_id = pool.image_id.cpu()
        negatives = draw_distinct_negatives(keys, image_id[examples.place], image_id, count)
        return {f"wrong_text_{k}": [RowSwap(TEXT, negatives[:, k])] for k in range(count)}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        names = ["ranked", *(f"wrong_text_{k}" for k in range(self.stage.num_negative_texts))]
        scores = torch.stack([outputs[name]["ranking"] for name in names], dim=1)
        return cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))
