"""How well pictures are told by class: top-1 and top-5 accuracy on whole pictures (ViT's is on their centre)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.retrieval import reading


@dataclass(frozen=True)
class Classification:
    pictures: int
    top1: float
    top5: float
    chance: float  # of the first guess


def measure_classification(model: nn.Module, source: AnnotatedSource) -> Classification:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> tuple[list[int], int]:
        with reading(model) as device:
            logits = (
                (model({"only": one})["only"]["classes"], said) for one, said in source.batches(device, "classes")
            )
            return places_of(logits)

    return classified(source.shared(read))


def places_of(batches: Iterable[tuple[Tensor, list[int]]]) -> tuple[list[int], int]:
    """Of each labelled picture the place, from 1, of its class, and the number of classes.

    A batch is the logits (B, classes) and the labels of its first pictures. Of equal logits the right one stands last.
    """
    places: list[int] = []
    classes = 0
    for logits, labels in batches:
        classes = logits.shape[1]
        own = logits[: len(labels)].float().cpu()
        right = own.gather(1, torch.tensor(labels, dtype=torch.int64)[:, None])
        places += (~(own < right)).sum(dim=1).tolist()  # what is no number stands before every right one
    return places, classes


def classified(parts: Sequence[tuple[list[int], int]]) -> Classification:
    """From every rank's places."""
    places = [place for own, _ in parts for place in own]
    top1, top5 = (sum(place <= k for place in places) / len(places) for k in (1, 5))
    return Classification(len(places), top1, top5, 1 / parts[0][1])
