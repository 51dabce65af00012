"""Masked object classification (MOC, ImageBERT section 3.3): predict the detector's class of masked regions."""

from functools import partial

from pipeline.objectives import MaskedRegionObjective, cross_entropy, region_loss


class MOC(MaskedRegionObjective):
    """Cross-entropy of logits (n, K, C) to `region_class` (n, R) at `region_positions` (n, K), -1 at padding."""

    head = "moc"
    fields = MaskedRegionObjective.fields | {"region_class"}
    loss_function = staticmethod(partial(region_loss, cross_entropy))
    targets = ("region_class", "region_positions")
