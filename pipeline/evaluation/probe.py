"""What frozen picture features are worth to a linear classifier (the linear probe).

Features are the last layer's: [CLS] beside the mean of the patches, because masked-image training leaves [CLS]
untrained and contrastive training the patches. They are brought to mean 0 and deviation 1 over the training pictures;
multinomial logistic regression is fitted to them by L-BFGS, all at once, from zero: nothing is drawn, and ranks that
share the reading find the same. How strongly weights are drawn to zero is chosen on every fifth training picture, held
back; the classifier is then fitted to all.

Shapes: N pictures, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.classification import classified, places_of
from pipeline.evaluation.retrieval import reading

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of half the squared weights, beside the mean loss of a picture
HELD_BACK = 5  # every so many pictures, while the penalty is chosen
ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    pictures: int
    trained_on: int  # pictures
    penalty: float
    top1: float
    top5: float
    chance: float


def measure_probe(model: nn.Module, training: AnnotatedSource, held_out: AnnotatedSource) -> Probe:
    """Fits on one labelled source and measures on another. Raises DataError as their `shared`."""
    with reading(model) as device:
        x, y = (tensor.to(device) for tensor in features_of(model, training))
        test_x, test_y = (tensor.to(device) for tensor in features_of(model, held_out))
    with torch.no_grad():
        mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
        x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    classes = 1 + int(torch.cat([y, test_y]).max())
    penalty = _penalty(x, y, classes)
    weight, bias = fit(x, y, classes, penalty)
    found = classified([places_of([(test_x @ weight + bias, test_y.tolist())])])
    return Probe(found.pictures, len(x), penalty, found.top1, found.top5, found.chance)


def features_of(model: nn.Module, source: AnnotatedSource) -> tuple[Tensor, Tensor]:
    """(N, D) float64 and the labels (N,) int64 of a whole source, in its order."""

    def read() -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        labels: list[int] = []
        with reading(model) as device:
            for one, said in source.batches(device, "tokens"):
                if one.image_size is not None:
                    raise ConfigError("the linear probe reads pictures of one shape, and this model keeps each its own")
                tokens = model({"only": one})["only"]["tokens"][: len(said)].float()
                features.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).cpu())
                labels += said
        return torch.cat(features), torch.tensor(labels, dtype=torch.int64)

    parts = source.shared(read)
    return torch.cat([x for x, _ in parts]).double(), torch.cat([y for _, y in parts])


def _penalty(x: Tensor, y: Tensor, classes: int) -> float:
    """The one whose classifier loses least on the pictures held back; of few pictures the middle one."""
    back = torch.arange(len(x), device=x.device) % HELD_BACK == HELD_BACK - 1
    if int(back.sum()) < classes:
        return PENALTIES[len(PENALTIES) // 2]
    losses = {}
    for penalty in PENALTIES:
        weight, bias = fit(x[~back], y[~back], classes, penalty)
        losses[penalty] = F.cross_entropy(x[back] @ weight + bias, y[back]).item()
    return min(losses, key=losses.__getitem__)


@torch.enable_grad()
def fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and biases (C,) of the least mean cross-entropy + penalty / 2 · ‖weights‖²."""
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)
    return weight.detach(), bias.detach()
