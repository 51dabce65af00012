"""The report of an evaluation: one self-contained HTML file.

Examples are chosen by rule: retrievals by the margin between the best right and the best wrong candidate, masked words
by how much the right image changed the probability of the truth, both ends of each.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.masked_language import MaskedTokenPredictions, words_of
from pipeline.evaluation.report_data import (
    Alignments,
    CaptionsOfImage,
    EvalKey,
    ImagesOfCaption,
    MaskedCaption,
    MeasureRow,
    RecallRow,
    ReportData,
    WordGuess,
)
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.retrieval import Ranked, Recall
from pipeline.pages import page as pages
from pipeline.pages.charts import Measure, Series, line_chart
from pipeline.pages.formatting import percent
from pipeline.pages.page import render_page
from pipeline.tracking.describe import config_yaml

HERE = Path(__file__).parent  # of the templates
SHOWN = 4  # retrievals at each end
CANDIDATES = 5  # of each retrieval
MASKED_SHOWN = 4  # captions of each kind
RECONSTRUCTIONS_SHOWN = 6
REASONS_SHOWN = 8
OTHER = "another image"

Curves = Mapping[str, Sequence[tuple[int, float]]]


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
    chosen = {} if result.mlm is None else _chosen_captions(result)
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
        small_images=config.model.image_size <= pages.LOSSLESS,
        retrieval_by=result.retrieval_by,
        retrieval_images=result.retrieval_images,
        reranked_best=result.reranked_best if result.reranked else 0,
        ks=list(result.retrieval.image_to_text.at) if result.retrieval else [],
        recall=_recall_rows(result),
        fine_tuned=_fine_tuned_rows(result),
        masked_rows=_masked_rows(result),
        images=_image_galleries(result),
        sentences=_caption_galleries(result),
        conditions=[name for name, _ in _conditions(result)],
        masked={
            kind: [_masked_caption(result, tokenizer, caption) for caption in captions]
            for kind, captions in chosen.items()
        },
        reconstruction_stage=result.reconstruction_stage,
        reconstructions=_reconstructions(result),
        alignments=alignments,
        skipped=sorted(held_out.skipped.items(), key=lambda entry: -entry[1])[:REASONS_SHOWN],
        step=key.step,
        limit=key.limit,
        source_type=key.source_type,
        is_headline=key.is_headline,
    )


@dataclass(frozen=True)
class ReportLink:
    """A row in the list of all evaluations of a run."""

    name: str
    page: str  # relative to the list's
    stage: str
    step: int | None
    data: str
    at: int
    figures: str

    @staticmethod
    def of(shown: ReportData, page: str) -> ReportLink:
        """Return the row of an evaluation; its first metrics summarize it."""
        recalls = [f"{row.direction} R@{shown.ks[0]} {percent(row.cells[0][0])}" for row in shown.recall[:2]]
        others = [f"{row.name} {percent(row.share)}" for row in (shown.fine_tuned + shown.masked_rows)[:1]]
        figures = ", ".join(recalls or others)
        return ReportLink(shown.source, page, shown.stage, shown.step, shown.key.data, shown.at, figures)


def render_report(
    shown: ReportData,
    config: RunConfig,
    curves: Curves,
    against: ReportData | None = None,
    links: Sequence[ReportLink] = (),
) -> str:
    """Render the page. `against` is another run's evaluation to compare with, `links` lead to the other pages."""
    return render_page(
        "report.html.j2",
        [HERE],
        subject=f"evaluation {config.folder} {shown.key}",
        shown=shown,
        links=links,
        config=config,
        curves=[
            (name, max(points), line_chart([Measure("loss", [Series(0, sorted(points))], 130)], width=350))
            for name, points in curves.items()
            if points
        ],
        last_loss={name: points[-1][1] for name, points in curves.items() if points},
        against=against,
        beside=metric_differences(shown, against) if against else [],
        yaml=config_yaml(config, exclude_defaults=True),
    )


def metric_differences(shown: ReportData, other: ReportData) -> list[tuple[str, float, float, float]]:
    """Return (name, here, there, difference) of every metric that both evaluations have."""
    common = [name for name in shown.metrics if name in other.metrics and name != "pairs"]
    return [
        (name, shown.metrics[name], other.metrics[name], shown.metrics[name] - other.metrics[name]) for name in common
    ]


def _recall_rows(result: Evaluation) -> list[RecallRow]:
    rows = []
    captions = int((result.held_out.caption_of < result.retrieval_images).sum())
    for scores, retrieval in (
        ({"itc": "itc", "itm": "itm", "ranking": "ranking"}[result.retrieval_by], result.retrieval),
        (f"best {result.reranked_best} reranked", result.reranked),
    ):
        if retrieval is None:
            continue
        rows.append(_recall_row("Image → text", scores, retrieval.image_to_text, captions))
        rows.append(_recall_row("Text → image", scores, retrieval.text_to_image, result.retrieval_images))
    return rows


def _recall_row(direction: str, scores: str, recall: Recall, candidates: int) -> RecallRow:
    cells = [(share, recall.chance[k]) for k, share in recall.at.items()]
    return RecallRow(direction, scores, cells, recall.median_rank, candidates)


def _masked_rows(result: Evaluation) -> list[MeasureRow]:
    """Return the rows of masked words, matching and masked patches."""
    rows = []
    conditions = _conditions(result)
    for number, (name, guesses) in enumerate(conditions):
        note = f"{len(guesses.tokens)} masked tokens, the same for every row" if number == 0 else ""
        if name == OTHER:
            note = f"own image {100 * (conditions[0][1].accuracy - guesses.accuracy):+z.1f} points"
        rows.append(MeasureRow(f"Masked words guessed, {name}", guesses.accuracy, note))
    if (matching := result.itm) is not None:
        right, wrong = percent(matching.accuracy_matched), percent(matching.accuracy_mismatched)
        note = f"{right} of the true pairs, {wrong} of the false; chance {percent(0.5)}"
        rows.append(MeasureRow("Captions matched with their images", matching.accuracy, note, 0.5))
    if (patches := result.reconstruction) is not None:
        note = f"{percent(patches.error_without_model)} without a model: mean colour alone; in units of full scale"
        name = f"Error of filled patches ({result.reconstruction_stage})"
        rows.append(MeasureRow(name, patches.error, note, patches.error_without_model))
    return rows


def _conditions(result: Evaluation) -> list[tuple[str, MaskedTokenPredictions]]:
    """Return the conditions of the masked-word predictions, by their names in the report."""
    if result.mlm is None:
        return []
    named = [
        ("own image", result.mlm.own_image),
        (OTHER, result.mlm.other_image),
        ("text only", result.mlm.text_only),
        *((f"text only, {name} stage", guesses) for name, guesses in result.language_stages.items()),
    ]
    return [(name, guesses) for name, guesses in named if guesses is not None]


def _fine_tuned_rows(result: Evaluation) -> list[MeasureRow]:
    """Return the rows of fine-tuned objectives."""
    rows = []
    if (answering := result.vqa) is not None:
        note = f"{answering.questions} questions; {percent(answering.accuracy_without_model)} by one answer to all"
        rows.append(MeasureRow("Questions answered (VQA accuracy)", answering.accuracy, note))
    if (reasoning := result.nlvr2) is not None:
        note = f"{reasoning.statements} statements; {percent(reasoning.accuracy_without_model)} by the frequent label"
        rows.append(MeasureRow("Statements judged rightly", reasoning.accuracy, note))
        if reasoning.consistency is not None:
            note = "correct for all images of a sentence"
            rows.append(MeasureRow("Sentences judged rightly throughout", reasoning.consistency, note))
    if (classified := result.classification) is not None:
        note = f"{classified.images} images; chance {percent(classified.chance)}"
        rows.append(MeasureRow("Top-1 accuracy", classified.top1, note))
        rows.append(MeasureRow("Top-5 accuracy", classified.top5, ""))
    if (named := result.zero_shot) is not None:
        note = f"{named.images} images; chance {percent(named.chance)}"
        rows.append(MeasureRow("Zero-shot top-1 accuracy", named.top1, note))
        rows.append(MeasureRow("Zero-shot top-5 accuracy", named.top5, ""))
    if (probed := result.linear_probe) is not None:
        note = f"{probed.images} images, trained on {probed.trained_on}; chance {percent(probed.chance)}"
        rows.append(MeasureRow("Linear probe top-1 accuracy", probed.top1, note))
    return rows


# Retrieval ------------------------------------------------------------------------------------------------------------


def _image_galleries(result: Evaluation) -> dict[str, list[CaptionsOfImage]]:
    if result.rankings is None:
        return {}
    held_out, ranked = result.held_out, result.rankings.image_to_text
    caption_ids, texts = held_out.image_id[held_out.caption_of], held_out.texts()

    def card(image: int) -> CaptionsOfImage:
        best = ranked.best[image, :CANDIDATES]
        right = (caption_ids[best] == held_out.image_id[image]).tolist()
        listed = zip([texts[i] for i in best.tolist()], right, ranked.score[image].tolist(), strict=False)
        truth = [] if any(right) else list(held_out.captions[image])
        return CaptionsOfImage(thumbnail(held_out.image(image)), int(ranked.rank[image]), list(listed), truth)

    order = _by_margin(ranked)
    return {end: [card(image) for image in chosen] for end, chosen in _ends(order, order).items()}


def _caption_galleries(result: Evaluation) -> dict[str, list[ImagesOfCaption]]:
    if result.rankings is None:
        return {}
    held_out, ranked = result.held_out, result.rankings.text_to_image
    texts = held_out.texts()

    def card(caption: int) -> ImagesOfCaption:
        best = ranked.best[caption, :CANDIDATES]
        image = int(held_out.caption_of[caption])
        right = (held_out.image_id[best] == held_out.image_id[image]).tolist()
        images = [thumbnail(held_out.image(i)) for i in best.tolist()]
        truth = None if any(right) else thumbnail(held_out.image(image))
        listed = list(zip(images, right, ranked.score[caption].tolist(), strict=False))
        return ImagesOfCaption(texts[caption], int(ranked.rank[caption]), listed, truth)

    order = _by_margin(ranked)
    ends = _ends(order, [int(held_out.caption_of[caption]) for caption in order])
    return {end: [card(caption) for caption in chosen] for end, chosen in ends.items()}


def _by_margin(ranked: Ranked) -> list[int]:
    """Return queries from the clearest success to the clearest failure."""
    return ranked.margin.argsort(descending=True, stable=True).tolist()


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


# Masked words ---------------------------------------------------------------------------------------------------------


def _chosen_captions(result: Evaluation) -> dict[str, list[int]]:
    """Return captions where the right image helped most, where it misled most, and evenly spaced others."""
    mlm = result.mlm
    assert mlm is not None
    held_out, first = result.held_out, mlm.masked.first()
    order = list(range(len(held_out.tokens)))
    if mlm.own_image is None or mlm.other_image is None:
        return {"even": order[:: max(1, len(order) // (3 * MASKED_SHOWN))][: 3 * MASKED_SHOWN]}
    gain = mlm.own_image.truth_probability - mlm.other_image.truth_probability
    of_caption = [gain[start:stop].mean().item() for start, stop in itertools.pairwise(first)]
    order.sort(key=lambda caption: -of_caption[caption])
    ends = _ends(order, [int(held_out.caption_of[caption]) for caption in order])
    shown = {int(held_out.caption_of[caption]) for caption in ends["best"] + ends["worst"]}
    rest = [caption for caption in range(len(order)) if int(held_out.caption_of[caption]) not in shown]
    even = rest[:: max(1, len(rest) // MASKED_SHOWN)][:MASKED_SHOWN]
    return {"helped": ends["best"], "misled": ends["worst"], "even": even}


def _masked_caption(result: Evaluation, tokenizer: Tokenizer, caption: int) -> MaskedCaption:
    mlm, held_out = result.mlm, result.held_out
    assert mlm is not None
    tokens, first = held_out.tokens[caption], mlm.masked.first()[caption]
    words = words_of(mlm.masked, caption, tokens.word_of)
    number_of = {tokens.word_of[mlm.masked.positions[caption][word[0]]]: i for i, word in enumerate(words)}
    guesses = [
        WordGuess(
            truth=tokenizer.decode([mlm.masked.labels[caption][place] for place in word]),
            number=i + 1,
            guesses=[
                _word_guess(predictions, [first + place for place in word], result, tokenizer)
                for _, predictions in _conditions(result)
            ],
        )
        for i, word in enumerate(words)
    ]
    other = None if mlm.image_of_other is None else held_out.image(int(mlm.image_of_other[caption]))
    return MaskedCaption(
        picture=thumbnail(held_out.image(int(held_out.caption_of[caption]))),
        other_picture=None if other is None else thumbnail(other),
        pieces=_pieces(tokens.ids, tokens.word_of, number_of, tokenizer),
        words=guesses,
    )


def _word_guess(
    guesses: MaskedTokenPredictions, places: list[int], result: Evaluation, tokenizer: Tokenizer
) -> tuple[str, float, bool]:
    """Return the best token of each masked piece, their joint probability, and whether all are right."""
    assert result.mlm is not None
    best = guesses.tokens[places, 0]
    right = bool((best == result.mlm.masked.truth()[places]).all())
    return tokenizer.decode(best.tolist()), guesses.probabilities[places, 0].prod().item(), right


def _pieces(
    ids: Sequence[int], word_of: Sequence[int], number_of: Mapping[int, int], tokenizer: Tokenizer
) -> list[tuple[str, int | None]]:
    words: dict[int, list[int]] = {}
    for token, word in zip(ids, word_of, strict=True):
        if word >= 0:
            words.setdefault(word, []).append(token)
    return [
        (tokenizer.decode(tokens), number_of[word] + 1 if word in number_of else None) for word, tokens in words.items()
    ]


# Pictures -------------------------------------------------------------------------------------------------------------


def _reconstructions(result: Evaluation) -> list[tuple[str, str, str]]:
    shown = result.reconstruction
    if shown is None:
        return []
    rows = zip(shown.original, shown.masked, shown.filled, strict=True)
    return [
        (thumbnail(original), thumbnail(masked), thumbnail(filled))
        for (original, masked, filled), _ in zip(rows, range(RECONSTRUCTIONS_SHOWN), strict=False)
    ]


def thumbnail(image: Tensor) -> str:
    """Return an image (H, W, 3) uint8 as a data URI."""
    return pages.thumbnail(image.numpy())
