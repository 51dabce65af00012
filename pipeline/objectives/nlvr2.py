"""Natural language for visual reasoning (NLVR2): cross-entropy of (false, true), (n, 2), to `label` (n,), 1 if true."""

from typing import ClassVar

from pipeline.objectives import Objective


class NLVR2(Objective):
    source_types = frozenset({"statements"})
    head = "nlvr2"
    evaluations: ClassVar = {"statements": "nlvr2"}
    fields, targets = frozenset({"second_image", "label"}), ("label",)
    head_options = staticmethod(lambda stage: {"nlvr2": True})
    forward_name = "statement"
