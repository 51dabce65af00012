"""How well pictures are told by class: top-1 and top-5 accuracy on whole pictures (ViT's is on their centre)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import shard_folder
from pipeline.data.storage import NotFound, Storage, join
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.retrieval import contrastive_features, embed_texts, eval_mode
from pipeline.models.forward import ForwardInput


@dataclass(frozen=True)
class ClassificationResult:
    pictures: int
    top1: float
    top5: float
    chance: float  # of the first guess


def evaluate_classification(model: nn.Module, source: LabelledEvalSet) -> ClassificationResult:
    """Reads the whole source. Raises DataError as its `shared`."""

    def read() -> tuple[list[int], int]:
        with eval_mode(model) as device:
            logits = (
                (model({"only": one})["only"]["classes"], said) for one, said in source.batches(device, "classes")
            )
            return class_ranks(logits)

    return classification_result(source.shared(read))


def class_ranks(batches: Iterable[tuple[Tensor, list[int]]]) -> tuple[list[int], int]:
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


def classification_result(parts: Sequence[tuple[list[int], int]]) -> ClassificationResult:
    """From every rank's places."""
    places = [place for own, _ in parts for place in own]
    top1, top5 = (sum(place <= k for place in places) / len(places) for k in (1, 5))
    return ClassificationResult(len(places), top1, top5, 1 / parts[0][1])


def class_names(config: RunConfig, source: str, storage: Storage) -> tuple[str, ...]:
    """The names of a labelled source's classes, by their numbers; ConfigError where nothing beside it lists them."""
    url = join(shard_folder(config.sources[source].shards), CLASSES)
    try:
        return Choices.from_bytes(storage.read(url), url).names
    except NotFound as error:
        raise ConfigError(
            f"source '{source}' is labelled, and there is no {url} to name its classes; write it: a JSON list of names "
            "in the order of the labels, as mome shards build does for folders of classes"
        ) from error


def class_vectors(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    prompts: Sequence[str],
    max_text_length: int,
    batch: int = 64,
    ranks: Ranks = SINGLE_PROCESS,
) -> Tensor:
    """(C, D) unit vectors; each prompt holds {} in the place of the name."""
    texts = [prompt.replace("{}", name.replace("_", " ")) for name in names for prompt in prompts]
    rows = [each.ids for each in tokenizer.encode_batch(texts, max_text_length)]
    vectors = embed_texts(model, rows, tokenizer.pad_id, batch, ranks)
    return F.normalize(vectors.unflatten(0, (len(names), len(prompts))).mean(dim=1), dim=1)


def evaluate_zero_shot(model: nn.Module, source: LabelledEvalSet, classes: Tensor) -> ClassificationResult:
    """Reads the whole source against the vectors (C, D) of its classes.

    Raises DataError as its `shared`, and for a label that no class has.
    """

    def read() -> tuple[list[int], int]:
        with eval_mode(model) as device:
            return class_ranks(
                (contrastive_features(model, one) @ classes.T, known(said)) for one, said in batches(device)
            )

    def batches(device: torch.device) -> Iterator[tuple[ForwardInput, list[int]]]:
        return source.batches(device, "itc")

    def known(labels: list[int]) -> list[int]:
        if max(labels, default=0) >= len(classes):
            raise DataError(f"a picture is of class {max(labels)}, and {len(classes)} are named, from 0")
        return labels

    return classification_result(source.shared(read))


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of half the squared weights, beside the mean loss of a picture
HELD_BACK = 5  # every so many pictures, while the penalty is chosen
ITERATIONS = 200


@dataclass(frozen=True)
class LinearProbeResult:
    pictures: int
    trained_on: int  # pictures
    penalty: float
    top1: float
    top5: float
    chance: float


def evaluate_linear_probe(model: nn.Module, training: LabelledEvalSet, held_out: LabelledEvalSet) -> LinearProbeResult:
    """Fits on one labelled source and measures on another. Raises DataError as their `shared`."""
    with eval_mode(model) as device:
        x, y = (tensor.to(device) for tensor in features_of(model, training))
        test_x, test_y = (tensor.to(device) for tensor in features_of(model, held_out))
    with torch.no_grad():
        mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
        x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    classes = 1 + int(torch.cat([y, test_y]).max())
    penalty = _penalty(x, y, classes)
    weight, bias = fit_linear_probe(x, y, classes, penalty)
    found = classification_result([class_ranks([(test_x @ weight + bias, test_y.tolist())])])
    return LinearProbeResult(found.pictures, len(x), penalty, found.top1, found.top5, found.chance)


def features_of(model: nn.Module, source: LabelledEvalSet) -> tuple[Tensor, Tensor]:
    """(N, D) float64 and the labels (N,) int64 of a whole source, in its order."""

    def read() -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        labels: list[int] = []
        with eval_mode(model) as device:
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
        weight, bias = fit_linear_probe(x[~back], y[~back], classes, penalty)
        losses[penalty] = F.cross_entropy(x[back] @ weight + bias, y[back]).item()
    return min(losses, key=losses.__getitem__)


@torch.enable_grad()
def fit_linear_probe(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
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
