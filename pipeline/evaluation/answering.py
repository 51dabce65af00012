"""How well questions about pictures are answered (VQA): the mean of what people's answers make each answer worth.

The answers' scores in the shards are the official evaluation's own average (see `data.answers`), so this is VQA
accuracy; an answer that people gave and the list lacks can never be chosen, and counts against the model.
"""

from __future__ import annotations

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
    """Reads the whole source. Raises DataError as its `batches`."""
    total, asked, worth = 0.0, 0, Counter[str]()
    with reading(model) as device:
        for one, questions in source.batches(device, "answers"):
            best = model({"only": one})["only"]["answers"].argmax(dim=1).tolist()
            total += sum(
                question.answers.get(choices.names[b], 0.0) for question, b in zip(questions, best, strict=True)
            )
            asked += len(questions)
            for question in questions:
                worth.update(question.answers)
    return Answering(asked, total / asked, max(worth.values()) / asked)
