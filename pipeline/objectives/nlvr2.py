"""Natural language for visual reasoning (NLVR2): decide whether a statement about two images is true.

Shapes: n examples.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives import Objective


def nlvr2_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy summed over examples; logits (n, 2) of (false, true), label (n,) int64, 1 if true."""
    return F.cross_entropy(logits.float(), label, reduction="sum")


class NLVR2(Objective):
    source_types = frozenset({"statements"})
    head = "nlvr2"
    evaluations: ClassVar = {"statements": "nlvr2"}
    fields = frozenset({"second_image", "label"})
    head_options = staticmethod(lambda stage: {"nlvr2": True})
    forward_name = "statement"
    loss_function, targets = staticmethod(nlvr2_loss), ("label",)
