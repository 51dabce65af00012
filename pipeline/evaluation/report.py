"""The report of an evaluation: one HTML file that needs nothing else, with its pictures inside.

What is shown is chosen by rule, not by eye: retrievals by the margin between the best right and the best wrong
candidate, masked words by how much the right picture changed the truth's probability, both ends of each.
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
from pipeline.tracking.describe import chosen_keys

HERE = Path(__file__).parent  # of the templates
SHOWN = 4  # retrievals at each end
CANDIDATES = 5  # of each retrieval
MASKED_SHOWN = 4  # captions of each kind
RECONSTRUCTIONS_SHOWN = 6
REASONS_SHOWN = 8
OTHER = "another picture"

Curves = Mapping[str, Sequence[tuple[int, float]]]


def build_report_data(
    found: Evaluation,
    config: RunConfig,
    tokenizer: Tokenizer,
    alignments: Alignments = Alignments(),
    key: EvalKey | None = None,
) -> ReportData:
    """What is worth showing of an evaluation, chosen and drawn small. `key`, if not given: of all pairs of a source."""
    key = key or EvalKey(found.stage, None, found.source, found.held_out.digest, None, "pairs", False)
    held_out, prefix = found.held_out, f"eval/{found.source}/"
    return ReportData(
        name=config.name,
        stage=found.stage,
        source=found.source,
        digest=held_out.digest,
        checkpoint=found.checkpoint,
        at=time.time_ns() // 1_000_000,
        pairs=len(held_out),
        captions=len(held_out.tokens),
        trained_on=list(found.trained_on),
        metrics={name.removeprefix(prefix): value for name, value in found.metrics().items()},
        small_pictures=config.model.image_size <= pages.LOSSLESS,
        retrieval_by=found.retrieval_by,
        retrieval_images=found.retrieval_images,
        reranked_best=found.reranked_best if found.reranked else 0,
        ks=list(found.retrieval.image_to_text.at) if found.retrieval else [],
        recall=_recall_rows(found),
        fine_tuned=_fine_tuned_rows(found),
        masked_rows=_masked_rows(found),
        images=_image_galleries(found),
        sentences=_caption_galleries(found),
        conditions=[name for name, _ in _conditions(found)],
        masked=_masked_captions(found, tokenizer),
        reconstruction_stage=found.reconstruction_stage,
        reconstructions=_reconstructions(found),
        alignments=alignments,
        skipped=sorted(held_out.skipped.items(), key=lambda each: -each[1])[:REASONS_SHOWN],
        step=key.step,
        limit=key.limit,
        source_type=key.source_type,
        is_headline=key.is_headline,
    )


@dataclass(frozen=True)
class ReportLink:
    """An evaluation in the list of all of a run."""

    name: str
    page: str  # relative to the list's
    stage: str
    step: int | None
    data: str
    at: int
    figures: str

    @staticmethod
    def of(shown: ReportData, page: str) -> ReportLink:
        """Return its line; the first figures stand for all."""
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
    """The page as text. `against`: another run's evaluation, whose figures stand beside. `links`: to all pages."""
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
        yaml=chosen_keys(config),
    )


def metric_differences(shown: ReportData, other: ReportData) -> list[tuple[str, float, float, float]]:
    """(measure, here, there, difference) of every figure that both evaluations have."""
    common = [name for name in shown.metrics if name in other.metrics and name != "pairs"]
    return [
        (name, shown.metrics[name], other.metrics[name], shown.metrics[name] - other.metrics[name]) for name in common
    ]


def _recall_rows(found: Evaluation) -> list[RecallRow]:
    rows = []
    captions = int((found.held_out.caption_of < found.retrieval_images).sum())
    for scores, retrieval in (
        ({"itc": "itc", "itm": "itm", "ranking": "ranking"}[found.retrieval_by], found.retrieval),
        (f"best {found.reranked_best} re-ranked", found.reranked),
    ):
        if retrieval is None:
            continue
        rows.append(_recall_row("Image → text", scores, retrieval.image_to_text, captions))
        rows.append(_recall_row("Text → image", scores, retrieval.text_to_image, found.retrieval_images))
    return rows


def _recall_row(direction: str, scores: str, recall: Recall, candidates: int) -> RecallRow:
    cells = [(share, recall.chance[k]) for k, share in recall.at.items()]
    return RecallRow(direction, scores, cells, recall.median_rank, candidates)


def _masked_rows(found: Evaluation) -> list[MeasureRow]:
    """Masked words, matching and masked patches."""
    rows = []
    conditions = _conditions(found)
    for number, (name, guesses) in enumerate(conditions):
        note = f"{len(guesses.tokens)} masked tokens, the same for every row" if number == 0 else ""
        if name == OTHER:
            note = f"own picture {100 * (conditions[0][1].accuracy - guesses.accuracy):+z.1f} points"
        rows.append(MeasureRow(f"Masked words guessed, {name}", guesses.accuracy, note))
    if (matching := found.itm) is not None:
        right, wrong = percent(matching.accuracy_matched), percent(matching.accuracy_mismatched)
        note = f"{right} of the true pairs, {wrong} of the false; chance {percent(0.5)}"
        rows.append(MeasureRow("Caption matched with its picture", matching.accuracy, note, 0.5))
    if (patches := found.reconstruction) is not None:
        note = f"{percent(patches.error_without_model)} without a model: mean colour alone; in units of full scale"
        name = f"Error of filled patches ({found.reconstruction_stage})"
        rows.append(MeasureRow(name, patches.error, note, patches.error_without_model))
    return rows


def _conditions(found: Evaluation) -> list[tuple[str, MaskedTokenPredictions]]:
    """The ways masked words were guessed, as the report names them."""
    if found.mlm is None:
        return []
    named = [
        ("own picture", found.mlm.own_image),
        (OTHER, found.mlm.other_image),
        ("text only", found.mlm.text_only),
        *((f"text only, {name} stage", guesses) for name, guesses in found.language_stages.items()),
    ]
    return [(name, guesses) for name, guesses in named if guesses is not None]


def _fine_tuned_rows(found: Evaluation) -> list[MeasureRow]:
    """What fine-tuning trained."""
    rows = []
    if (answering := found.vqa) is not None:
        note = f"{answering.questions} questions; {percent(answering.accuracy_without_model)} by one answer to all"
        rows.append(MeasureRow("Questions answered (VQA accuracy)", answering.accuracy, note))
    if (reasoning := found.nlvr2) is not None:
        note = f"{reasoning.statements} statements; {percent(reasoning.accuracy_without_model)} by the frequent label"
        rows.append(MeasureRow("Statements judged rightly", reasoning.accuracy, note))
        if reasoning.consistency is not None:
            note = "all pictures of a sentence"
            rows.append(MeasureRow("Sentences judged rightly throughout", reasoning.consistency, note))
    if (classified := found.classification) is not None:
        note = f"{classified.images} pictures; chance {percent(classified.chance)}"
        rows.append(MeasureRow("Class named first", classified.top1, note))
        rows.append(MeasureRow("Class among the first five", classified.top5, ""))
    if (named := found.zero_shot) is not None:
        note = f"{named.images} pictures; chance {percent(named.chance)}"
        rows.append(MeasureRow("Class named first, told by its name alone", named.top1, note))
        rows.append(MeasureRow("Class among the first five, by its name alone", named.top5, ""))
    if (probed := found.linear_probe) is not None:
        note = f"{probed.images} pictures, trained on {probed.trained_on}; chance {percent(probed.chance)}"
        rows.append(MeasureRow("Class named first by a linear classifier", probed.top1, note))
    return rows


# Retrieval ------------------------------------------------------------------------------------------------------------


def _image_galleries(found: Evaluation) -> dict[str, list[CaptionsOfImage]]:
    if found.rankings is None:
        return {}
    held_out, ranked = found.held_out, found.rankings.image_to_text
    caption_ids, texts = held_out.image_id[held_out.caption_of], held_out.texts()

    def card(image: int) -> CaptionsOfImage:
        best = ranked.best[image, :CANDIDATES]
        right = (caption_ids[best] == held_out.image_id[image]).tolist()
        listed = zip([texts[i] for i in best.tolist()], right, ranked.score[image].tolist(), strict=False)
        truth = [] if any(right) else list(held_out.captions[image])
        return CaptionsOfImage(thumbnail(held_out.image(image)), int(ranked.rank[image]), list(listed), truth)

    order = _by_margin(ranked)
    return {end: [card(image) for image in chosen] for end, chosen in _ends(order, order).items()}


def _caption_galleries(found: Evaluation) -> dict[str, list[ImagesOfCaption]]:
    if found.rankings is None:
        return {}
    held_out, ranked = found.held_out, found.rankings.text_to_image
    texts = held_out.texts()

    def card(caption: int) -> ImagesOfCaption:
        best = ranked.best[caption, :CANDIDATES]
        image = int(held_out.caption_of[caption])
        right = (held_out.image_id[best] == held_out.image_id[image]).tolist()
        pictures = [thumbnail(held_out.image(i)) for i in best.tolist()]
        truth = None if any(right) else thumbnail(held_out.image(image))
        listed = list(zip(pictures, right, ranked.score[caption].tolist(), strict=False))
        return ImagesOfCaption(texts[caption], int(ranked.rank[caption]), listed, truth)

    order = _by_margin(ranked)
    ends = _ends(order, [int(held_out.caption_of[caption]) for caption in order])
    return {end: [card(caption) for caption in chosen] for end, chosen in ends.items()}


def _by_margin(ranked: Ranked) -> list[int]:
    """Queries from the surest success to the surest failure."""
    return ranked.margin.argsort(descending=True, stable=True).tolist()


def _ends(order: list[int], group_of: list[int]) -> dict[str, list[int]]:
    """The first and last few of `order`, at most one of each group, none in both."""
    firsts: dict[int, int] = {}
    lasts: dict[int, int] = {}
    for query, group in zip(order, group_of, strict=True):
        firsts.setdefault(group, query)
    for query, group in zip(reversed(order), reversed(group_of), strict=True):
        lasts.setdefault(group, query)
    best = list(firsts.items())[: min(SHOWN, (len(firsts) + 1) // 2)]
    taken = {group for group, _ in best}
    worst = [query for group, query in lasts.items() if group not in taken][:SHOWN]
    return {"best": [query for _, query in best], "worst": worst}


# Masked words ---------------------------------------------------------------------------------------------------------


def _masked_captions(found: Evaluation, tokenizer: Tokenizer) -> dict[str, list[MaskedCaption]]:
    if found.mlm is None:
        return {}
    chosen = _chosen_captions(found)
    return {kind: [_masked_caption(found, tokenizer, caption) for caption in chosen[kind]] for kind in chosen}


def _chosen_captions(found: Evaluation) -> dict[str, list[int]]:
    """Captions where the right picture helped most, where it misled most, and some at even distances between."""
    mlm = found.mlm
    assert mlm is not None
    held_out, first = found.held_out, mlm.masked.first()
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


def _masked_caption(found: Evaluation, tokenizer: Tokenizer, caption: int) -> MaskedCaption:
    mlm, held_out = found.mlm, found.held_out
    assert mlm is not None
    tokens, first = held_out.tokens[caption], mlm.masked.first()[caption]
    words = words_of(mlm.masked, caption, tokens.word_of)
    number_of = {tokens.word_of[mlm.masked.positions[caption][word[0]]]: i for i, word in enumerate(words)}
    guesses = [
        WordGuess(
            truth=tokenizer.decode([mlm.masked.labels[caption][place] for place in word]),
            number=i + 1,
            guesses=[
                _word_guess(each, [first + place for place in word], found, tokenizer) for _, each in _conditions(found)
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
    guesses: MaskedTokenPredictions, places: list[int], found: Evaluation, tokenizer: Tokenizer
) -> tuple[str, float, bool]:
    """The best token of each masked piece, their joint probability, and whether all are right."""
    assert found.mlm is not None
    best = guesses.tokens[places, 0]
    right = bool((best == found.mlm.masked.truth()[places]).all())
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


def _reconstructions(found: Evaluation) -> list[tuple[str, str, str]]:
    shown = found.reconstruction
    if shown is None:
        return []
    rows = zip(shown.original, shown.masked, shown.filled, strict=True)
    return [
        (thumbnail(original), thumbnail(masked), thumbnail(filled))
        for (original, masked, filled), _ in zip(rows, range(RECONSTRUCTIONS_SHOWN), strict=False)
    ]


def thumbnail(image: Tensor) -> str:
    """A picture (H, W, 3) uint8 as a data URI."""
    return pages.thumbnail(image.numpy())
