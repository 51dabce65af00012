"""Masked language modelling (MLM, BERT): predict the masked tokens, with the image or regions if there are any."""

from typing import ClassVar

from pipeline.objectives import Objective


class MLM(Objective):
    """Cross-entropy of the tokens (n, K, V) to `mask_labels` (n, K), -100 at padding."""

    source_types = frozenset({"pairs", "text", "regions"})
    head = "mlm"
    evaluations: ClassVar = {"pairs": "mlm"}
    fields = frozenset({"masked_text"})
    forward_name, reads_masked, counted, targets = "masked", True, "mask_labels", ("mask_labels",)
