"""Visual question answering (VQA) with soft targets over a fixed list of answers.

Shapes: n examples, A listed answers, K annotated answers per question (padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import HeadConfig
from pipeline.objectives import Objective, register, require


def vqa_loss(logits: Tensor, answers: Tensor, scores: Tensor) -> Tensor:
    """Return the binary cross-entropy summed over examples and all listed answers, as ViLT and VLMo fine-tune.

    logits (n, A); answers (n, K) int64 indices into the list, -1 at padding; scores (n, K) in [0, 1].
    """
    targets = soft_targets(answers, scores, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")


def soft_targets(answers: Tensor, scores: Tensor, num_answers: int) -> Tensor:
    """Return the target of each listed answer, (n, A) float32; 0 for answers that no annotator gave."""
    targets = scores.new_zeros(len(answers), num_answers)
    return targets.scatter_add(1, answers.clamp(min=0), scores.where(answers >= 0, scores.new_zeros(())))


@register
class VQA(Objective):
    source_types = frozenset({"questions"})
    head = "answers"
    evaluations: ClassVar = {"questions": "vqa"}

    @classmethod
    def batch_groups(cls, source_type: SourceType, stage: StageConfig, model: TransformerConfig) -> frozenset[str]:
        return frozenset({"image", "text", "answers"})

    @classmethod
    def head_config(cls, heads: HeadConfig, stage: StageConfig) -> HeadConfig:
        return replace(heads, answers=stage.num_answers)

    @classmethod
    def faults(cls, config: RunConfig, stage: StageConfig) -> Iterator[str]:
        if stage.num_answers is None:
            yield "num_answers: required by the vqa objective; set the number of answers"

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        return {"question": self.fusion_forward(examples, "question", "answers")}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        return vqa_loss(outputs["question"]["answers"], require(examples.answers), require(examples.answer_scores))
