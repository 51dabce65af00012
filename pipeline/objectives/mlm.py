"""Masked language modelling (MLM, BERT): predict the masked tokens, with the image or regions if the source has them.

Shapes: n examples, K masked tokens per example (padded), V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import Objective, regions_of, register, require, source_inputs

IGNORED = -100  # label at padding


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over masked tokens; logits (n, K, V), labels (n, K) with -100 at padding."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def masked_count(labels: Tensor) -> Tensor:
    """Return the number of masked tokens (0-d int64)."""
    return (labels != IGNORED).sum()


def correct_count(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of masked tokens whose label has the highest logit (0-d int64)."""
    return (logits.argmax(dim=-1) == labels).sum()


@register
class MLM(Objective):
    source_types = frozenset({"pairs", "text", "regions"})
    head = "mlm"
    evaluations: ClassVar = {"pairs": "mlm"}

    @classmethod
    def batch_groups(cls, source_type: SourceType, stage: StageConfig, model: TransformerConfig) -> frozenset[str]:
        return source_inputs(source_type) | {"masked_text"}

    def count(self, examples: Batch) -> Tensor:
        return masked_count(require(examples.mask_labels))

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

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return mlm_loss(outputs["masked"]["mlm"], require(examples.mask_labels))
