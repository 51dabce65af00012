"""Masked object classification (MOC, ImageBERT section 3.3): predict the detector's class of masked regions.

Shapes: n examples, R regions, K masked regions per example (padded with -1), C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardOutput
from pipeline.objectives import MaskedRegionObjective, register, require


def moc_loss(logits: Tensor, classes: Tensor, positions: Tensor) -> Tensor:
    """Return the cross-entropy to the detector's most likely class, summed over masked regions.

    logits (n, K, C), classes (n, R) int64, positions (n, K) int64 with -1 at padding.
    """
    is_masked = positions >= 0
    expected = classes.gather(1, positions.clamp(min=0))[is_masked]
    return F.cross_entropy(logits[is_masked].float(), expected, reduction="sum")


@register
class MOC(MaskedRegionObjective):
    head = "moc"

    @classmethod
    def batch_groups(cls, source_type: SourceType, stage: StageConfig, model: TransformerConfig) -> frozenset[str]:
        return super().batch_groups(source_type, stage, model) | {"region_class"}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        logits, classes = outputs["masked"]["moc"], require(examples.region_class)
        return moc_loss(logits, classes, require(examples.region_positions))
