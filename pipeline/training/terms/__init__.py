"""Objectives as terms of the step's loss: each says what it reads of the batch, and sums its loss over what it read.

`term` says what a term is. A new objective is a function in `pipeline.objectives`, a term here, and what it reads in
`Model.modules_for`.
"""

from __future__ import annotations

from typing import get_args

from pipeline.config.schema import Objective
from pipeline.training.terms.labelled import Answering, Classification, Reasoning
from pipeline.training.terms.masked import MaskedImage, MaskedLanguage, RegionClass, RegionFeatures
from pipeline.training.terms.matched import HardMatching, RandomMatching, Ranking, WordPatch
from pipeline.training.terms.term import Setting, Term

TERMS: dict[Objective, type[Term]] = {
    "mlm": MaskedLanguage,
    "mim": MaskedImage,
    "classification": Classification,
    "moc": RegionClass,
    "mrfr": RegionFeatures,
    "wpa": WordPatch,
    "ranking": Ranking,
    "vqa": Answering,
    "nlvr2": Reasoning,
}


def terms_of(setting: Setting) -> dict[Objective, Term]:
    """The terms of a stage, in the objectives' own order, which all ranks share."""
    chosen: dict[Objective, Term] = {}
    for objective in get_args(Objective):
        if objective == "itc" or objective not in setting.stage.objectives:
            continue
        kind = TERMS.get(objective)
        if objective == "itm":
            kind = HardMatching if setting.stage.negatives == "hard" else RandomMatching
        assert kind is not None, f"objective {objective} has no term"
        chosen[objective] = kind(setting)
    return chosen
