"""The report of an evaluation: one self-contained HTML file.

Examples are chosen by rule: retrievals by the margin between the best right and the best wrong candidate, masked words
by how much the right image changed the probability of the truth, both ends of each.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked import MaskedLanguage, MaskedTokenPredictions, words_of
from pipeline.evaluation.report_data import (
    Alignments,
    CaptionsOfImage,
    EvalKey,
    ImagesOfCaption,
    MaskedCaption,
    MaskedWord,
    MeasureRow,
    RecallRow,
    ReportData,
)
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.retrieval import Rankings
from pipeline.pages.charts import Measure, Series, line_chart
from pipeline.pages.formatting import percent
from pipeline.pages.page import LOSSLESS, render_page, thumbnail
from pipeline.tracking.describe import config_yaml

HERE = Path(__file__).parent  # of the templates
SHOWN = 4  # retrievals at each end
CANDIDATES = 5  # of each retrieval
MASKED_SHOWN = 4  # captions of each kind
RECONSTRUCTIONS_SHOWN = 6
REASONS_SHOWN = 8
OTHER = "another image"

Curves = Mapping[str, Sequence[tuple[int, float]]]
Conditions = Sequence[tuple[str, MaskedTokenPredictions]]  # of the masked-word predictions, by name


def build_report_data(
    result: Evaluation,
    config: RunConfig,
    tokenizer: Tokenizer,
    alignments: Alignments = Alignments(),
    key: EvalKey | None = None,
) -> ReportData:
    """Select and draw what the report shows. `key` defaults to that of an evaluation of all pairs of a source."""
    key = key or EvalKey(result.stage, None, result.source, result.held_out.digest, None, "pairs", False)
    held_out, prefix = result.held_out, f"eval/{result.source}/"

    recall_rows = []
    num_captions = int((held_out.caption_of < result.retrieval_images).sum())
    for scores, retrieval in (
        (str(result.retrieval_by), result.retrieval),
        (f"best {result.reranked_best} reranked", result.reranked),
    ):
        if retrieval is not None:
            for direction, recall, candidates in (
                ("Image → text", retrieval.image_to_text, num_captions),
                ("Text → image", retrieval.text_to_image, result.retrieval_images),
            ):
                cells = [(fraction, recall.chance[k]) for k, fraction in recall.at.items()]
                recall_rows.append(RecallRow(direction, scores, cells, recall.median_rank, candidates))

    conditions: list[tuple[str, MaskedTokenPredictions]] = []
    masked: dict[str, list[MaskedCaption]] = {}
    if (mlm := result.mlm) is not None:
        named = {"own image": mlm.own_image, OTHER: mlm.other_image, "text only": mlm.text_only}
        named |= {f"text only, {name} stage": predictions for name, predictions in result.language_stages.items()}
        conditions = [(name, predictions) for name, predictions in named.items() if predictions is not None]
        masked = _masked_captions(mlm, held_out, conditions, tokenizer)

    reconstructions = []
    if (patches := result.reconstruction) is not None:
        rows = zip(patches.original, patches.masked, patches.filled, strict=True)
        for original, hidden, filled in itertools.islice(rows, RECONSTRUCTIONS_SHOWN):
            reconstructions.append((thumbnail(original), thumbnail(hidden), thumbnail(filled)))

    images, sentences = ({}, {}) if result.rankings is None else _galleries(result.rankings, held_out)
    return ReportData(
        name=config.name,
        stage=result.stage,
        source=result.source,
        digest=held_out.digest,
        checkpoint=result.checkpoint,
        at=time.time_ns() // 1_000_000,
        pairs=len(held_out),
        captions=len(held_out.tokens),
        trained_on=list(result.trained_on),
        metrics={name.removeprefix(prefix): value for name, value in result.metrics().items()},
        small_images=config.model.image_size <= LOSSLESS,
        retrieval_by=result.retrieval_by,
        retrieval_images=result.retrieval_images,
        reranked_best=result.reranked_best if result.reranked else 0,
        ks=list(result.retrieval.image_to_text.at) if result.retrieval else [],
        recall=recall_rows,
        fine_tuned=_fine_tuned_rows(result),
        masked_rows=_masked_rows(result, conditions),
        images=images,
        sentences=sentences,
        conditions=[name for name, _ in conditions],
        masked=masked,
        reconstruction_stage=result.reconstruction_stage,
        reconstructions=reconstructions,
        alignments=alignments,
        skipped=sorted(held_out.skipped.items(), key=lambda entry: -entry[1])[:REASONS_SHOWN],
        step=key.step,
        limit=key.limit,
        source_type=key.source_type,
        is_headline=key.is_headline,
    )


def render_report(
    data: ReportData,
    config: RunConfig,
    curves: Curves,
    against: ReportData | None = None,
    links: Sequence[tuple[ReportData, str]] = (),
) -> str:
    """Render the page. `against` is another run's evaluation to compare with, `links` the other pages of this run.

    The page of a link is relative to this one.
    """
    listed = []  # every evaluation with its page and its first metrics
    for evaluation, page in links:
        recalls = [f"{row.direction} R@{evaluation.ks[0]} {percent(row.cells[0][0])}" for row in evaluation.recall[:2]]
        others = [f"{row.name} {percent(row.value)}" for row in (evaluation.fine_tuned + evaluation.masked_rows)[:1]]
        listed.append((evaluation, page, ", ".join(recalls or others)))
    common = {} if against is None else {name: data.metrics[name] for name in data.metrics if name in against.metrics}
    return render_page(
        "report.html.j2",
        [HERE],
        subject=f"evaluation {config.folder} {data.key}",
        shown=data,
        links=listed,
        config=config,
        curves=[
            (name, max(points), line_chart([Measure("loss", [Series(0, sorted(points))], 130)], width=350))
            for name, points in curves.items()
            if points
        ],
        last_loss={name: points[-1][1] for name, points in curves.items() if points},
        against=against,
        compared={name: value for name, value in common.items() if name != "pairs"},
        yaml=config_yaml(config, exclude_defaults=True),
    )


def _masked_rows(result: Evaluation, conditions: Conditions) -> list[MeasureRow]:
    """Return the rows of masked words, matching and masked patches."""
    rows = []
    for number, (name, predictions) in enumerate(conditions):
        note = f"{len(predictions.tokens)} masked tokens, the same for every row" if number == 0 else ""
        if name == OTHER:
            note = f"own image {100 * (conditions[0][1].accuracy - predictions.accuracy):+z.1f} points"
        rows.append(MeasureRow(f"Masked words guessed, {name}", predictions.accuracy, note))
    if (matching := result.itm) is not None:
        matched, mismatched = percent(matching.accuracy_matched), percent(matching.accuracy_mismatched)
        note = f"{matched} of the true pairs, {mismatched} of the false; chance {percent(0.5)}"
        rows.append(MeasureRow("Captions matched with their images", matching.accuracy, note, 0.5))
    if (patches := result.reconstruction) is not None:
        note = f"{percent(patches.error_without_model)} without a model: mean colour alone; in units of full scale"
        name = f"Error of filled patches ({result.reconstruction_stage})"
        rows.append(MeasureRow(name, patches.error, note, patches.error_without_model))
    return rows


def _fine_tuned_rows(result: Evaluation) -> list[MeasureRow]:
    """Return the rows of fine-tuned objectives."""
    rows: list[tuple[str, float, str]] = []
    if (vqa := result.vqa) is not None:
        note = f"{vqa.questions} questions; {percent(vqa.accuracy_without_model)} by one answer to all"
        rows.append(("Questions answered (VQA accuracy)", vqa.accuracy, note))
    if (nlvr2 := result.nlvr2) is not None:
        note = f"{nlvr2.statements} statements; {percent(nlvr2.accuracy_without_model)} by the frequent label"
        rows.append(("Statements judged rightly", nlvr2.accuracy, note))
        if nlvr2.consistency is not None:
            note = "correct for all images of a sentence"
            rows.append(("Sentences judged rightly throughout", nlvr2.consistency, note))
    for name, classes in (("Top-{k}", result.classification), ("Zero-shot top-{k}", result.zero_shot)):
        if classes is not None:
            note = f"{classes.images} images; chance {percent(classes.chance)}"
            rows.append((f"{name.format(k=1)} accuracy", classes.top1, note))
            rows.append((f"{name.format(k=5)} accuracy", classes.top5, ""))
    if (probe := result.linear_probe) is not None:
        note = f"{probe.images} images, trained on {probe.trained_on}; chance {percent(probe.chance)}"
        rows.append(("Linear probe top-1 accuracy", probe.top1, note))
    return [MeasureRow(*row) for row in rows]


def _galleries(
    ranked: Rankings, held_out: EvalPairs
) -> tuple[dict[str, list[CaptionsOfImage]], dict[str, list[ImagesOfCaption]]]:
    """Return the clearest successes and failures of both directions, at most one of each image."""
    texts, image_id, caption_of = held_out.texts(), held_out.image_id, held_out.caption_of.tolist()
    caption_id = image_id[held_out.caption_of]

    def captions_of(image: int) -> CaptionsOfImage:
        of_image = ranked.image_to_text
        best = of_image.best[image, :CANDIDATES]
        right = (caption_id[best] == image_id[image]).tolist()
        listed = zip([texts[i] for i in best.tolist()], right, of_image.score[image].tolist(), strict=False)
        truth = [] if any(right) else list(held_out.captions[image])
        return CaptionsOfImage(thumbnail(held_out.image(image)), int(of_image.rank[image]), list(listed), truth)

    def images_of(caption: int) -> ImagesOfCaption:
        of_caption, own = ranked.text_to_image, caption_of[caption]
        best = of_caption.best[caption, :CANDIDATES]
        right = (image_id[best] == image_id[own]).tolist()
        images = [thumbnail(held_out.image(i)) for i in best.tolist()]
        listed = list(zip(images, right, of_caption.score[caption].tolist(), strict=False))
        truth = None if any(right) else thumbnail(held_out.image(own))
        return ImagesOfCaption(texts[caption], int(of_caption.rank[caption]), listed, truth)

    by_image, by_caption = (
        direction.margin.argsort(descending=True, stable=True).tolist()
        for direction in (ranked.image_to_text, ranked.text_to_image)
    )
    images = _ends(by_image, by_image)
    captions = _ends(by_caption, [caption_of[caption] for caption in by_caption])
    return (
        {end: [captions_of(image) for image in chosen] for end, chosen in images.items()},
        {end: [images_of(caption) for caption in chosen] for end, chosen in captions.items()},
    )


def _ends(order: list[int], group_of: list[int]) -> dict[str, list[int]]:
    """Return the first and last few of `order`, at most one of each group, none in both."""
    firsts: dict[int, int] = {}
    lasts: dict[int, int] = {}
    for query, group in zip(order, group_of, strict=True):
        firsts.setdefault(group, query)
    for query, group in zip(reversed(order), reversed(group_of), strict=True):
        lasts.setdefault(group, query)
    best = list(firsts.items())[: min(SHOWN, (len(firsts) + 1) // 2)]
    groups = {group for group, _ in best}
    worst = [query for group, query in lasts.items() if group not in groups][:SHOWN]
    return {"best": [query for _, query in best], "worst": worst}


def _masked_captions(
    mlm: MaskedLanguage, held_out: EvalPairs, conditions: Conditions, tokenizer: Tokenizer
) -> dict[str, list[MaskedCaption]]:
    """Return captions where the right image helped most, where it misled most, and evenly spaced others."""
    caption_of, first, truth = held_out.caption_of.tolist(), mlm.masked.first(), mlm.masked.truth()

    def card(caption: int) -> MaskedCaption:
        tokens = held_out.tokens[caption]
        masked_words = words_of(tokens.word_of[position] for position in mlm.masked.positions[caption])
        numbers = {word: number for number, word in enumerate(masked_words, 1)}
        words = []
        for word, places in masked_words.items():
            predictions = []
            rows = [first[caption] + place for place in places]
            for _, condition in conditions:  # the best token of each masked piece, and their joint probability
                best, probability = condition.tokens[rows, 0], condition.probabilities[rows, 0].prod().item()
                predictions.append((tokenizer.decode(best.tolist()), probability, bool((best == truth[rows]).all())))
            words.append(MaskedWord(tokenizer.decode(truth[rows].tolist()), numbers[word], predictions))
        other = None if mlm.image_of_other is None else thumbnail(held_out.image(int(mlm.image_of_other[caption])))
        return MaskedCaption(
            image=thumbnail(held_out.image(caption_of[caption])),
            other_image=other,
            pieces=[
                (tokenizer.decode([tokens.ids[place] for place in places]), numbers.get(word))
                for word, places in words_of(tokens.word_of).items()
            ],
            words=words,
        )

    order = list(range(len(held_out.tokens)))
    if mlm.own_image is None or mlm.other_image is None:
        chosen = {"even": order[:: max(1, len(order) // (3 * MASKED_SHOWN))][: 3 * MASKED_SHOWN]}
    else:
        gain = mlm.own_image.truth_probability - mlm.other_image.truth_probability
        of_caption = [gain[start:stop].mean().item() for start, stop in itertools.pairwise(first)]
        order.sort(key=lambda caption: -of_caption[caption])
        ends = _ends(order, [caption_of[caption] for caption in order])
        shown = {caption_of[caption] for caption in ends["best"] + ends["worst"]}
        rest = [caption for caption in range(len(order)) if caption_of[caption] not in shown]
        even = rest[:: max(1, len(rest) // MASKED_SHOWN)][:MASKED_SHOWN]
        chosen = {"helped": ends["best"], "misled": ends["worst"], "even": even}
    return {kind: [card(caption) for caption in captions] for kind, captions in chosen.items()}
