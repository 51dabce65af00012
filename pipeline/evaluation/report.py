"""The report of an evaluation: its values and thumbnails as one JSON file in the run's folder, and its HTML page.

The evaluation's own page is rendered at once; the run's report and comparisons with other runs are rendered from the
file, without the weights and the held-out pairs. The file may come from an untrusted writer: images are data URIs,
never addresses, and damaged files are skipped.

Examples are chosen by rule: retrievals by the margin between the best right and the best wrong candidate, masked words
by how much the right image changed the probability of the truth, both ends of each.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.schema import RunConfig
from pipeline.config.urls import file_name_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage, join
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.masked import MaskedLanguage, MaskedTokenPredictions, words_of
from pipeline.evaluation.retrieval import BothDirections, Ranked
from pipeline.pages.charts import Measure, Series, line_chart, percent
from pipeline.pages.page import LOSSLESS, render_page, thumbnail
from pipeline.tracking.describe import config_yaml

log = logging.getLogger(__name__)

FOLDER = "evaluations"
LATEST = 4_000_000_000_000  # milliseconds since 1970: the year 2096
SHOWN = 4  # retrievals at each end
CANDIDATES = 5  # of each retrieval
MASKED_SHOWN = 4  # captions of each kind
RECONSTRUCTIONS_SHOWN = 6
REASONS_SHOWN = 8
OTHER = "another image"

Curves = Mapping[str, Sequence[tuple[int, float]]]
ImageUri = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")]
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class EvalKey:
    """The identity of an evaluation: its weights, and its data under a name."""

    stage: str
    step: int | None  # of a checkpoint; None: the final weights of the stage
    name: str
    digest: str  # of the data
    limit: int | None = None  # number of samples; None: all
    source_type: str = "pairs"
    is_headline: bool = False  # of the run's own held-out source, as its config asks for it, with the last weights

    @property
    def data(self) -> str:
        """Describe the data."""
        extent = "all samples" if self.limit is None else f"the first {self.limit} samples"
        return f"digest {self.digest[:12]}…, {extent}, of type {self.source_type}"

    def is_of_same_data(self, other: EvalKey) -> bool:
        return (self.digest, self.limit, self.source_type) == (other.digest, other.limit, other.source_type)


@dataclass(frozen=True)
class RecallRow:
    """A row of the retrieval table: recall compared with chance."""

    direction: str
    scores: str
    cells: Annotated[list[tuple[int, Number, Number]], Field(min_length=1)]  # k, recall, chance
    median_rank: Number
    candidates: int


@dataclass(frozen=True)
class MeasureRow:
    """Another measure: a fraction with a note, and the baseline that is marked on its bar."""

    name: str
    value: Number
    note: str = ""
    baseline: Number | None = None


@dataclass(frozen=True)
class CaptionsOfImage:
    image: ImageUri
    rank: int
    candidates: list[tuple[str, bool, Number]]  # caption, is right, similarity
    truth: list[str]  # its own captions, if none was retrieved


@dataclass(frozen=True)
class ImagesOfCaption:
    caption: str
    rank: int
    candidates: list[tuple[ImageUri, bool, Number]]  # image, is right, similarity
    truth: ImageUri | None  # its own image, if it was not retrieved


@dataclass(frozen=True)
class Retrievals:
    best_images: list[CaptionsOfImage]
    worst_images: list[CaptionsOfImage]
    best_captions: list[ImagesOfCaption]
    worst_captions: list[ImagesOfCaption]


@dataclass(frozen=True)
class MaskedWord:
    truth: str
    number: int
    predictions: list[tuple[str, str, Number, bool]]  # condition, prediction, probability, is right


@dataclass(frozen=True)
class MaskedCaption:
    image: ImageUri
    other_image: ImageUri | None
    pieces: list[tuple[str, int | None]]  # words; the number of the masked one, or None
    words: list[MaskedWord]


@dataclass(frozen=True)
class AlignedCaption:
    """An image and the patches that each word of its caption aligns to."""

    image: ImageUri
    caption: str
    words: list[tuple[str, ImageUri, Number]]  # word, heat map, fraction of the hottest patch


@dataclass(frozen=True)
class Alignments:
    captions: list[AlignedCaption] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # objectives that the weights were not trained for


@dataclass(frozen=True)
class ReportData:
    """The contents of one report. A list is empty where the stage did not train its objective."""

    run: str  # name
    key: EvalKey
    checkpoint: str
    at: Annotated[int, Field(ge=0, le=LATEST)]  # milliseconds since 1970
    pairs: int
    captions: int
    trained_on: list[str]
    metrics: dict[str, Number]  # as MLflow has them, without `eval/<source>/`
    small_images: bool  # drawn enlarged, with visible pixels
    retrieval_by: str
    retrieval_images: int
    reranked_best: int  # candidates a query; 0: none were reranked
    recall: list[RecallRow]
    measures: list[MeasureRow]
    retrievals: Retrievals | None
    masked: dict[str, list[MaskedCaption]]  # helped, misled, even
    reconstruction_stage: str
    reconstructions: list[tuple[ImageUri, ImageUri, ImageUri]]  # original, masked, filled in
    alignments: Alignments
    skipped: list[tuple[str, int]]  # held-out samples left out: reason, count


_JSON = TypeAdapter(ReportData)


def save_report_data(storage: Storage, folder: str, data: ReportData) -> None:
    """Write the data next to the weights, replacing an earlier evaluation of the same weights and name."""
    step = "" if data.key.step is None else f"@step-{data.key.step}"
    name = file_name_of(f"{data.key.stage}-{data.key.name}{step}.json")
    storage.write(join(folder, FOLDER, name), _JSON.dump_json(data))


def load_report_data(storage: Storage, folder: str) -> list[ReportData]:
    """Load the run's evaluations, newest first; skip damaged files and other versions with a warning."""
    evaluations = []
    for url in (join(folder, FOLDER, name) for name in storage.list(join(folder, FOLDER)) if name.endswith(".json")):
        try:
            evaluations.append(_JSON.validate_json(storage.read(url)))
        except ValidationError as error:
            fault = f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}"
            log.warning("%s: damaged, or written by another version; skipped (%s)", url, fault)
    return sorted(evaluations, key=lambda data: -data.at)


def headline(evaluations: Sequence[ReportData]) -> ReportData:
    """Return the evaluation that represents the run, out of several with the newest first.

    This is the one that the run's config defines; one of fewer samples, other data or other weights never replaces it.
    """
    complete = [data for data in evaluations if data.key.limit is None and data.key.step is None]
    return next((data for data in evaluations if data.key.is_headline), (complete or evaluations)[0])


def build_report_data(
    result: Evaluation,
    config: RunConfig,
    tokenizer: Tokenizer,
    alignments: Alignments = Alignments(),
    key: EvalKey | None = None,
) -> ReportData:
    """Select and draw what the report shows. `key` defaults to that of an evaluation of all pairs of a source."""
    held_out, mlm, patches = result.held_out, result.mlm, result.reconstruction
    recall = []
    num_captions = int((held_out.caption_of < result.retrieval_images).sum())
    sizes = (("Image → text", num_captions), ("Text → image", result.retrieval_images))
    best = f"best {result.reranked_best} reranked"
    for scores, recalls in ((str(result.retrieval_by), result.retrieval), (best, result.reranked)):
        for (direction, candidates), own in zip(sizes, recalls or (), strict=False):
            cells = [(k, fraction, own.chance[k]) for k, fraction in own.at.items()]
            recall.append(RecallRow(direction, scores, cells, own.median_rank, candidates))

    conditions: dict[str, MaskedTokenPredictions] = {}
    if mlm is not None:
        named = {"own image": mlm.own_image, OTHER: mlm.other_image, "text only": mlm.text_only}
        named |= {f"text only, {name} stage": predictions for name, predictions in result.language_stages.items()}
        conditions = {name: predictions for name, predictions in named.items() if predictions is not None}
    reconstructions = []
    if patches is not None:
        rows = zip(patches.original, patches.masked, patches.filled, strict=True)
        for original, hidden, filled in itertools.islice(rows, RECONSTRUCTIONS_SHOWN):
            reconstructions.append((thumbnail(original), thumbnail(hidden), thumbnail(filled)))

    return ReportData(
        run=config.name,
        key=key or EvalKey(result.stage, None, result.source, held_out.digest),
        checkpoint=result.checkpoint,
        at=time.time_ns() // 1_000_000,
        pairs=len(held_out),
        captions=len(held_out.tokens),
        trained_on=list(result.trained_on),
        metrics={name.removeprefix(f"eval/{result.source}/"): value for name, value in result.metrics().items()},
        small_images=config.model.image_size <= LOSSLESS,
        retrieval_by=result.retrieval_by,
        retrieval_images=result.retrieval_images,
        reranked_best=result.reranked_best if result.reranked else 0,
        recall=recall,
        measures=_measures(result, conditions),
        retrievals=None if result.rankings is None else _retrievals(result.rankings, held_out),
        masked={} if mlm is None else _masked_captions(mlm, held_out, conditions, tokenizer),
        reconstruction_stage="" if patches is None else patches.stage,
        reconstructions=reconstructions,
        alignments=alignments,
        skipped=sorted(held_out.skipped.items(), key=lambda entry: -entry[1])[:REASONS_SHOWN],
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
    drawn = {name: sorted(points) for name, points in curves.items() if points}
    common = data.metrics.keys() & (against.metrics.keys() if against else set()) - {"pairs"}
    return render_page(
        "pipeline/evaluation/report.html.j2",
        subject=f"evaluation {config.folder} {data.key}",
        shown=data,
        links=links,
        config=config,
        curves=[
            (name, points[-1], line_chart([Measure("loss", [Series(0, points)], 130)], width=350))
            for name, points in drawn.items()
        ],
        last_loss={name: points[-1][1] for name, points in curves.items() if points},
        against=against,
        compared={name: value for name, value in data.metrics.items() if name in common},
        yaml=config_yaml(config, exclude_defaults=True),
    )


def _measures(result: Evaluation, conditions: Mapping[str, MaskedTokenPredictions]) -> list[MeasureRow]:
    """Return the rows of everything but retrieval."""
    rows, sections = [], result.sections
    if vqa := sections["vqa"]:
        note = f"{vqa['questions']} questions; {percent(vqa['accuracy_without_model'])} by one answer to all"
        rows.append(MeasureRow("Questions answered (VQA accuracy)", vqa["accuracy"], note))
    if nlvr2 := sections["nlvr2"]:
        note = f"{nlvr2['statements']} statements; {percent(nlvr2['accuracy_without_model'])} by the frequent label"
        rows.append(MeasureRow("Statements judged rightly", nlvr2["accuracy"], note))
        if nlvr2["consistency"] is not None:
            note = "correct for all images of a sentence"
            rows.append(MeasureRow("Sentences judged rightly throughout", nlvr2["consistency"], note))
    for prefix, name in (("Top", "classification"), ("Zero-shot top", "zero_shot")):
        if classes := sections[name]:
            note = f"{classes['images']} images; chance {percent(classes['chance'])}"
            rows.append(MeasureRow(f"{prefix}-1 accuracy", classes["top1"], note))
            rows.append(MeasureRow(f"{prefix}-5 accuracy", classes["top5"]))
    if probe := sections["linear_probe"]:
        note = f"{probe['images']} images, trained on {probe['trained_on']}; chance {percent(probe['chance'])}"
        rows.append(MeasureRow("Linear probe top-1 accuracy", probe["top1"], note))
    first = next(iter(conditions.values()), None)
    for name, predictions in conditions.items():
        note = f"{len(predictions.tokens)} masked tokens, the same for every row" if predictions is first else ""
        if name == OTHER and first is not None:
            note = f"own image {100 * (first.accuracy - predictions.accuracy):+z.1f} points"
        rows.append(MeasureRow(f"Masked words guessed, {name}", predictions.accuracy, note))
    if itm := sections["itm"]:
        matched, mismatched = percent(itm["accuracy_matched"]), percent(itm["accuracy_mismatched"])
        note = f"{matched} of the true pairs, {mismatched} of the false; chance {percent(0.5)}"
        rows.append(MeasureRow("Captions matched with their images", itm["accuracy"], note, 0.5))
    if (patches := result.reconstruction) is not None:
        note = f"{percent(patches.error_without_model)} without a model: mean colour alone; in units of full scale"
        name = f"Error of filled patches ({patches.stage})"
        rows.append(MeasureRow(name, patches.error, note, patches.error_without_model))
    return rows


def _retrievals(ranked: BothDirections[Ranked], held_out: EvalPairs) -> Retrievals:
    """Return the clearest successes and failures of both directions, at most one of each image."""
    texts = list(itertools.chain(*held_out.captions))
    image_id, caption_of = held_out.image_id, held_out.caption_of.tolist()
    of_image, of_caption = ranked
    by_image, by_caption = (direction.margin.argsort(descending=True, stable=True).tolist() for direction in ranked)
    cards_of_images: list[list[CaptionsOfImage]] = []
    for chosen in _ends(by_image, by_image):
        cards_of_images.append([])
        for image in chosen:
            best = of_image.best[image, :CANDIDATES]
            right = (image_id[held_out.caption_of[best]] == image_id[image]).tolist()
            listed = zip([texts[i] for i in best.tolist()], right, of_image.score[image].tolist(), strict=False)
            truth = [] if any(right) else list(held_out.captions[image])
            shown, rank = thumbnail(held_out.image(image)), int(of_image.rank[image])
            cards_of_images[-1].append(CaptionsOfImage(shown, rank, list(listed), truth))
    cards_of_captions: list[list[ImagesOfCaption]] = []
    for chosen in _ends(by_caption, [caption_of[caption] for caption in by_caption]):
        cards_of_captions.append([])
        for caption in chosen:
            own, best = caption_of[caption], of_caption.best[caption, :CANDIDATES]
            right = (image_id[best] == image_id[own]).tolist()
            images = [thumbnail(held_out.image(i)) for i in best.tolist()]
            candidates = list(zip(images, right, of_caption.score[caption].tolist(), strict=False))
            own_image = None if any(right) else thumbnail(held_out.image(own))
            card = ImagesOfCaption(texts[caption], int(of_caption.rank[caption]), candidates, own_image)
            cards_of_captions[-1].append(card)
    return Retrievals(cards_of_images[0], cards_of_images[1], cards_of_captions[0], cards_of_captions[1])


def _ends(order: list[int], group_of: list[int]) -> tuple[list[int], list[int]]:
    """Return the first and last few of `order`, at most one of each group, none in both."""
    firsts = dict(zip(reversed(group_of), reversed(order), strict=True))  # the first of each group
    lasts = dict(zip(group_of, order, strict=True))
    groups = list(dict.fromkeys(group_of))
    best_groups = groups[: min(SHOWN, (len(groups) + 1) // 2)]
    worst = [lasts[group] for group in dict.fromkeys(reversed(group_of)) if group not in best_groups][:SHOWN]
    return [firsts[group] for group in best_groups], worst


def _masked_captions(
    mlm: MaskedLanguage, held_out: EvalPairs, conditions: Mapping[str, MaskedTokenPredictions], tokenizer: Tokenizer
) -> dict[str, list[MaskedCaption]]:
    """Return captions where the right image helped most, where it misled most, and evenly spaced others."""
    caption_of, first, truth = held_out.caption_of.tolist(), mlm.masked.first(), mlm.masked.truth()
    order = list(range(len(held_out.tokens)))
    if mlm.own_image is None or mlm.other_image is None:
        chosen = {"even": order[:: max(1, len(order) // (3 * MASKED_SHOWN))][: 3 * MASKED_SHOWN]}
    else:
        gain = mlm.own_image.truth_probability - mlm.other_image.truth_probability
        of_caption = [gain[start:stop].mean().item() for start, stop in itertools.pairwise(first)]
        order.sort(key=lambda caption: -of_caption[caption])
        helped, misled = _ends(order, [caption_of[caption] for caption in order])
        shown = {caption_of[caption] for caption in helped + misled}
        rest = [caption for caption in range(len(order)) if caption_of[caption] not in shown]
        even = rest[:: max(1, len(rest) // MASKED_SHOWN)][:MASKED_SHOWN]
        chosen = {"helped": helped, "misled": misled, "even": even}

    cards: dict[str, list[MaskedCaption]] = {kind: [] for kind in chosen}
    for kind, caption in ((kind, caption) for kind, captions in chosen.items() for caption in captions):
        tokens, words, numbers = held_out.tokens[caption], [], {}
        masked_words = words_of(tokens.word_of[position] for position in mlm.masked.positions[caption])
        for number, (word, places) in enumerate(masked_words.items(), 1):
            rows = [first[caption] + place for place in places]
            predictions = []
            for name, condition in conditions.items():  # the best token of each masked piece, their joint probability
                best, probability = condition.tokens[rows, 0], condition.probabilities[rows, 0].prod().item()
                is_right = bool((best == truth[rows]).all())
                predictions.append((name, tokenizer.decode(best.tolist()), probability, is_right))
            words.append(MaskedWord(tokenizer.decode(truth[rows].tolist()), number, predictions))
            numbers[word] = number
        in_order = words_of(tokens.word_of).items()
        pieces = [(tokenizer.decode([tokens.ids[p] for p in places]), numbers.get(word)) for word, places in in_order]
        other = None if mlm.image_of_other is None else thumbnail(held_out.image(int(mlm.image_of_other[caption])))
        own = thumbnail(held_out.image(caption_of[caption]))
        cards[kind].append(MaskedCaption(own, other, pieces, words))
    return cards
