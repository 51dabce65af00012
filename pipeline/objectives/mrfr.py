"""Masked region feature regression (MRFR, ImageBERT section 3.3): predict the feature vectors of masked regions."""

from torch import Tensor

from pipeline.objectives import MaskedRegionObjective


def mrfr_loss(predicted: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return the squared L2 distance to the detector's features, summed over masked regions and feature dimensions.

    predicted (n, K, F), features (n, R, F) before masking, positions (n, K) int64 with -1 at padding. The paper does
    not divide by F (UNITER's release does): the mean over regions grows with F and with the scale of the features.
    """
    is_masked = positions >= 0
    index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, features.shape[-1])
    return (predicted - features.gather(1, index))[is_masked].float().square().sum()


class MRFR(MaskedRegionObjective):
    head = "mrfr"
    loss_function, targets = staticmethod(mrfr_loss), ("region_features", "region_positions")
