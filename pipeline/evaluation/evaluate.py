"""Evaluate a stage's weights on a held-out source, for every objective that the stage trained.

The contrast is evaluated by retrieval, matching by its accuracy and by reranking, masked language by the words
predicted with the right image, a wrong one and none. Earlier stages add what only they trained: the language stage its
accuracy from text, the vision stage its reconstructions. Fine-tuned stages are evaluated on sources of their own type:
questions, statements, labelled images.

Evaluation always uses a stage's last weights and selects no model on test data. A source that a stage trained on can be
evaluated, and the result says so (`trained_on`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.choices import Choices, answers_with, choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.classification import (
    class_names,
    class_vectors,
    evaluate_classification,
    evaluate_linear_probe,
    evaluate_zero_shot,
)
from pipeline.evaluation.datasets import EvalPairs, LabelledEvalSet, load_pairs
from pipeline.evaluation.masked_image import reconstruct
from pipeline.evaluation.masked_language import masked_language, mismatched_images, predict_masked_tokens
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.results import Evaluation, MatchingResult
from pipeline.evaluation.retrieval import (
    KEPT,
    FusedHead,
    dot_products,
    embed_images,
    embed_texts,
    eval_mode,
    fusion_scores,
    rankings,
    recall_at_k,
    rerank,
)
from pipeline.evaluation.vqa_nlvr2 import evaluate_nlvr2, evaluate_vqa
from pipeline.objectives import evaluation_tasks

RERANK_BEST = 10  # candidates of each query that the fusion encoder reranks …
RERANK_PAIRS = 12_000  # … fewer where that would be more pairs than this: each costs a forward of its own
RECONSTRUCTED = 64  # images whose masked patches are filled in; the report shows the first few


@dataclass(frozen=True)
class EvalContext:
    """The settings and services shared by all measures of an evaluation."""

    config: RunConfig
    tokenizer: Tokenizer
    storage: Storage
    ranks: Ranks
    progress: Callable[[str], None]
    rerank_best: int | None = None

    @property
    def batch(self) -> int:
        return self.config.evaluation.batch_size


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
    context = EvalContext(config, tokenizer, storage, ranks, progress, rerank_best)
    limit = limit or config.evaluation.max_images
    if source in config.sources and config.sources[source].type != "pairs":
        return _evaluate_task(model, context, source, limit, section, choices, probe)
    if probe is not None:
        raise ConfigError(f"a linear probe needs a labelled source, and '{source}' is not one")
    if held_out is None:
        progress("reading the held-out pairs")
        held_out = load_pairs(config, storage, source, limit, tokenizer, section.max_text_length, ranks)
    result = Evaluation(source, section.name, held_out, trained_on=stages_trained_on(config, source))
    result = _evaluate_pairs(result, model, section, context)
    for name, other in (others or {}).items():
        result = _add_stage(result, other, config.stage_named(name), context)
    return result


def can_evaluate(config: RunConfig, source: str, stage: StageConfig) -> bool:
    """Return True if some objective of the stage is evaluated on the source."""
    return bool(evaluation_tasks(stage, config.sources[source].type))


def stages_trained_on(config: RunConfig, source: str) -> tuple[str, ...]:
    """Return the stages that train on a source's shards, under whatever name."""
    shards = config.sources[source].shards.rstrip("/") if source in config.sources else None
    return tuple(
        stage.name
        for stage in config.stages
        if any(config.sources[name].shards.rstrip("/") == shards for name in stage.sources)
    )


def _evaluate_task(
    model: nn.Module,
    context: EvalContext,
    source: str,
    limit: int | None,
    stage: StageConfig,
    choices: Mapping[str, Choices] | None,
    probe: str | None,
) -> Evaluation:
    """Evaluate a source of questions, statements or labelled images."""
    config, tokenizer, ranks = context.config, context.tokenizer, context.ranks
    source_type = config.sources[source].type
    tasks = evaluation_tasks(stage, source_type)
    if not tasks and not (source_type == "labelled" and probe):
        raise ConfigError(
            f"source '{source}' is of type {source_type}, and stage {stage.name} trains no objective that is evaluated "
            f"on it (it trains {', '.join(stage.objectives)}); give another source or stage"
        )
    dataset = LabelledEvalSet(config, context.storage, source, stage, tokenizer, limit, ranks)
    results: dict[str, Any] = {}
    if "vqa" in tasks:
        context.progress("answering questions")
        choices = choices_of(config, [stage], context.storage) if choices is None else choices
        answers = answers_with(choices, stage.num_answers, f"stage {stage.name}")
        results["vqa"] = evaluate_vqa(model, dataset, answers)
    if "nlvr2" in tasks:
        context.progress("judging statements")
        results["nlvr2"] = evaluate_nlvr2(model, dataset)
    if "classification" in tasks:
        context.progress("classifying images")
        results["classification"] = evaluate_classification(model, dataset)
    if "zero_shot" in tasks:
        context.progress("classifying images by class names")
        names, prompts = class_names(config, source, context.storage), config.evaluation.prompts
        vectors = class_vectors(model, tokenizer, names, prompts, stage.max_text_length, context.batch, ranks)
        results["zero_shot"] = evaluate_zero_shot(model, dataset, vectors)
    if probe is not None:
        context.progress("training a linear classifier on frozen features")
        training = LabelledEvalSet(config, context.storage, probe, stage, tokenizer, None, ranks)
        results["linear_probe"] = evaluate_linear_probe(model, training, dataset)
    held_out = EvalPairs.empty(dict(dataset.skipped), dataset.digest)
    return Evaluation(source, stage.name, held_out, trained_on=stages_trained_on(config, source), **results)


def _evaluate_pairs(result: Evaluation, model: nn.Module, stage: StageConfig, context: EvalContext) -> Evaluation:
    held_out, progress, tasks = result.held_out, context.progress, evaluation_tasks(stage, "pairs")
    if "retrieval" in tasks:
        progress("retrieving images by captions and captions by images")
        result = _retrieve(result, model, context)
    if "matching" in tasks:
        progress("matching captions and images")
        result = _rerank(replace(result, itm=_match(model, held_out, context)), model, context)
    head: FusedHead | None = "ranking" if "ranking" in tasks else "itm" if result.itm else None
    if head and result.retrieval is None and context.rerank_best != 0:
        progress("scoring all pairs of images and captions")
        result = _retrieve_fused(result, model, context, head)
    if "mlm" in tasks:
        progress("predicting masked words")
        fused = context.config.source_type_of(stage) == "pairs"
        batch, ranks = context.batch, context.ranks
        mlm = masked_language(model, held_out, stage.masking, context.tokenizer, fused, batch, ranks)
        result = replace(result, mlm=mlm)
    if "mim" in tasks:
        progress("filling in masked patches")
        result = _reconstruct(result, model, stage, context.config)
    return result


def _add_stage(result: Evaluation, model: nn.Module, stage: StageConfig, context: EvalContext) -> Evaluation:
    """Add an earlier stage's results: words from text alone, with the same masks, and reconstructions."""
    if "mlm" in stage.objectives and result.mlm is not None:
        context.progress(f"predicting masked words from text with the stage '{stage.name}'")
        masked, pad = result.mlm.masked, context.tokenizer.pad_id
        predictions = predict_masked_tokens(model, masked, pad, batch=context.batch, ranks=context.ranks)
        result = replace(result, language_stages=result.language_stages | {stage.name: predictions})
    if "mim" in stage.objectives and result.reconstruction is None:
        context.progress(f"filling in masked patches with the stage '{stage.name}'")
        result = _reconstruct(result, model, stage, context.config)
    return result


def _retrieve(result: Evaluation, model: nn.Module, context: EvalContext) -> Evaluation:
    held_out, ranks, pad = result.held_out, context.ranks, context.tokenizer.pad_id
    captions, ids = held_out.caption_of, held_out.image_id
    images = embed_images(model, held_out.images, context.batch, ranks)
    texts = embed_texts(model, held_out.token_ids(), pad, context.batch, ranks)
    with eval_mode(model) as device:
        images, texts = images.to(device), texts.to(device)
    keep = max(KEPT, context.rerank_best or 0)
    ranked = rankings(dot_products(images, texts), dot_products(texts, images), captions, ids, keep, ranks)
    retrieval = recall_at_k(ranked.image_to_text.rank, ranked.text_to_image.rank, captions, ids)
    return replace(result, rankings=ranked, retrieval=retrieval, retrieval_images=len(held_out))


def _rerank(result: Evaluation, model: nn.Module, context: EvalContext) -> Evaluation:
    held_out, ranked = result.held_out, result.rankings
    if ranked is None:  # random negatives need no contrast, and without one there is no ranking yet
        return result
    affordable = RERANK_PAIRS // (len(held_out) + len(held_out.tokens))
    best = min(RERANK_BEST, affordable) if context.rerank_best is None else context.rerank_best
    if best < 2:  # the order of one candidate cannot change
        return result
    captions, images = held_out.caption_of, held_out.image_id
    new_ranks = rerank(ranked, best, lambda pairs: _fusion_scores(model, held_out, context, pairs), captions, images)
    return replace(result, reranked=recall_at_k(*new_ranks, captions, images), reranked_best=best)


def _retrieve_fused(result: Evaluation, model: nn.Module, context: EvalContext, head: FusedHead) -> Evaluation:
    """Score every pair of the first images, at most `RERANK_PAIRS` pairs, with the fusion encoder."""
    held_out = result.held_out
    per_image = held_out.caption_of.bincount(minlength=len(held_out))
    num_pairs = per_image.cumsum(0) * torch.arange(1, len(held_out) + 1)
    num_images = int((num_pairs <= RERANK_PAIRS).sum())
    num_captions = int(per_image[:num_images].sum())
    if num_images < 2:
        return result
    pairs = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_captions))
    scores = _fusion_scores(model, held_out, context, pairs, head).unflatten(0, (num_images, num_captions))
    caption_of, image_id = held_out.caption_of[:num_captions], held_out.image_id[:num_images]
    ranked = rankings(scores.__getitem__, scores.T.__getitem__, caption_of, image_id, ranks=context.ranks)
    return replace(
        result,
        rankings=ranked if num_images == len(held_out) else None,
        retrieval=recall_at_k(ranked.image_to_text.rank, ranked.text_to_image.rank, caption_of, image_id),
        retrieval_by=head,
        retrieval_images=num_images,
    )


def _match(model: nn.Module, held_out: EvalPairs, context: EvalContext) -> MatchingResult | None:
    if len(held_out.image_id.unique()) < 2:
        return None
    captions = torch.arange(len(held_out.tokens))
    other = mismatched_images(held_out.image_id)[held_out.caption_of]
    matched, mismatched = (
        _fusion_scores(model, held_out, context, torch.stack([images, captions], dim=1))
        for images in (held_out.caption_of, other)
    )
    return MatchingResult((matched > 0).double().mean().item(), (mismatched <= 0).double().mean().item())


def _fusion_scores(
    model: nn.Module, held_out: EvalPairs, context: EvalContext, pairs: Tensor, head: FusedHead = "itm"
) -> Tensor:
    images, sizes, token_ids = held_out.images, held_out.image_size, held_out.token_ids()
    pad = context.tokenizer.pad_id
    return fusion_scores(model, images, token_ids, pad, pairs, context.batch, sizes, head, context.ranks)


def _reconstruct(result: Evaluation, model: nn.Module, stage: StageConfig, config: RunConfig) -> Evaluation:
    held_out = result.held_out
    if stage.image_target == "visual_tokens" or held_out.image_size is not None:
        return result  # visual tokens cannot be drawn, and images of different shapes cannot be stacked
    reconstruction = reconstruct(
        model,
        _resize_images(held_out.images[:RECONSTRUCTED], config.for_stage(stage).model.image_size),
        held_out.keys[:RECONSTRUCTED],
        config.model.patch_size,
        stage.masking.image_mask_ratio,
        stage.image_target,
        config.evaluation.batch_size,
        decoded=stage.image_decoder is not None,
    )
    return replace(result, reconstruction=reconstruction, reconstruction_stage=stage.name)


def _resize_images(images: Tensor, size: int) -> Tensor:
    """Resize square images (N, H, H, 3) uint8 to a stage's own image size: (N, size, size, 3)."""
    if images.shape[1] == size:
        return images
    channels = images.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels, (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
