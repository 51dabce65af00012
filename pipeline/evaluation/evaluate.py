"""Evaluates a stage's weights on a held-out source: what every objective it trained is worth there.

Contrastive training is measured by retrieval, matching by its accuracy and by re-ranking, masked language by the words
guessed with the right picture, a wrong one and none. Earlier stages' models add what they alone can tell: the language
stage its accuracy from text, the vision stage its reconstructions. Fine-tuned stages are measured on sources of their
own type: questions, statements, labelled pictures.

A stage hands over its last weights, and none is ever chosen by a result: there is no model selection on test data. A
source that a stage trained on can be evaluated, and the result says so (`trained_on`).
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
    ClassificationResult,
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

RERANK_BEST = 10  # candidates of each query that the fusion encoder reads again …
RERANK_PAIRS = 12_000  # … fewer where that would be more pairs than this: each is a forward pass of its own
RECONSTRUCTED = 64  # pictures whose masked patches are filled in; the report shows the first few


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
    """Evaluates `model`, the weights of the stage named `stage` (the last, if not given), on a source.

    `source` and `limit` default to the config's. `others` are the models of other stages, by the stage's name.
    `rerank_best` is how many candidates of each query the fusion encoder reads again; 0 leaves re-ranking out.
    `progress` is told what is being measured. `choices` is what the heads choose among, as kept with the weights;
    None: as the config names it.
    All of `ranks` call it together and get the same. `held_out`: the source's pairs, where they were read before.
    `probe`: a labelled source on whose frozen features a linear classifier is trained, to be measured on `source`.
    Raises ConfigError and DataError as `load_pairs`, ConfigError for a source of a use that the stage did not train.
    """
    chosen = config.stage_named(stage)
    source = source or config.evaluation.source
    if source is None:
        raise ConfigError("evaluation.source: no held-out source is named; set it to one that no stage trains on")
    if source in config.sources and config.sources[source].type != "pairs":
        setting = EvalContext(config, tokenizer, ranks, progress, None)
        return _measure_task(model, setting, storage, source, limit, chosen, choices, probe)
    if probe is not None:
        raise ConfigError(f"a linear probe is measured on labelled pictures, and '{source}' is no source of them")
    if held_out is None:
        progress("reading the held-out pairs")
        limit = limit or config.evaluation.max_images
        held_out = load_pairs(config, storage, source, limit, tokenizer, chosen.max_text_length, ranks)
    setting = EvalContext(config, tokenizer, ranks, progress, rerank_best)
    found = Evaluation(source, chosen.name, held_out, trained_on=stages_trained_on(config, source))
    found = _measure(found, model, chosen, setting)
    for name, other in (others or {}).items():
        found = _add_stage(found, other, config.stage_named(name), setting)
    return found


@dataclass(frozen=True)
class EvalContext:
    """What all measures of one evaluation share."""

    config: RunConfig
    tokenizer: Tokenizer
    ranks: Ranks
    progress: Callable[[str], None]
    rerank_best: int | None

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_id

    @property
    def batch(self) -> int:
        return self.config.evaluation.batch_size


def _measure_task(
    model: nn.Module,
    setting: EvalContext,
    storage: Storage,
    source: str,
    limit: int | None,
    stage: StageConfig,
    choices: Mapping[str, Choices] | None,
    probe: str | None,
) -> Evaluation:
    """The figures of a source of questions, statements or labelled pictures."""
    config, progress = setting.config, setting.progress
    source_type = config.sources[source].type
    tasks = evaluation_tasks(stage, source_type)
    if not tasks and not (source_type == "labelled" and probe):
        raise ConfigError(
            f"source '{source}' is of type {source_type}, and stage {stage.name} trains no objective that is evaluated "
            f"on it (it trains {', '.join(stage.objectives)}); give another source or stage"
        )
    limit = limit or config.evaluation.max_images
    annotated = LabelledEvalSet(config, storage, source, stage, setting.tokenizer, limit, setting.ranks)
    figures: dict[str, Any] = {}
    if "vqa" in tasks:
        progress("answering questions")
        if choices is None:
            choices = choices_of(config, [stage], storage)
        listed = answers_with(choices, stage.num_answers, f"stage {stage.name}")
        figures["vqa"] = evaluate_vqa(model, annotated, listed)
    if "nlvr2" in tasks:
        progress("judging statements")
        figures["nlvr2"] = evaluate_nlvr2(model, annotated)
    if "classification" in tasks:
        progress("telling classes")
        figures["classification"] = evaluate_classification(model, annotated)
    if "zero_shot" in tasks:
        progress("telling classes by their names")
        figures["zero_shot"] = _zero_shot(model, annotated, setting, storage, source, stage)
    if probe is not None:
        progress("training a linear classifier on frozen features")
        training = LabelledEvalSet(config, storage, probe, stage, setting.tokenizer, None, setting.ranks)
        figures["linear_probe"] = evaluate_linear_probe(model, training, annotated)
    held_out = EvalPairs.of_no_pairs(dict(annotated.skipped), annotated.digest)
    return Evaluation(source, stage.name, held_out, trained_on=stages_trained_on(config, source), **figures)


def _zero_shot(
    model: nn.Module,
    annotated: LabelledEvalSet,
    setting: EvalContext,
    storage: Storage,
    source: str,
    stage: StageConfig,
) -> ClassificationResult:
    names, prompts = class_names(setting.config, source, storage), setting.config.evaluation.prompts
    vectors = class_vectors(
        model, setting.tokenizer, names, prompts, stage.max_text_length, setting.batch, setting.ranks
    )
    return evaluate_zero_shot(model, annotated, vectors)


def can_evaluate(config: RunConfig, source: str, stage: StageConfig) -> bool:
    """Return True if some objective of the stage is evaluated on the source."""
    return bool(evaluation_tasks(stage, config.sources[source].type))


def stages_trained_on(config: RunConfig, source: str) -> tuple[str, ...]:
    """The stages that train on a source's shards, under whatever name."""
    shards = config.sources[source].shards.rstrip("/") if source in config.sources else None
    return tuple(
        stage.name
        for stage in config.stages
        if any(config.sources[name].shards.rstrip("/") == shards for name in stage.sources)
    )


def _measure(found: Evaluation, model: nn.Module, stage: StageConfig, setting: EvalContext) -> Evaluation:
    held_out, progress, tasks = found.held_out, setting.progress, evaluation_tasks(stage, "pairs")
    if "retrieval" in tasks:
        progress("retrieving images by captions and captions by images")
        found = _retrieve(found, model, setting)
    if "matching" in tasks:
        progress("matching captions and images")
        found = replace(found, matching=_match(model, held_out, setting))
        found = _rerank(found, model, setting)
    head: FusedHead | None = "ranking" if "ranking" in tasks else "itm" if found.matching else None
    if head and found.retrieval is None and setting.rerank_best != 0:
        progress("reading images with all captions")
        found = _retrieve_fused(found, model, setting, head)
    if "mlm" in tasks:
        progress("guessing masked words")
        fused = setting.config.source_type_of(stage) == "pairs"
        mlm = masked_language(model, held_out, stage.masking, setting.tokenizer, fused, setting.batch, setting.ranks)
        found = replace(found, mlm=mlm)
    if "mim" in tasks:
        progress("filling in masked patches")
        found = _reconstructed(found, model, stage, setting.config)
    return found


def _add_stage(found: Evaluation, model: nn.Module, stage: StageConfig, setting: EvalContext) -> Evaluation:
    """What an earlier stage's model tells: words from text alone, on the same masks, and reconstructions."""
    if "mlm" in stage.objectives and found.mlm is not None:
        setting.progress(f"guessing masked words from text with the stage '{stage.name}'")
        guesses = predict_masked_tokens(model, found.mlm.masked, setting.pad, batch=setting.batch, ranks=setting.ranks)
        found = replace(found, language_stages=found.language_stages | {stage.name: guesses})
    if "mim" in stage.objectives and found.reconstruction is None:
        setting.progress(f"filling in masked patches with the stage '{stage.name}'")
        found = _reconstructed(found, model, stage, setting.config)
    return found


def _retrieve(found: Evaluation, model: nn.Module, setting: EvalContext) -> Evaluation:
    held_out, ranks = found.held_out, setting.ranks
    images = embed_images(model, held_out.images, setting.batch, ranks)
    texts = embed_texts(model, held_out.rows(), setting.pad, setting.batch, ranks)
    with eval_mode(model) as device:
        images, texts = images.to(device), texts.to(device)
    ranked = rankings(
        dot_products(images, texts),
        dot_products(texts, images),
        held_out.caption_of,
        held_out.image_id,
        max(KEPT, setting.rerank_best or 0),
        ranks,
    )
    retrieval = recall_at_k(
        ranked.image_to_text.place, ranked.text_to_image.place, held_out.caption_of, held_out.image_id
    )
    return replace(found, rankings=ranked, retrieval=retrieval, retrieval_images=len(held_out))


def _rerank(found: Evaluation, model: nn.Module, setting: EvalContext) -> Evaluation:
    held_out, ranked = found.held_out, found.rankings
    if ranked is None:  # random negatives need no contrast, and without one nothing is ranked yet
        return found
    affordable = RERANK_PAIRS // (len(held_out) + len(held_out.tokens))
    best = min(RERANK_BEST, affordable) if setting.rerank_best is None else setting.rerank_best
    if best < 2:  # the order of one candidate cannot change
        return found
    captions, images = held_out.caption_of, held_out.image_id
    places = rerank(ranked, best, lambda pairs: _odds(model, held_out, setting, pairs), captions, images)
    return replace(found, reranked=recall_at_k(*places, captions, images), reranked_best=best)


def _retrieve_fused(found: Evaluation, model: nn.Module, setting: EvalContext, head: FusedHead) -> Evaluation:
    """Every pair read by the fusion encoder, of as many images, from the first, as make up `RERANK_PAIRS` pairs."""
    held_out = found.held_out
    per_image = held_out.caption_of.bincount(minlength=len(held_out))
    num_pairs = per_image.cumsum(0) * torch.arange(1, len(held_out) + 1)
    num_images = int((num_pairs <= RERANK_PAIRS).sum())
    num_captions = int(per_image[:num_images].sum())
    if num_images < 2:
        return found
    pairs = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_captions))
    scores = _odds(model, held_out, setting, pairs, head).unflatten(0, (num_images, num_captions))
    caption_of, image_id = held_out.caption_of[:num_captions], held_out.image_id[:num_images]
    ranked = rankings(scores.__getitem__, scores.T.__getitem__, caption_of, image_id, ranks=setting.ranks)
    return replace(
        found,
        rankings=ranked if num_images == len(held_out) else None,
        retrieval=recall_at_k(ranked.image_to_text.place, ranked.text_to_image.place, caption_of, image_id),
        retrieval_by=head,
        retrieval_images=num_images,
    )


def _match(model: nn.Module, held_out: EvalPairs, setting: EvalContext) -> MatchingResult | None:
    if len(held_out.image_id.unique()) < 2:
        return None
    captions = torch.arange(len(held_out.tokens))
    other = mismatched_images(held_out.image_id)[held_out.caption_of]
    matched, mismatched = (
        _odds(model, held_out, setting, torch.stack([images, captions], dim=1))
        for images in (held_out.caption_of, other)
    )
    return MatchingResult((matched > 0).double().mean().item(), (mismatched <= 0).double().mean().item())


def _odds(
    model: nn.Module, held_out: EvalPairs, setting: EvalContext, pairs: Tensor, head: FusedHead = "itm"
) -> Tensor:
    images, sizes, rows = held_out.images, held_out.image_size, held_out.rows()
    return fusion_scores(model, images, rows, setting.pad, pairs, setting.batch, sizes, head, setting.ranks)


def _reconstructed(found: Evaluation, model: nn.Module, stage: StageConfig, config: RunConfig) -> Evaluation:
    held_out = found.held_out
    if stage.image_target == "visual_tokens" or held_out.image_size is not None:
        return found  # a token is a name and no picture; pictures of many shapes would need many drawings
    result = reconstruct(
        model,
        _resized(held_out.images[:RECONSTRUCTED], config.for_stage(stage).model.image_size),
        held_out.keys[:RECONSTRUCTED],
        config.model.patch_size,
        stage.masking.image_mask_ratio,
        stage.image_target,
        config.evaluation.batch_size,
        decoded=stage.image_decoder is not None,
    )
    return replace(found, reconstruction=result, reconstruction_stage=stage.name)


def _resized(images: Tensor, size: int) -> Tensor:
    """Square pictures (N, H, H, 3) uint8 as a stage of another picture size reads them: (N, size, size, 3)."""
    if images.shape[1] == size:
        return images
    channels = images.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels, (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
