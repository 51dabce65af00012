"""VQA accuracy, and NLVR2 accuracy and consistency.

VQA: the answers' scores in the shards are the official evaluation's own average (see `data.building.answers`), so that
their mean is VQA accuracy. An answer that annotators gave and the list lacks is never predicted and counts as an error.

NLVR2 shows each sentence with up to four pairs of images, named split-set-pair-sentence; a sentence is understood
consistently if it is judged correctly with every pair (arXiv 1811.00491, section 5).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from pipeline.data.contents.choices import Choices
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.retrieval import eval_mode


@dataclass(frozen=True)
class VQAResult:
    questions: int
    accuracy: float
    accuracy_without_model: float  # of the one answer with the highest total score, given to every question


@dataclass(frozen=True)
class NLVR2Result:
    statements: int
    accuracy: float
    accuracy_without_model: float  # of the more frequent label
    consistency: float | None  # fraction of sentences always judged correctly; None where ids do not name sentences


def evaluate_vqa(model: nn.Module, source: LabelledEvalSet, choices: Choices) -> VQAResult:
    """Evaluate the whole source. Raises DataError as its `map_ranks`."""

    def read() -> tuple[list[float], list[dict[str, float]]]:
        """Return the score of each predicted answer, and every question's scored answers."""
        scores: list[float] = []
        answers: list[dict[str, float]] = []
        with eval_mode(model) as device:
            for batch, questions in source.batches(device, "answers"):
                best = model({"only": batch})["only"]["answers"].argmax(dim=1).tolist()
                answers += [dict(question.answers) for question in questions]
                scores += [q.answers.get(choices.names[b], 0.0) for q, b in zip(questions, best, strict=False)]
        return scores, answers

    parts = source.map_ranks(read)
    scores = [score for own, _ in parts for score in own]
    totals = Counter[str]()
    for answers in itertools.chain(*(own for _, own in parts)):
        totals.update(answers)
    # fsum rounds once, so that the result does not depend on how ranks share the questions.
    return VQAResult(len(scores), math.fsum(scores) / len(scores), max(totals.values()) / len(scores))


def evaluate_nlvr2(model: nn.Module, source: LabelledEvalSet) -> NLVR2Result:
    """Evaluate the whole source. Raises DataError as its `map_ranks`."""

    def read() -> list[tuple[str, bool, bool]]:
        """Return each statement's id, its label, and whether the prediction is correct."""
        results: list[tuple[str, bool, bool]] = []
        with eval_mode(model) as device:
            for batch, statements in source.batches(device, "nlvr2"):
                predicted = model({"only": batch})["only"]["nlvr2"].argmax(dim=1).bool().tolist()
                results += [(s.id, s.is_true, s.is_true == p) for s, p in zip(statements, predicted, strict=False)]
        return results

    ids, labels, correct = (list(column) for column in zip(*itertools.chain(*source.map_ranks(read)), strict=True))
    count = len(correct)
    return NLVR2Result(count, sum(correct) / count, max(Counter(labels).values()) / count, consistency(ids, correct))


def consistency(ids: list[str], correct: list[bool]) -> float | None:
    """Return the fraction of sentences judged correctly throughout; None unless ids are split-set-pair-sentence."""
    parts = [name.split("-") for name in ids]
    if any(len(names) != 4 for names in parts):
        return None
    sentences: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for (split, number, _, sentence), is_correct in zip(parts, correct, strict=True):
        sentences[split, number, sentence].append(is_correct)
    return sum(map(all, sentences.values())) / len(sentences)
