"""Natural language for visual reasoning (NLVR2): decide whether a statement about two images is true.

Shapes: n examples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import HeadConfig
from pipeline.objectives import Objective, register, require


def nlvr2_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy summed over examples; logits (n, 2) of (false, true), label (n,) int64, 1 if true."""
    return F.cross_entropy(logits.float(), label, reduction="sum")


@register
class NLVR2(Objective):
    source_types = frozenset({"statements"})
    head = "nlvr2"
    evaluations: ClassVar = {"statements": "nlvr2"}

    @classmethod
    def batch_groups(cls, source_type: SourceType, stage: StageConfig, model: TransformerConfig) -> frozenset[str]:
        return frozenset({"image", "second_image", "text", "label"})

    @classmethod
    def head_config(cls, heads: HeadConfig, stage: StageConfig) -> HeadConfig:
        return replace(heads, nlvr2=True)

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        forward = self.fusion_forward(examples, "statement", "nlvr2")
        forward = replace(forward, second_image=examples.second_image, second_image_size=examples.second_image_size)
        return {"statement": forward}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return nlvr2_loss(outputs["statement"]["nlvr2"], require(examples.label))
