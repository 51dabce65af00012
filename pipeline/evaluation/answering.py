"""How well questions about pictures are answered (VQA): the mean of what people's answers make each answer worth.

The answers' scores in the shards are the official evaluation's own average (see `data.answers`), so this is VQA
accuracy; an answer that people gave and the list lacks can never be chosen, and counts against the model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from pipeline.data.contents.choices import Choices
from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.retrieval import reading


@dataclass(frozen=True)
class Answering:
    questions: int
    accuracy: float
    accuracy_without_model: float  # of giving the one answer that is worth most over all the questions


def measure_answering(model: nn.Module, source: AnnotatedSource, choices: Choices) -> Answering:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> tuple[list[float], list[dict[str, float]]]:
        """What each question's given answer is worth, and every answer to it."""
        scores: list[float] = []
        answers: list[dict[str, float]] = []
        with reading(model) as device:
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
    return Answering(len(scores), math.fsum(scores) / len(scores), max(worth.values()) / len(scores))
