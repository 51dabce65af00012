"""Masked region feature regression (MRFR, ImageBERT section 3.3): predict the feature vectors of masked regions.

Shapes: n examples, R regions, K masked regions per example (padded with -1), F feature dimension.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardOutput
from pipeline.objectives import MaskedRegionObjective, register, require


def mrfr_loss(predicted: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return the squared L2 distance to the detector's features, summed over masked regions and feature dimensions.

    predicted (n, K, F), features (n, R, F) before masking, positions (n, K) int64 with -1 at padding. The paper does
    not divide by F (UNITER's release does): divided by the number of masked regions, the loss grows with F and with
    the scale of the features.
    """
    is_masked = positions >= 0
    index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, features.shape[-1])
    return (predicted - features.gather(1, index))[is_masked].float().square().sum()


@register
class MRFR(MaskedRegionObjective):
    head = "mrfr"

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        predicted, features = outputs["masked"]["mrfr"], require(examples.region_features)
        return mrfr_loss(predicted, features, require(examples.region_positions))
