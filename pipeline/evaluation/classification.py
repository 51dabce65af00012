"""How well pictures are told by class: top-1 and top-5 accuracy on whole pictures (ViT's is on their centre)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.retrieval import reading


@dataclass(frozen=True)
class Classification:
    pictures: int
    top1: float
    top5: float
    chance: float  # of the first guess


def measure_classification(model: nn.Module, source: AnnotatedSource) -> Classification:
    """Reads the whole source. Raises DataError as its `batches`."""
    top1 = top5 = count = classes = 0
    with reading(model) as device:
        for one, labels in source.batches(device, "classes"):
            logits = model({"only": one})["only"]["classes"].cpu()
            classes = logits.shape[1]
            hits = logits.topk(min(5, classes), dim=1).indices == torch.tensor(labels)[:, None]
            top1, top5, count = top1 + int(hits[:, 0].sum()), top5 + int(hits.sum()), count + len(labels)
    return Classification(count, top1 / count, top5 / count, 1 / classes)
