"""Evaluation on annotated sources: image classification, VQA and NLVR2.

Classification accuracy is top-1 and top-5 on whole images (ViT's published figures use the centre crop).

Shapes: N images, B examples of a batch, C classes, D features. Every `evaluate_…` evaluates its whole source and raises
DataError as `LabelledEvalSet.map_batches`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, prompt_ensembles
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.shards.manifest import parse_pattern
from pipeline.data.storage import NotFound, Storage, join
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.retrieval import Predictor, contrastive_features, run_forward
from pipeline.models.forward import ForwardInput, Head

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of half the squared weights, added to the mean loss per image
VALIDATION_STRIDE = 5  # every fifth training image validates the choice of the penalty
ITERATIONS = 200
Section = dict[str, Any]  # of the JSON of an evaluation


def evaluate_classification(model: nn.Module, source: LabelledEvalSet, class_vectors: Tensor | None = None) -> Section:
    """Evaluate the trained head, or zero-shot by class vectors (C, D); raise DataError for a label without one."""

    def classify(batch: ForwardInput, labels: list[int]) -> list[tuple[int, int]]:
        """Return the rank of each label and the number of classes."""
        if class_vectors is None:
            logits = run_forward(model, batch)["classes"]
        else:  # before a label is rejected: at ZeRO 3 every rank takes part in the forward
            logits, known = contrastive_features(model, batch) @ class_vectors.T, len(class_vectors)
            if max(labels, default=0) >= known:
                raise DataError(f"an image has label {max(labels)}, and there are {known} class names, from 0")
        return [(rank, logits.shape[1]) for rank in label_ranks(logits, labels)]

    ranks, counts = zip(*source.map_batches("classes" if class_vectors is None else "itc", classify), strict=True)
    return _accuracies(ranks, counts[0])


def _accuracies(ranks: Sequence[int], classes: int) -> Section:
    top1, top5 = (sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5))
    return {"images": len(ranks), "top1": top1, "top5": top5, "chance": 1 / classes}


def label_ranks(logits: Tensor, labels: list[int]) -> list[int]:
    """Return the ranks from 1 of the first images' labels, from logits (B, C); equal logits and NaN rank before."""
    own = logits[: len(labels)].float().cpu()
    label_logit = own.gather(1, torch.tensor(labels, dtype=torch.int64)[:, None])
    ranks: list[int] = (~(own < label_logit)).sum(dim=1).tolist()
    return ranks


def class_names(config: RunConfig, source: str, storage: Storage) -> tuple[str, ...]:
    """Return the class names of a labelled source in label order. Raises ConfigError where its shards list none."""
    url = join(parse_pattern(config.sources[source].shards).folder, CLASSES)
    try:
        return Choices.from_bytes(storage.read(url), url)
    except NotFound as error:
        raise ConfigError(
            f"source '{source}' is labelled, and {url} with its class names is missing; write it: a JSON list of names "
            "in label order, as `mome shards build` does for folders of classes"
        ) from error


def embed_classes(predictor: Predictor, names: Sequence[str], prompts: Sequence[str], max_text_length: int) -> Tensor:
    """Return unit vectors (C, D), means over prompts with names for {} (CLIP, arXiv 2103.00020, section 3.1.4).

    A prompt without {} is the name of an ensemble of prompts.
    """
    templates = [template for prompt in prompts for template in prompt_ensembles().get(prompt, [prompt])]
    texts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    vectors = predictor.embed_texts([t.ids for t in predictor.tokenizer.encode_batch(texts, max_text_length)])
    return F.normalize(vectors.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=1)


def evaluate_linear_probe(model: nn.Module, training: LabelledEvalSet, held_out: LabelledEvalSet) -> Section:
    """Fit on one labelled source and evaluate on another; `trained_on` is a number of images.

    Features are the last layer's [CLS] with the mean of the patches, because masked-image training leaves [CLS]
    untrained and contrastive training the patches; they are standardised over the training images. Logistic regression
    by full-batch L-BFGS from zero makes nothing random. The penalty is chosen on every fifth training image.
    """
    device = next(model.parameters()).device

    def features(batch: ForwardInput, labels: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return features (B, D) and labels (B,)."""
        if batch.image_size is not None:
            raise ConfigError("the linear probe needs images of one shape, and this model keeps each one's own")
        tokens = run_forward(model, batch)["tokens"][: len(labels)].float()
        return [(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).cpu(), torch.tensor(labels).long())]

    (x, y), (test_x, test_y) = (
        [torch.cat(parts).to(device) for parts in zip(*source.map_batches("tokens", features), strict=True)]
        for source in (training, held_out)
    )
    x, test_x = x.double(), test_x.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    classes = 1 + int(torch.cat([y, test_y]).max())
    validation = torch.arange(len(x), device=device) % VALIDATION_STRIDE == VALIDATION_STRIDE - 1
    penalty = PENALTIES[len(PENALTIES) // 2]  # for too few images to choose
    if int(validation.sum()) >= classes:
        losses = {}
        for candidate in PENALTIES:
            weight, bias = fit_linear_probe(x[~validation], y[~validation], classes, candidate)
            losses[candidate] = F.cross_entropy(x[validation] @ weight + bias, y[validation]).item()
        penalty = min(losses, key=losses.__getitem__)
    weight, bias = fit_linear_probe(x, y, classes, penalty)
    ranks = label_ranks(test_x @ weight + bias, test_y.tolist())
    return _accuracies(ranks, classes) | {"trained_on": len(x), "penalty": penalty}


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


def evaluate_vqa(model: nn.Module, source: LabelledEvalSet, choices: Choices) -> Section:
    """Evaluate the answers head, whose outputs are named by `choices`; answers that the list lacks count as errors.

    The scores in the shards are the official evaluation's average (see `data.building.answers`): their mean is VQA
    accuracy. `accuracy_without_model` is that of the answer with the highest total score, given to every question.
    """
    scores, totals = [], Counter[str]()
    for best, question in _predict(model, source, "answers"):
        answers = dict(question.answers)
        totals.update(answers)
        scores.append(answers.get(choices[best], 0.0))
    # fsum rounds once, so that the result does not depend on how ranks share the questions.
    accuracy, count = math.fsum(scores) / len(scores), len(scores)
    return {"questions": count, "accuracy": accuracy, "accuracy_without_model": max(totals.values()) / count}


def evaluate_nlvr2(model: nn.Module, source: LabelledEvalSet) -> Section:
    """Evaluate the nlvr2 head. `accuracy_without_model` is that of the more frequent label.

    `consistency` is the fraction of sentences judged correctly with all of their pairs of images (arXiv 1811.00491,
    section 5); None unless ids are split-set-pair-sentence.
    """
    correct, labels, sentences = [], Counter[int](), defaultdict[tuple[str, ...], list[bool]](list)
    for best, statement in _predict(model, source, "nlvr2"):
        correct.append(statement.label == best)
        labels[statement.label] += 1
        sentences[tuple(part for n, part in enumerate(statement.id.split("-")) if n != 2)].append(correct[-1])
    count, is_named = len(correct), all(len(sentence) == 3 for sentence in sentences)
    return {
        "statements": count,
        "accuracy": sum(correct) / count,
        "accuracy_without_model": max(labels.values()) / count,
        "consistency": sum(map(all, sentences.values())) / len(sentences) if is_named else None,
    }


def _predict(model: nn.Module, source: LabelledEvalSet, head: Head) -> list[tuple[int, Any]]:
    """Return the best output of a head for each example, with the annotation."""
    return source.map_batches(
        head, lambda batch, labels: zip(run_forward(model, batch)[head].argmax(dim=1).tolist(), labels, strict=False)
    )
