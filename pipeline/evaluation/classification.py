"""Image classification: with a trained head, zero-shot by class names, and with a linear probe on frozen features.

Accuracy is top-1 and top-5 on whole images (ViT's published figures use the centre crop).

Zero-shot: a class is the normalised mean of its prompts' vectors (CLIP, arXiv 2103.00020, section 3.1.4), and an image
belongs to the nearest class.

Linear probe: features are the last layer's [CLS] concatenated with the mean of the patches, because masked-image
training leaves [CLS] untrained and contrastive training the patches. They are standardised over the training images,
and multinomial logistic regression is fitted by full-batch L-BFGS from zero, so that nothing is random and the number
of ranks does not matter. The penalty is chosen on every fifth training image, and the final classifier uses all of
them.

Shapes: N images, C classes, T prompts, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of half the squared weights, added to the mean loss per image
VALIDATION_STRIDE = 5  # every fifth training image validates the choice of the penalty
ITERATIONS = 200


@dataclass(frozen=True)
class ClassificationResult:
    images: int
    top1: float
    top5: float
    chance: float  # of the first guess


@dataclass(frozen=True)
class LinearProbeResult:
    images: int
    trained_on: int  # images
    penalty: float
    top1: float
    top5: float
    chance: float


def evaluate_classification(model: nn.Module, source: LabelledEvalSet) -> ClassificationResult:
    """Evaluate the trained head on the whole source. Raises DataError as its `map_ranks`."""

    def read() -> tuple[list[int], int]:
        with eval_mode(model) as device:
            batches = source.batches(device, "classes")
            return class_ranks((model({"only": batch})["only"]["classes"], labels) for batch, labels in batches)

    return classification_result(source.map_ranks(read))


def class_ranks(batches: Iterable[tuple[Tensor, list[int]]]) -> tuple[list[int], int]:
    """Return the rank, from 1, of each image's label among the classes, and the number of classes.

    A batch is the logits (B, C) and the labels of its first images. Among equal logits the label ranks last, and NaN
    ranks before every label.
    """
    ranks: list[int] = []
    classes = 0
    for logits, labels in batches:
        classes = logits.shape[1]
        own = logits[: len(labels)].float().cpu()
        label_logit = own.gather(1, torch.tensor(labels, dtype=torch.int64)[:, None])
        ranks += (~(own < label_logit)).sum(dim=1).tolist()
    return ranks, classes


def classification_result(parts: Sequence[tuple[list[int], int]]) -> ClassificationResult:
    """Combine the ranks' results of `class_ranks`."""
    ranks = [rank for own, _ in parts for rank in own]
    top1, top5 = (sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5))
    return ClassificationResult(len(ranks), top1, top5, 1 / parts[0][1])


def class_names(config: RunConfig, source: str, storage: Storage) -> tuple[str, ...]:
    """Return the class names of a labelled source in label order. Raises ConfigError where its shards list none."""
    url = join(shard_folder(config.sources[source].shards), CLASSES)
    try:
        return Choices.from_bytes(storage.read(url), url).names
    except NotFound as error:
        raise ConfigError(
            f"source '{source}' is labelled, and {url} with its class names is missing; write it: a JSON list of names "
            "in label order, as `mome shards build` does for folders of classes"
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
    """Return unit vectors (C, D) of the classes; each prompt has {} in the place of the name."""
    texts = [prompt.replace("{}", name.replace("_", " ")) for name in names for prompt in prompts]
    token_ids = [tokens.ids for tokens in tokenizer.encode_batch(texts, max_text_length)]
    vectors = embed_texts(model, token_ids, tokenizer.pad_id, batch, ranks)
    return F.normalize(vectors.unflatten(0, (len(names), len(prompts))).mean(dim=1), dim=1)


def evaluate_zero_shot(model: nn.Module, source: LabelledEvalSet, classes: Tensor) -> ClassificationResult:
    """Classify the whole source by its class vectors (C, D).

    Raises DataError as its `map_ranks`, and for a label without a class.
    """

    def read() -> tuple[list[int], int]:
        with eval_mode(model) as device:
            return class_ranks(
                (contrastive_features(model, batch) @ classes.T, check(labels))
                for batch, labels in source.batches(device, "itc")
            )

    def check(labels: list[int]) -> list[int]:
        if max(labels, default=0) >= len(classes):
            raise DataError(f"an image has label {max(labels)}, and there are {len(classes)} class names, from 0")
        return labels

    return classification_result(source.map_ranks(read))


def evaluate_linear_probe(model: nn.Module, training: LabelledEvalSet, held_out: LabelledEvalSet) -> LinearProbeResult:
    """Fit on one labelled source and evaluate on another. Raises DataError as their `map_ranks`."""
    with eval_mode(model) as device:
        x, y = (tensor.to(device) for tensor in probe_features(model, training))
        test_x, test_y = (tensor.to(device) for tensor in probe_features(model, held_out))
    with torch.no_grad():
        mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
        x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    classes = 1 + int(torch.cat([y, test_y]).max())
    penalty = _choose_penalty(x, y, classes)
    weight, bias = fit_linear_probe(x, y, classes, penalty)
    result = classification_result([class_ranks([(test_x @ weight + bias, test_y.tolist())])])
    return LinearProbeResult(result.images, len(x), penalty, result.top1, result.top5, result.chance)


def probe_features(model: nn.Module, source: LabelledEvalSet) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) float64 and labels (N,) int64 of a whole source, in its order."""

    def read() -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        all_labels: list[int] = []
        with eval_mode(model) as device:
            for batch, labels in source.batches(device, "tokens"):
                if batch.image_size is not None:
                    raise ConfigError("the linear probe needs images of one shape, and this model keeps each one's own")
                tokens = model({"only": batch})["only"]["tokens"][: len(labels)].float()
                features.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).cpu())
                all_labels += labels
        return torch.cat(features), torch.tensor(all_labels, dtype=torch.int64)

    parts = source.map_ranks(read)
    return torch.cat([x for x, _ in parts]).double(), torch.cat([y for _, y in parts])


def _choose_penalty(x: Tensor, y: Tensor, classes: int) -> float:
    """Return the penalty with the lowest loss on the validation images; the middle one for few images."""
    validation = torch.arange(len(x), device=x.device) % VALIDATION_STRIDE == VALIDATION_STRIDE - 1
    if int(validation.sum()) < classes:
        return PENALTIES[len(PENALTIES) // 2]
    losses = {}
    for penalty in PENALTIES:
        weight, bias = fit_linear_probe(x[~validation], y[~validation], classes, penalty)
        losses[penalty] = F.cross_entropy(x[validation] @ weight + bias, y[validation]).item()
    return min(losses, key=losses.__getitem__)


@torch.enable_grad()
def fit_linear_probe(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weights (D, C) and biases (C,) that minimise mean cross-entropy + penalty / 2 · ‖weights‖²."""
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
