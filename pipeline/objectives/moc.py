"""Masked object classification (MOC, ImageBERT section 3.3): predict the detector's class of masked regions."""

from torch import Tensor

from pipeline.objectives import MaskedRegionObjective, cross_entropy


def moc_loss(logits: Tensor, classes: Tensor, positions: Tensor) -> Tensor:
    """Return the summed cross-entropy of logits (n, K, C) to classes (n, R) at positions (n, K), -1 at padding."""
    is_masked = positions >= 0
    return cross_entropy(logits[is_masked], classes.gather(1, positions.clamp(min=0))[is_masked])


class MOC(MaskedRegionObjective):
    head = "moc"
    fields = MaskedRegionObjective.fields | {"region_class"}
    loss_function, targets = staticmethod(moc_loss), ("region_class", "region_positions")
