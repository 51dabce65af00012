"""Evaluate a stage's weights on a held-out source, for every objective that the stage trained.

The contrast is evaluated by retrieval, matching by its accuracy and by reranking, masked language by the words
predicted with the right image, a mismatched one and none. Earlier stages add what only they trained: the language stage
its accuracy from text, the vision stage its reconstructions. Fine-tuned stages are evaluated on sources of their own
type: questions, statements, labelled images.

Evaluation always uses a stage's last weights and selects no model on test data. A source that a stage trained on can be
evaluated, and the result says so (`trained_on`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.choices import Choices, answers_with, choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation import labelled, masked, retrieval
from pipeline.evaluation.datasets import EvalPairs, LabelledEvalSet, load_pairs
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.retrieval import BothDirections, FusedHead, Ranked, Recall
from pipeline.objectives import evaluation_tasks

COLLAPSED = 0.05  # a matching head with at most this accuracy on one class has learned only the class frequencies
RERANK_BEST = 10  # candidates of each query that the fusion encoder reranks …
RERANK_PAIRS = 12_000  # … fewer where that would be more pairs than this: each costs a forward of its own
RECONSTRUCTED = 64  # images whose masked patches are filled in; the report shows the first few


@dataclass(frozen=True)
class MatchingResult:
    """Accuracy of the matching head on every caption with its own image and with one of another `image_id`."""

    accuracy_matched: float
    accuracy_mismatched: float

    @property
    def accuracy(self) -> float:
        return (self.accuracy_matched + self.accuracy_mismatched) / 2

    @property
    def is_collapsed(self) -> bool:
        """Return True if the head gives nearly all pairs the same answer."""
        return min(self.accuracy_matched, self.accuracy_mismatched) < COLLAPSED


@dataclass
class Evaluation:
    """Results on one source, and the tensors behind its report. A member is None where the stage did not train it."""

    source: str
    stage: str
    held_out: EvalPairs
    rankings: BothDirections[Ranked] | None = None  # of all images and captions
    retrieval: BothDirections[Recall] | None = None
    retrieval_by: Literal["itc"] | FusedHead = "itc"  # head whose scores order the candidates
    retrieval_images: int = 0  # number of images that take part
    reranked: BothDirections[Recall] | None = None
    reranked_best: int = 0  # candidates per query
    itm: MatchingResult | None = None
    mlm: masked.MaskedLanguage | None = None
    # Text-only predictions of earlier stages, by name.
    language_stages: dict[str, masked.MaskedTokenPredictions] = field(default_factory=dict)
    reconstruction: masked.Reconstruction | None = None
    reconstruction_stage: str = ""
    vqa: labelled.VQAResult | None = None
    nlvr2: labelled.NLVR2Result | None = None
    classification: labelled.ClassificationResult | None = None
    zero_shot: labelled.ClassificationResult | None = None
    linear_probe: labelled.LinearProbeResult | None = None
    trained_on: tuple[str, ...] = ()  # stages that trained on the same shards: the results are then not held out
    checkpoint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mome evaluate --json`: fractions, null where something was not trained."""
        retrievals: dict[str, dict[str, Any] | None] = {}
        for name, recalls, more in (
            ("retrieval", self.retrieval, {"by": self.retrieval_by, "images": self.retrieval_images}),
            ("reranked", self.reranked, {"best": self.reranked_best}),
        ):
            retrievals[name] = recalls and {
                **{
                    direction: {f"r{k}": round(fraction, 6) for k, fraction in recall.at.items()}
                    | {"median_rank": recall.median_rank, "mean_rank": round(recall.mean_rank, 2)}
                    for direction, recall in recalls._asdict().items()
                },
                "chance": {f"r{k}": round(max(recall.chance[k] for recall in recalls), 6) for k in retrieval.KS},
                **more,
            }
        return {
            "pairs": len(self.held_out),
            "captions": len(self.held_out.tokens),
            "skipped": sum(self.held_out.skipped.values()),
            "source": self.source,
            "source_digest": self.held_out.digest,
            "stage": self.stage,
            **retrievals,
            **self._sections(),
            "trained_on": list(self.trained_on),
            "checkpoint": self.checkpoint,
        }

    def metrics(self) -> dict[str, float]:
        """Return the same results flat, as MLflow metrics: `eval/<source>/i2t_r1`, …"""
        metrics = {"pairs": float(len(self.held_out))}
        for prefix, recalls in (("", self.retrieval), ("reranked_", self.reranked)):
            for name, recall in zip(("i2t", "t2i"), recalls or (), strict=False):
                metrics |= {f"{prefix}{name}_r{k}": fraction for k, fraction in recall.at.items()}
                metrics[f"{prefix}{name}_median_rank"] = recall.median_rank
                metrics[f"{prefix}{name}_mean_rank"] = recall.mean_rank
        for section, values in self._sections().items():
            if section != "reconstruction":
                metrics |= {f"{section}_{k}": v for k, v in (values or {}).items() if isinstance(v, float)}
        for name, predictions in self.language_stages.items():
            metrics[f"mlm_{name}_stage_text_only"] = predictions.accuracy
        if self.reconstruction is not None:
            metrics["reconstruction_error"] = self.reconstruction.error
        return {f"eval/{self.source}/{name}": value for name, value in metrics.items()}

    def _sections(self) -> dict[str, dict[str, Any] | None]:
        """Return the results other than retrieval, by name, rounded."""
        sections: dict[str, dict[str, Any] | None] = {"mlm": None, "itm": None, "reconstruction": None}
        if self.mlm is not None:
            accuracies = {
                "accuracy": self.mlm.own_image,
                "accuracy_other_image": self.mlm.other_image,
                "accuracy_text_only": self.mlm.text_only,
                "language_stage_text_only": next(reversed(self.language_stages.values()), None),
            }
            sections["mlm"] = {name: result and result.accuracy for name, result in accuracies.items()} | {
                "masked_tokens": len(self.mlm.text_only.tokens)
            }
        if self.itm is not None:
            sections["itm"] = {"accuracy": self.itm.accuracy, **asdict(self.itm)}
        if self.reconstruction is not None:
            sections["reconstruction"] = {
                "error": self.reconstruction.error,
                "error_without_model": self.reconstruction.error_without_model,
                "stage": self.reconstruction_stage,
            }
        for name in ("vqa", "nlvr2", "classification", "zero_shot", "linear_probe"):
            result = getattr(self, name)
            sections[name] = None if result is None else asdict(result)
        return {
            name: values and {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
            for name, values in sections.items()
        }


@dataclass(frozen=True)
class EvalContext:
    """The settings and services shared by all measures of an evaluation."""

    config: RunConfig
    tokenizer: Tokenizer
    storage: Storage
    ranks: Ranks
    progress: Callable[[str], None]
    rerank_best: int | None
    batch: int


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
    number of candidates per query that the fusion encoder reranks; 0 skips reranking. `progress` is called with a
    message before each measure. `choices` are the answer and class lists saved with the weights (default: those that
    the config names). `held_out` are the source's pairs, if they are loaded already. `probe` is a labelled source on
    whose frozen features a linear classifier is trained, to be evaluated on `source`.

    Raises ConfigError and DataError as `load_pairs`, and ConfigError for a source type that the stage did not train.
    """
    section = config.stage_named(stage)
    source = source or config.evaluation.source
    if source is None:
        raise ConfigError("evaluation.source: no held-out source is set; set it to one that no stage trains on")
    context = EvalContext(config, tokenizer, storage, ranks, progress, rerank_best, config.evaluation.batch_size)
    limit = limit or config.evaluation.max_images
    if source in config.sources and config.sources[source].type != "pairs":
        return _evaluate_labelled(model, section, context, source, limit, choices, probe)
    if probe is not None:
        raise ConfigError(f"a linear probe needs a labelled source, and '{source}' is not one")
    if held_out is None:
        progress("reading the held-out pairs")
        held_out = load_pairs(config, storage, source, limit, tokenizer, section.max_text_length, ranks)
    result = Evaluation(source, section.name, held_out, trained_on=stages_trained_on(config, source))
    _evaluate_pairs(result, model, section, context)
    for name, other in (others or {}).items():  # what only earlier stages trained
        trained = config.stage_named(name)
        if "mlm" in trained.objectives and result.mlm is not None:
            progress(f"predicting masked words from text with the stage '{name}'")
            result.language_stages[name] = masked.predict_masked_tokens(
                other, result.mlm.masked, tokenizer.pad_id, batch=context.batch, ranks=ranks
            )
        if "mim" in trained.objectives and result.reconstruction is None:
            progress(f"filling in masked patches with the stage '{name}'")
            _reconstruct(result, other, trained, config)
    return result


def stages_trained_on(config: RunConfig, source: str) -> tuple[str, ...]:
    """Return the stages that train on a source's shards, under whatever name."""
    shards = {name: section.shards.rstrip("/") for name, section in config.sources.items()}
    own = shards.get(source)
    return tuple(stage.name for stage in config.stages if own in [shards[name] for name in stage.sources])


def _evaluate_labelled(
    model: nn.Module,
    stage: StageConfig,
    context: EvalContext,
    source: str,
    limit: int | None,
    choices: Mapping[str, Choices] | None,
    probe: str | None,
) -> Evaluation:
    """Evaluate a source of questions, statements or labelled images."""
    config, tokenizer, ranks, progress = context.config, context.tokenizer, context.ranks, context.progress
    source_type = config.sources[source].type
    tasks = evaluation_tasks(stage, source_type)
    if not tasks and not (source_type == "labelled" and probe):
        raise ConfigError(
            f"source '{source}' is of type {source_type}, and stage {stage.name} trains no objective that is evaluated "
            f"on it (it trains {', '.join(stage.objectives)}); give another source or stage"
        )
    dataset = LabelledEvalSet(config, context.storage, source, stage, tokenizer, limit, ranks)
    result = Evaluation(source, stage.name, EvalPairs({}, dataset.digest), trained_on=stages_trained_on(config, source))
    if "vqa" in tasks:
        progress("answering questions")
        choices = choices_of(config, [stage], context.storage) if choices is None else choices
        answers = answers_with(choices, stage.num_answers, f"stage {stage.name}")
        result.vqa = labelled.evaluate_vqa(model, dataset, answers)
    if "nlvr2" in tasks:
        progress("judging statements")
        result.nlvr2 = labelled.evaluate_nlvr2(model, dataset)
    if "classification" in tasks:
        progress("classifying images")
        result.classification = labelled.evaluate_classification(model, dataset)
    if "zero_shot" in tasks:
        progress("classifying images by class names")
        names, prompts = labelled.class_names(config, source, context.storage), config.evaluation.prompts
        vectors = labelled.embed_classes(model, tokenizer, names, prompts, stage.max_text_length, context.batch, ranks)
        result.zero_shot = labelled.evaluate_classification(model, dataset, vectors)
    if probe is not None:
        progress("training a linear classifier on frozen features")
        training = LabelledEvalSet(config, context.storage, probe, stage, tokenizer, None, ranks)
        result.linear_probe = labelled.evaluate_linear_probe(model, training, dataset)
    result.held_out.skipped.update(dataset.skipped)
    return result


def _evaluate_pairs(result: Evaluation, model: nn.Module, stage: StageConfig, context: EvalContext) -> None:
    """Add the results of every objective that the stage trained and that pairs evaluate."""
    held_out, tasks = result.held_out, evaluation_tasks(stage, "pairs")
    captions, ids, token_ids = held_out.caption_of, held_out.image_id, [tokens.ids for tokens in held_out.tokens]
    ranks, batch, pad, progress = context.ranks, context.batch, context.tokenizer.pad_id, context.progress

    def score(pairs: Tensor, head: FusedHead = "itm") -> Tensor:
        images, sizes = held_out.images, held_out.image_size
        return retrieval.fusion_scores(model, images, token_ids, pad, pairs, batch, sizes, head, ranks)

    if "retrieval" in tasks:
        progress("retrieving images by captions and captions by images")
        device = next(model.parameters()).device
        images = retrieval.embed_images(model, held_out.images, batch, ranks).to(device)
        texts = retrieval.embed_texts(model, token_ids, pad, batch, ranks).to(device)
        scores = retrieval.dot_products(images, texts), retrieval.dot_products(texts, images)
        keep = max(retrieval.KEPT, context.rerank_best or 0)
        ranked = retrieval.rankings(*scores, captions, ids, keep, ranks)
        result.rankings, result.retrieval_images = ranked, len(held_out)
        result.retrieval = retrieval.recall_at_k([direction.rank for direction in ranked], captions, ids)

    if "matching" in tasks:
        progress("matching captions and images")
        if len(ids.unique()) >= 2:
            numbers = torch.arange(len(token_ids))
            matched, mismatched = (
                score(torch.stack([images, numbers], dim=1))
                for images in (captions, masked.mismatched_images(ids)[captions])
            )
            accuracies = (matched > 0).double().mean().item(), (mismatched <= 0).double().mean().item()
            result.itm = MatchingResult(*accuracies)
        affordable = RERANK_PAIRS // (len(held_out) + len(token_ids))
        best = min(RERANK_BEST, affordable) if context.rerank_best is None else context.rerank_best
        # Random negatives need no contrast, and without one there is no ranking; one candidate has a single order.
        if result.rankings is not None and best >= 2:
            new_ranks = retrieval.rerank(result.rankings, best, score, captions, ids)
            result.reranked, result.reranked_best = retrieval.recall_at_k(new_ranks, captions, ids), best

    head: FusedHead | None = "ranking" if "ranking" in tasks else "itm" if result.itm else None
    if head and result.retrieval is None and context.rerank_best != 0:
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
        fused = context.config.source_type_of(stage) == "pairs"
        result.mlm = masked.masked_language(model, held_out, stage.masking, context.tokenizer, fused, batch, ranks)
    if "mim" in tasks:
        progress("filling in masked patches")
        _reconstruct(result, model, stage, context.config)


def _reconstruct(result: Evaluation, model: nn.Module, stage: StageConfig, config: RunConfig) -> None:
    """Add the reconstruction of the first images, at the stage's own image size."""
    held_out = result.held_out
    if stage.image_target == "visual_tokens" or held_out.image_size is not None:
        return  # visual tokens cannot be drawn, and images of different shapes cannot be stacked
    images, size = held_out.images[:RECONSTRUCTED], config.for_stage(stage).model.image_size
    if images.shape[1] != size:
        channels = images.permute(0, 3, 1, 2).float()
        resized = F.interpolate(channels, (size, size), mode="bicubic", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    result.reconstruction_stage = stage.name
    result.reconstruction = masked.reconstruct_images(
        model,
        images,
        held_out.keys[:RECONSTRUCTED],
        config.model.patch_size,
        stage.masking.image_mask_ratio,
        stage.image_target,
        config.evaluation.batch_size,
        decoded=stage.image_decoder is not None,
    )
