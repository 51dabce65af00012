"""Masked region feature regression (MRFR, ImageBERT section 3.3): predict the feature vectors of masked regions."""

from functools import partial

import torch.nn.functional as F

from pipeline.objectives import MaskedRegionObjective, region_loss


class MRFR(MaskedRegionObjective):
    """Squared L2 distance to the detector's features (n, R, F), summed over masked regions and feature dimensions.

    The paper does not divide by F (UNITER's release does): the mean over regions grows with F and with the scale of
    the features.
    """

    head = "mrfr"
    loss_function = staticmethod(partial(region_loss, partial(F.mse_loss, reduction="sum")))
    targets = ("region_features", "region_positions")
