"""How well statements about two pictures are judged (NLVR2): accuracy, and over whole statements, consistency.

NLVR2 shows each sentence with up to four pairs of pictures, named split-set-pair-sentence; a sentence is consistently
understood if it is judged rightly with every pair (arXiv 1811.00491, section 5).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.retrieval import reading


@dataclass(frozen=True)
class Reasoning:
    statements: int
    accuracy: float
    accuracy_without_model: float  # of the more frequent label
    consistency: float | None  # share of sentences judged rightly throughout; None where ids do not name sentences


def measure_reasoning(model: nn.Module, source: AnnotatedSource) -> Reasoning:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> list[tuple[str, bool, bool]]:
        """Each statement's id, its truth, and whether it was judged rightly."""
        found: list[tuple[str, bool, bool]] = []
        with reading(model) as device:
            for one, statements in source.batches(device, "reasoning"):
                judged = model({"only": one})["only"]["reasoning"].argmax(dim=1).bool().tolist()
                found += [(s.id, s.is_true, s.is_true == said) for s, said in zip(statements, judged, strict=False)]
        return found

    ids, labels, right = (list(each) for each in zip(*itertools.chain(*source.shared(read)), strict=True))
    count = len(right)
    return Reasoning(count, sum(right) / count, max(Counter(labels).values()) / count, consistency(ids, right))


def consistency(ids: list[str], right: list[bool]) -> float | None:
    """The share of sentences all of whose judgements are right; None unless every id is split-set-pair-sentence."""
    parts = [each.split("-") for each in ids]
    if any(len(each) != 4 for each in parts):
        return None
    sentences: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for (split, number, _, sentence), is_right in zip(parts, right, strict=True):
        sentences[split, number, sentence].append(is_right)
    return sum(all(each) for each in sentences.values()) / len(sentences)
