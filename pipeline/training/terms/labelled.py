"""What people have labelled: a picture's class, the answers to a question, the truth of a statement.

Shapes: n rows.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives.answering import answering_loss
from pipeline.objectives.classification import classification_loss
from pipeline.objectives.reasoning import reasoning_loss
from pipeline.training.terms.term import Term, present


class Classification(Term):
    """The class of each picture."""

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        keeps = self.setting.keeps(rows, "labelled")
        return {"labelled": ForwardInput(heads=("classes",), image=present(rows.image), drop_path_mask=keeps)}

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return classification_loss(outputs["labelled"]["classes"], present(rows.label))


class Answering(Term):
    """Questions about a picture, with soft targets."""

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        return {"question": self.fused(rows, "question", "answers")}

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return answering_loss(outputs["question"]["answers"], present(rows.answers), present(rows.answer_scores))


class Reasoning(Term):
    """Statements about two pictures, each read with the statement."""

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        first = self.fused(rows, "statement", "nlvr2")
        both = replace(first, second_image=rows.second_image, second_image_size=rows.second_image_size)
        return {"statement": both}

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return reasoning_loss(outputs["statement"]["nlvr2"], present(rows.label))
