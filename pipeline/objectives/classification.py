"""Image classification (ViT, section 3.1).

Shapes: n examples, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives import Objective


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy summed over examples; logits (n, C), label (n,) int64."""
    return F.cross_entropy(logits.float(), label, reduction="sum")


class Classification(Objective):
    source_types = frozenset({"labelled"})
    head = "classes"
    evaluations: ClassVar = {"labelled": "classification"}
    fields = frozenset({"label"})
    required: ClassVar = {"num_classes": "the number of classes"}
    head_options = staticmethod(lambda stage: {"classes": stage.num_classes})
    forward_name = "labelled"
    loss_function, targets = staticmethod(classification_loss), ("label",)
