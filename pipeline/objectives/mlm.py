"""Masked language modelling (MLM, BERT): predict the masked tokens, with the image or regions if the source has them.

Shapes: n examples, K masked tokens per example (padded), V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import IGNORED
from pipeline.objectives import Objective


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over masked tokens; logits (n, K, V), labels (n, K) with -100 at padding."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class MLM(Objective):
    source_types = frozenset({"pairs", "text", "regions"})
    head = "mlm"
    evaluations: ClassVar = {"pairs": "mlm"}
    fields = frozenset({"masked_text"})
    forward_name, reads_masked, counted = "masked", True, "mask_labels"
    loss_function, targets = staticmethod(mlm_loss), ("mask_labels",)
