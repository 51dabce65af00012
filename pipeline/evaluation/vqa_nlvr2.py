"""How well questions about pictures are answered (VQA): the mean of what people's answers make each answer worth.

The answers' scores in the shards are the official evaluation's own average (see `data.answers`), so this is VQA
accuracy; an answer that people gave and the list lacks can never be chosen, and counts against the model.
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
    accuracy_without_model: float  # of giving the one answer that is worth most over all the questions


def evaluate_vqa(model: nn.Module, source: LabelledEvalSet, choices: Choices) -> VQAResult:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> tuple[list[float], list[dict[str, float]]]:
        """What each question's given answer is worth, and every answer to it."""
        scores: list[float] = []
        answers: list[dict[str, float]] = []
        with eval_mode(model) as device:
            for one, questions in source.batches(device, "answers"):
                best = model({"only": one})["only"]["answers"].argmax(dim=1).tolist()
                answers += [dict(question.answers) for question in questions]
                scores += [q.answers.get(choices.names[b], 0.0) for q, b in zip(questions, best, strict=False)]
        return scores, answers

    parts = source.shared(read)
    scores = [score for own, _ in parts for score in own]
    worth = Counter[str]()
    for answers in (each for _, own in parts for each in own):
        worth.update(answers)
    # fsum rounds once: who read which question then changes nothing
    return VQAResult(len(scores), math.fsum(scores) / len(scores), max(worth.values()) / len(scores))


@dataclass(frozen=True)
class NLVR2Result:
    statements: int
    accuracy: float
    accuracy_without_model: float  # of the more frequent label
    consistency: float | None  # share of sentences judged rightly throughout; None where ids do not name sentences


def evaluate_nlvr2(model: nn.Module, source: LabelledEvalSet) -> NLVR2Result:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> list[tuple[str, bool, bool]]:
        """Each statement's id, its truth, and whether it was judged rightly."""
        found: list[tuple[str, bool, bool]] = []
        with eval_mode(model) as device:
            for one, statements in source.batches(device, "nlvr2"):
                judged = model({"only": one})["only"]["nlvr2"].argmax(dim=1).bool().tolist()
                found += [(s.id, s.is_true, s.is_true == said) for s, said in zip(statements, judged, strict=False)]
        return found

    ids, labels, right = (list(each) for each in zip(*itertools.chain(*source.shared(read)), strict=True))
    count = len(right)
    return NLVR2Result(count, sum(right) / count, max(Counter(labels).values()) / count, consistency(ids, right))


def consistency(ids: list[str], right: list[bool]) -> float | None:
    """The share of sentences all of whose judgements are right; None unless every id is split-set-pair-sentence."""
    parts = [each.split("-") for each in ids]
    if any(len(each) != 4 for each in parts):
        return None
    sentences: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for (split, number, _, sentence), is_right in zip(parts, right, strict=True):
        sentences[split, number, sentence].append(is_right)
    return sum(all(each) for each in sentences.values()) / len(sentences)
