"""Masked language modelling (MLM, BERT): predict the masked tokens, with the image or regions if the source has them.

Shapes: n examples, K masked tokens per example (padded), V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import IGNORED, Batch
from pipeline.models.forward import ForwardInput
from pipeline.objectives import Objective, regions_of, require


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over masked tokens; logits (n, K, V), labels (n, K) with -100 at padding."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class MLM(Objective):
    source_types = frozenset({"pairs", "text", "regions"})
    head = "mlm"
    evaluations: ClassVar = {"pairs": "mlm"}
    fields = frozenset({"masked_text"})
    forward_name = "masked"
    loss_function, targets = staticmethod(mlm_loss), ("mask_labels",)

    def count(self, examples: Batch) -> Tensor:
        return (require(examples.mask_labels) != IGNORED).sum()

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        masked = replace(
            self.fusion_forward(examples, "masked", "mlm"),
            text=require(examples.masked_text),
            mask_positions=require(examples.mask_positions),
            regions=regions_of(examples, masked=True),
        )
        if self.context.source_type == "text":
            masked = replace(masked, image=None, image_size=None, visible_patches=None)
        return {"masked": masked}
