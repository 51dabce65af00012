"""Visual question answering (VQA) with soft targets over a fixed list of answers."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives import Objective


def vqa_loss(logits: Tensor, answers: Tensor, scores: Tensor) -> Tensor:
    """Return the binary cross-entropy summed over n examples and all A listed answers, as ViLT and VLMo fine-tune.

    logits (n, A); answers (n, K) int64 indices into the list, -1 at padding; scores (n, K) in [0, 1].
    """
    listed = scores.where(answers >= 0, scores.new_zeros(()))
    targets = scores.new_zeros(logits.shape).scatter_add(1, answers.clamp(min=0), listed)
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")


class VQA(Objective):
    source_types = frozenset({"questions"})
    head = "answers"
    evaluations: ClassVar = {"questions": "vqa"}
    fields = frozenset({"answers"})
    required: ClassVar = {"num_answers": "the number of answers"}
    head_options = staticmethod(lambda stage: {"answers": stage.num_answers})
    forward_name = "question"
    loss_function, targets = staticmethod(vqa_loss), ("answers", "answer_scores")
