"""Image classification (ViT, section 3.1).

Shapes: n examples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import HeadConfig
from pipeline.objectives import Objective, register, require


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy summed over examples; logits (n, C), label (n,) int64."""
    return F.cross_entropy(logits.float(), label, reduction="sum")


@register
class Classification(Objective):
    source_types = frozenset({"labelled"})
    head = "classes"
    evaluations: ClassVar = {"labelled": "classification"}

    @classmethod
    def batch_groups(cls, source_type: SourceType, stage: StageConfig, model: TransformerConfig) -> frozenset[str]:
        return frozenset({"image", "label"})

    @classmethod
    def head_config(cls, heads: HeadConfig, stage: StageConfig) -> HeadConfig:
        return replace(heads, classes=stage.num_classes)

    @classmethod
    def faults(cls, config: RunConfig, stage: StageConfig) -> Iterator[str]:
        if stage.num_classes is None:
            yield "num_classes: required by the classification objective; set the number of classes"

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        mask = self.context.drop_path_mask(examples, "labelled")
        return {"labelled": ForwardInput(heads=("classes",), image=require(examples.image), drop_path_mask=mask)}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return classification_loss(outputs["labelled"]["classes"], require(examples.label))
