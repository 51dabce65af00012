"""Evaluate a stage's weights on a held-out source, for every objective that the stage trained.

Earlier stages add what only they trained: the language stage its accuracy from text, the vision stage its
reconstructions. Evaluation always uses a stage's last weights and selects no model on test data. A source that a stage
trained on can be evaluated, and the result says so (`trained_on`).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import Choices, answers_with, choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation import labelled, masked, retrieval
from pipeline.evaluation.datasets import EvalPairs, LabelledEvalSet, load_pairs
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.retrieval import BothDirections, FusedHead, Predictor, Ranked, Recall
from pipeline.objectives import evaluation_tasks

COLLAPSED = 0.05  # a matching head with at most this accuracy on one class has learned only the class frequencies
RERANK_BEST = 10  # candidates of each query that the fusion encoder reranks …
RERANK_PAIRS = 12_000  # … fewer where that would be more pairs than this: each costs a forward of its own
SECTIONS = ("mlm", "itm", "reconstruction", "vqa", "nlvr2", "classification", "zero_shot", "linear_probe")


def is_collapsed(itm: Mapping[str, float]) -> bool:
    """Return True if the matching head, with these accuracies, gives nearly all pairs the same answer."""
    return min(itm["accuracy_matched"], itm["accuracy_mismatched"]) < COLLAPSED


@dataclass
class Evaluation:
    """Results on one source, and the tensors behind its report. A member is None where the stage did not train it."""

    source: str
    stage: str
    held_out: EvalPairs
    trained_on: tuple[str, ...] = ()  # stages that trained on the same shards: the results are then not held out
    rankings: BothDirections[Ranked] | None = None  # of all images and captions
    retrieval: BothDirections[Recall] | None = None
    retrieval_by: Literal["itc"] | FusedHead = "itc"  # head whose scores order the candidates
    retrieval_images: int = 0  # number of images that take part
    reranked: BothDirections[Recall] | None = None
    reranked_best: int = 0  # candidates per query
    mlm: masked.MaskedLanguage | None = None
    language_stages: dict[str, float] = field(default_factory=dict)  # accuracy of earlier stages from text alone
    reconstruction: masked.Reconstruction | None = None
    # The results other than retrieval, by section of the JSON.
    sections: dict[str, dict[str, Any] | None] = field(default_factory=lambda: dict.fromkeys(SECTIONS))
    checkpoint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mome evaluate --json`: fractions, null where something was not trained."""
        pairs = self.held_out
        values: dict[str, Any] = {
            "pairs": len(pairs), "captions": len(pairs.tokens), "skipped": sum(pairs.skipped.values()),
            "source": self.source, "source_digest": pairs.digest, "stage": self.stage,
        }  # fmt: skip
        for name, recalls, more in (
            ("retrieval", self.retrieval, {"by": self.retrieval_by, "images": self.retrieval_images}),
            ("reranked", self.reranked, {"best": self.reranked_best}),
        ):
            values[name] = recalls and {
                **{d: {k: round(v, 6) for k, v in own.values.items()} for d, own in recalls._asdict().items()},
                "chance": {k: round(max(own.chance[k] for own in recalls), 6) for k in recalls[0].chance},
                **more,
            }
        for name, results in self.sections.items():
            values[name] = results and {k: round(v, 6) if isinstance(v, float) else v for k, v in results.items()}
        return values | {"trained_on": list(self.trained_on), "checkpoint": self.checkpoint}

    def metrics(self) -> dict[str, float]:
        """Return the same results flat, as MLflow metrics: `eval/<source>/i2t_r1`, …"""
        metrics = {"pairs": float(len(self.held_out))}
        for prefix, recalls in (("", self.retrieval), ("reranked_", self.reranked)):
            for name, recall in zip(("i2t", "t2i"), recalls or (), strict=False):
                metrics |= {f"{prefix}{name}_{key}": value for key, value in recall.values.items()}
        for section, results in self.sections.items():
            metrics |= {f"{section}_{k}": round(v, 6) for k, v in (results or {}).items() if isinstance(v, float)}
        metrics |= {f"mlm_{name}_stage_text_only": accuracy for name, accuracy in self.language_stages.items()}
        return {f"eval/{self.source}/{name}": value for name, value in metrics.items()}


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    config: RunConfig,
    storage: Storage,
    source: str | None = None,
    limit: int | None = None,
    stage: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
    rerank_best: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
    choices: Mapping[str, Choices] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    held_out: EvalPairs | None = None,
    probe: str | None = None,
) -> Evaluation:
    """Evaluate `model`, the weights of stage `stage` (default: the last), on a source. Called on all ranks together.

    `source` and `limit` default to the config's. `others` are the models of other stages by name. `rerank_best` is the
    number of candidates per query that the fusion encoder reranks; 0 skips reranking. `progress` is called before each
    measure. `choices` are the answer and class lists saved with the weights (default: those that the config names).
    `held_out` are the source's pairs if they are loaded already, `probe` a labelled source to train a linear classifier
    on. Raises ConfigError and DataError as `load_pairs`, and ConfigError for a type that the stage did not train.
    """
    section, source = config.stage_named(stage), source or config.evaluation.source
    if source is None:
        raise ConfigError("evaluation.source: no held-out source is set; set it to one that no stage trains on")
    limit = limit or config.evaluation.max_images
    predictor = Predictor(model, tokenizer, config.evaluation.batch_size, ranks)
    source_type = config.sources[source].type if source in config.sources else "pairs"
    tasks, trained_on = evaluation_tasks(section, source_type), stages_trained_on(config, source)
    if source_type == "pairs":
        if probe is not None:
            raise ConfigError(f"a linear probe needs a labelled source, and '{source}' is not one")
        if held_out is None:
            progress("reading the held-out pairs")
            held_out = load_pairs(config, storage, source, limit, tokenizer, section.max_text_length, ranks)
        result = Evaluation(source, section.name, held_out, trained_on)
        _evaluate_pairs(result, predictor, config, rerank_best, progress)
        for name, other in (others or {}).items():  # what only earlier stages trained
            trained = config.stage_named(name)
            if "mlm" in trained.objectives and result.mlm is not None:
                progress(f"predicting masked words from text with the stage '{name}'")
                predicted = masked.predict_masked_tokens(replace(predictor, model=other), result.mlm.masked)
                result.mlm.predictions[f"{masked.TEXT_ONLY}, {name} stage"] = predicted
                result.language_stages[name] = predicted.accuracy
            if "mim" in trained.objectives and result.reconstruction is None:
                progress(f"filling in masked patches with the stage '{name}'")
                result.reconstruction = masked.reconstruct_images(other, held_out, trained, config)
        if (mlm := result.mlm) is not None:
            measured = {condition: predictions.accuracy for condition, predictions in mlm.predictions.items()}
            result.sections["mlm"] = {
                "accuracy": measured.get(masked.OWN),
                "accuracy_other_image": measured.get(masked.OTHER),
                "accuracy_text_only": measured[masked.TEXT_ONLY],
                "language_stage_text_only": next(reversed(result.language_stages.values()), None),
                "masked_tokens": len(mlm.predictions[masked.TEXT_ONLY].tokens),
            }
        if (patches := result.reconstruction) is not None:
            errors = {"error": patches.error, "error_without_model": patches.error_without_model}
            result.sections["reconstruction"] = errors | {"stage": patches.stage}
        return result

    if not tasks and not (source_type == "labelled" and probe):
        raise ConfigError(
            f"source '{source}' is of type {source_type}, and stage {section.name} trains no objective that is "
            f"evaluated on it (it trains {', '.join(section.objectives)}); give another source or stage"
        )
    dataset = LabelledEvalSet(config, storage, source, section, tokenizer, limit, ranks)
    result = Evaluation(source, section.name, EvalPairs({}, dataset.digest), trained_on)
    sections = result.sections
    if "vqa" in tasks:
        progress("answering questions")
        choices = choices_of(config, [section], storage) if choices is None else choices
        answers = answers_with(choices, section.num_answers, f"stage {section.name}")
        sections["vqa"] = labelled.evaluate_vqa(model, dataset, answers)
    if "nlvr2" in tasks:
        progress("judging statements")
        sections["nlvr2"] = labelled.evaluate_nlvr2(model, dataset)
    if "classification" in tasks:
        progress("classifying images")
        sections["classification"] = labelled.evaluate_classification(model, dataset)
    if "zero_shot" in tasks:
        progress("classifying images by class names")
        names = labelled.class_names(config, source, storage)
        vectors = labelled.embed_classes(predictor, names, config.evaluation.prompts, section.max_text_length)
        sections["zero_shot"] = labelled.evaluate_classification(model, dataset, vectors)
    if probe is not None:
        progress("training a linear classifier on frozen features")
        training = LabelledEvalSet(config, storage, probe, section, tokenizer, None, ranks)
        sections["linear_probe"] = labelled.evaluate_linear_probe(model, training, dataset)
    result.held_out.skipped.update(dataset.skipped)
    return result


def stages_trained_on(config: RunConfig, source: str) -> tuple[str, ...]:
    """Return the stages that train on a source's shards, under whatever name."""
    shards = {name: section.shards.rstrip("/") for name, section in config.sources.items()}
    own = shards.get(source)
    return tuple(stage.name for stage in config.stages if own in [shards[name] for name in stage.sources])


def _evaluate_pairs(
    result: Evaluation, predictor: Predictor, config: RunConfig, rerank_best: int | None, progress: Callable[[str], Any]
) -> None:
    """Add the results of every objective that the stage trained and that pairs evaluate."""
    held_out, stage, ranks = result.held_out, config.stage_named(result.stage), predictor.ranks
    captions, ids, tasks = held_out.caption_of, held_out.image_id, evaluation_tasks(stage, "pairs")
    needs_other = not tasks.isdisjoint(("matching", "mlm")) and len(ids.unique()) >= 2
    other_image = masked.mismatched_images(ids)[captions] if needs_other else None
    score = functools.partial(predictor.fusion_scores, held_out)

    if "retrieval" in tasks:
        progress("retrieving images by captions and captions by images")
        device = next(predictor.model.parameters()).device
        images = predictor.embed_images(held_out.images).to(device)
        texts = predictor.embed_texts([tokens.ids for tokens in held_out.tokens]).to(device)
        scores = retrieval.dot_products(images, texts), retrieval.dot_products(texts, images)
        ranked = retrieval.rankings(*scores, captions, ids, max(retrieval.KEPT, rerank_best or 0), ranks)
        result.rankings, result.retrieval_images = ranked, len(held_out)
        result.retrieval = retrieval.recall_at_k([direction.rank for direction in ranked], captions, ids)

    if "matching" in tasks:
        progress("matching captions and images")
        if other_image is not None:
            numbers = torch.arange(len(captions))
            matched = (score(torch.stack([captions, numbers], dim=1)) > 0).double().mean().item()
            mismatched = (score(torch.stack([other_image, numbers], dim=1)) <= 0).double().mean().item()
            accuracies = {"accuracy_matched": matched, "accuracy_mismatched": mismatched}
            result.sections["itm"] = {"accuracy": (matched + mismatched) / 2, **accuracies}
        affordable = RERANK_PAIRS // (len(held_out) + len(captions))
        best = min(RERANK_BEST, affordable) if rerank_best is None else rerank_best
        # Random negatives need no contrast, and without one there is no ranking; one candidate has a single order.
        if result.rankings is not None and best >= 2:
            new_ranks = retrieval.rerank(result.rankings, best, score, captions, ids)
            result.reranked, result.reranked_best = retrieval.recall_at_k(new_ranks, captions, ids), best

    head: FusedHead | None = "ranking" if "ranking" in tasks else "itm" if result.sections["itm"] else None
    if head and result.retrieval is None and rerank_best != 0:
        # Score every pair of the first images, at most `RERANK_PAIRS` pairs, with the fusion encoder.
        progress("scoring all pairs of images and captions")
        captions_up_to = captions.bincount(minlength=len(held_out)).cumsum(0)
        num_images = int((captions_up_to * torch.arange(1, len(held_out) + 1) <= RERANK_PAIRS).sum())
        if num_images >= 2:
            num_captions = int(captions_up_to[num_images - 1])
            pairs = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_captions))
            matrix = score(pairs, head).unflatten(0, (num_images, num_captions))
            first = captions[:num_captions], ids[:num_images]
            ranked = retrieval.rankings(matrix.__getitem__, matrix.T.__getitem__, *first, ranks=ranks)
            result.rankings = ranked if num_images == len(held_out) else None
            result.retrieval = retrieval.recall_at_k([direction.rank for direction in ranked], *first)
            result.retrieval_by, result.retrieval_images = head, num_images

    if "mlm" in tasks:
        progress("predicting masked words")
        words = masked.mask_captions(held_out, stage.masking, predictor.tokenizer)
        predict, predictions = functools.partial(masked.predict_masked_tokens, predictor, words), {}
        if config.source_type_of(stage) == "pairs":
            predictions[masked.OWN] = predict(held_out, captions)
        else:
            other_image = None
        if other_image is not None:
            predictions[masked.OTHER] = predict(held_out, other_image)
        predictions[masked.TEXT_ONLY] = predict()
        result.mlm = masked.MaskedLanguage(words, predictions, other_image)
    if "mim" in tasks:
        progress("filling in masked patches")
        result.reconstruction = masked.reconstruct_images(predictor.model, held_out, stage, config)
