"""Image classification (ViT, section 3.1): cross-entropy of the classes (n, C) to `label` (n,)."""

from typing import ClassVar

from pipeline.objectives import Objective


class Classification(Objective):
    source_types = frozenset({"labelled"})
    head = "classes"
    evaluations: ClassVar = {"labelled": "classification"}
    fields, targets = frozenset({"label"}), ("label",)
    required: ClassVar = {"num_classes": "the number of classes"}
    head_options = staticmethod(lambda stage: {"classes": stage.num_classes})
    forward_name = "labelled"
