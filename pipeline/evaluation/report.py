"""The report of an evaluation: its values as JSON and its thumbnails as a zip in the run's folder, and its HTML page.

The files may come from an untrusted writer: images are data URIs, never addresses, and damaged files are skipped.
Examples are chosen by rule: retrievals by the margin between the best right and the best wrong candidate, masked words
by how much the right image changed the probability of the truth, both ends of each.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import logging
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.schema import RunConfig
from pipeline.config.urls import file_name_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import NotFound, Storage, join
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.masked import OTHER, OWN, MaskedLanguage, words_of
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
# Section of the JSON, its value, the measure's name, a note, and the baseline marked on the bar: a value or a number.
MEASURES: tuple[tuple[str, str, str, str, str | float | None], ...] = (
    ("vqa", "accuracy", "Questions answered (VQA accuracy)",
     "{questions} questions; {accuracy_without_model} by one answer to all", None),
    ("nlvr2", "accuracy", "Statements judged correctly",
     "{statements} statements; {accuracy_without_model} by the frequent label", None),
    ("nlvr2", "consistency", "Sentences judged correctly for all images", "consistency (NLVR2)", None),
    ("classification", "top1", "Top-1 accuracy", "{images} images; chance {chance}", None),
    ("classification", "top5", "Top-5 accuracy", "", None),
    ("zero_shot", "top1", "Zero-shot top-1 accuracy", "{images} images; chance {chance}", None),
    ("zero_shot", "top5", "Zero-shot top-5 accuracy", "", None),
    ("linear_probe", "top1", "Linear probe top-1 accuracy",
     "{images} images, trained on {trained_on}; chance {chance}", None),
    ("itm", "accuracy", "Matching accuracy",
     f"{{accuracy_matched}} of the true pairs, {{accuracy_mismatched}} of the false; chance {percent(0.5)}", 0.5),
    ("reconstruction", "error", "Masked-patch error, lower is better ({stage})",
     "{error_without_model} without a model: mean colour alone; in units of full scale", "error_without_model"),
)  # fmt: skip

Curves = Mapping[str, Sequence[tuple[int, float]]]
IMAGE_URI = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")
IMAGE_FILE = "image:"  # prefix of the JSON's references to files of the zip
ImageUri = Annotated[str, Field(pattern=f"^{IMAGE_URI.pattern}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Query = TypeVar("Query")
Candidate = TypeVar("Candidate")


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
class Retrieval(Generic[Query, Candidate]):
    """The best candidates of a query; images are data URIs, and texts are captions."""

    query: Query
    rank: int
    candidates: list[tuple[Candidate, bool, Number]]  # candidate, is right, similarity
    truth: Candidate | None  # its own candidate, if none was retrieved


@dataclass(frozen=True)
class Retrievals:
    best_images: list[Retrieval[ImageUri, str]]
    worst_images: list[Retrieval[ImageUri, str]]
    best_captions: list[Retrieval[str, ImageUri]]
    worst_captions: list[Retrieval[str, ImageUri]]


@dataclass(frozen=True)
class MaskedCaption:
    image: ImageUri
    other_image: ImageUri | None
    pieces: list[tuple[str, int | None]]  # words; the number from 1 of the masked one, or None
    # The masked words: each with its predictions (condition, prediction, probability, is right).
    words: list[tuple[str, list[tuple[str, str, Number, bool]]]]


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
    result: dict[str, Any]  # `Evaluation.to_json`


_JSON = TypeAdapter(ReportData)


def save_report_data(storage: Storage, folder: str, data: ReportData) -> None:
    """Write the data next to the weights, replacing an earlier evaluation of the same weights and name.

    The JSON holds numbers and texts, and names each image in the zip next to it. The zip is named by its content and
    written first, so that an interrupted write leaves the earlier evaluation whole.
    """
    step = "" if data.key.step is None else f"@step-{data.key.step}"
    stem = file_name_of(f"{data.key.stage}-{data.key.name}{step}")
    images: dict[str, str] = {}  # data URI -> file in the zip

    def without_images(value: Any) -> Any:
        if isinstance(value, str) and IMAGE_URI.fullmatch(value):
            return images.setdefault(value, f"{IMAGE_FILE}{len(images):03}.{value[11:14].replace('jpe', 'jpg')}")
        if isinstance(value, dict):
            return {key: without_images(own) for key, own in value.items()}
        return [without_images(own) for own in value] if isinstance(value, list) else value

    values, packed = without_images(_JSON.dump_python(data, mode="json")), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for uri, name in images.items():
            archive.writestr(zipfile.ZipInfo(name.removeprefix(IMAGE_FILE)), base64.b64decode(uri.partition(",")[2]))
    digest = hashlib.sha256(packed.getvalue()).hexdigest()[:12]
    archive_name = f"{stem}.images-{digest}.zip" if images else None
    if archive_name:
        storage.write(join(folder, FOLDER, archive_name), packed.getvalue())
    text = json.dumps({"evaluation": values, "images": archive_name}, indent=1).encode()
    storage.write(join(folder, FOLDER, f"{stem}.json"), text)
    for name in storage.list(join(folder, FOLDER)):
        if name.startswith(f"{stem}.images-") and name != archive_name:
            storage.delete(join(folder, FOLDER, name))


def load_report_data(storage: Storage, folder: str) -> list[ReportData]:
    """Load the run's evaluations, newest first; skip damaged files and other versions with a warning."""
    evaluations = []
    for url in (join(folder, FOLDER, name) for name in storage.list(join(folder, FOLDER)) if name.endswith(".json")):
        try:
            stored = json.loads(storage.read(url))
            values, images = stored["evaluation"], dict[str, str]()
            if archive_name := stored["images"]:
                if not re.fullmatch(r"[^/\\]+\.images-[0-9a-f]{12}\.zip", archive_name):
                    raise ValueError(f"{archive_name!r:.60} is no name of a file of images")
                with zipfile.ZipFile(io.BytesIO(storage.read(join(folder, FOLDER, archive_name)))) as archive:
                    for entry in archive.infolist():
                        kind = {"png": "png", "jpg": "jpeg"}[entry.filename.rpartition(".")[2]]
                        if entry.compress_type != zipfile.ZIP_STORED:
                            raise ValueError(f"{archive_name} holds compressed images")
                        content = base64.b64encode(archive.read(entry)).decode()
                        images[IMAGE_FILE + entry.filename] = f"data:image/{kind};base64,{content}"
            text = json.dumps(values)
            for name, uri in images.items():
                text = text.replace(json.dumps(name), json.dumps(uri))
            evaluations.append(_JSON.validate_json(text))
        except (
            ValidationError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
            zipfile.BadZipFile,
            NotFound,
        ) as error:
            fault = str(error)[:200]
            if isinstance(error, ValidationError):
                fault = f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}"
            log.warning("%s: damaged, or written by another version; skipped (%s)", url, fault)
    return sorted(evaluations, key=lambda data: -data.at)


def headline(evaluations: Sequence[ReportData]) -> ReportData:
    """Return the evaluation that represents the run, out of several with the newest first.

    One of fewer samples, other data or other weights never replaces the one that the run's config defines.
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
    recall, measures = [], []
    num_captions = int((held_out.caption_of < result.retrieval_images).sum())
    sizes = (("Image → text", num_captions), ("Text → image", result.retrieval_images))
    best = f"best {result.reranked_best} reranked"
    for scores, recalls in ((str(result.retrieval_by), result.retrieval), (best, result.reranked)):
        for (direction, candidates), own in zip(sizes, recalls or (), strict=False):
            cells = [(int(k.removeprefix("r")), own.values[k], chance) for k, chance in own.chance.items()]
            recall.append(RecallRow(direction, scores, cells, own.values["median_rank"], candidates))

    predictions = {} if mlm is None else mlm.predictions
    for number, (condition, predicted) in enumerate(predictions.items()):
        note = f"{len(predicted.tokens)} masked tokens, the same for every row" if number == 0 else ""
        if condition == OTHER:
            note = f"own image {100 * (predictions[OWN].accuracy - predicted.accuracy):+z.1f} points"
        measures.append(MeasureRow(f"Masked words guessed, {condition}", predicted.accuracy, note))
    for section, key_of_value, name, note, baseline in MEASURES:
        values = result.sections[section]
        if values is not None and values[key_of_value] is not None:
            shown = {k: percent(v) if isinstance(v, float) else v for k, v in values.items()}
            mark = values[baseline] if isinstance(baseline, str) else baseline
            measures.append(MeasureRow(name.format(**shown), values[key_of_value], note.format(**shown), mark))

    rows = () if patches is None else zip(patches.original, patches.masked, patches.filled, strict=True)
    reconstructions = [
        (thumbnail(original), thumbnail(hidden), thumbnail(filled))
        for original, hidden, filled in itertools.islice(rows, RECONSTRUCTIONS_SHOWN)
    ]
    return ReportData(
        run=config.name, key=key or EvalKey(result.stage, None, result.source, held_out.digest),
        checkpoint=result.checkpoint, at=time.time_ns() // 1_000_000, pairs=len(held_out),
        captions=len(held_out.tokens), trained_on=list(result.trained_on),
        metrics={name.removeprefix(f"eval/{result.source}/"): value for name, value in result.metrics().items()},
        small_images=config.model.image_size <= LOSSLESS, retrieval_by=result.retrieval_by,
        retrieval_images=result.retrieval_images, reranked_best=result.reranked_best if result.reranked else 0,
        recall=recall, measures=measures,
        retrievals=None if result.rankings is None else _retrievals(result.rankings, held_out),
        masked={} if mlm is None else _masked_captions(mlm, held_out, tokenizer), alignments=alignments,
        reconstruction_stage="" if patches is None else patches.stage, reconstructions=reconstructions,
        skipped=sorted(held_out.skipped.items(), key=lambda entry: -entry[1])[:REASONS_SHOWN],
        result=result.to_json(),
    )  # fmt: skip


def render_report(
    data: ReportData,
    config: RunConfig,
    curves: Curves,
    against: ReportData | None = None,
    links: Sequence[tuple[ReportData, str]] = (),
    run_page: str = "",
) -> str:
    """Render the page with another run's evaluation, and links to this run's other pages, relative to this one."""
    drawn = [(name, sorted(points)) for name, points in curves.items() if points]
    charts = [(name, p[-1], line_chart([Measure("loss", [Series(0, p)], 130)], width=350)) for name, p in drawn]
    common = data.metrics.keys() & (against.metrics.keys() if against else set()) - {"pairs"}
    return render_page(
        "pipeline/evaluation/report.html.j2", f"evaluation {config.folder} {data.key}", shown=data,
        links=links, run_page=run_page, config=config, curves=charts, against=against,
        yaml=config_yaml(config, exclude_defaults=True),
        last_loss={name: points[-1][1] for name, points in curves.items() if points},
        compared={name: value for name, value in data.metrics.items() if name in common},
    )  # fmt: skip


def _retrievals(ranked: BothDirections[Ranked], held_out: EvalPairs) -> Retrievals:
    """Return the clearest successes and failures of both directions, at most one of each image."""
    texts, image_id = list(itertools.chain(*held_out.captions)), held_out.image_id
    caption_id, cards = image_id[held_out.caption_of], list[list[Retrieval[Any, Any]]]()
    for is_image, own, query_id, candidate_id, image_of in (  # is_image: the queries are images
        (True, ranked.image_to_text, image_id, caption_id, list(range(len(held_out)))),
        (False, ranked.text_to_image, caption_id, image_id, held_out.caption_of.tolist()),
    ):
        order = own.margin.argsort(descending=True, stable=True).tolist()
        for chosen in _ends(order, [image_of[query] for query in order]):
            cards.append([])
            for query in chosen:
                best, image = own.best[query, :CANDIDATES], image_of[query]
                right = (candidate_id[best] == query_id[query]).tolist()
                shown = [texts[i] if is_image else thumbnail(held_out.image(i)) for i in best.tolist()]
                candidates = list(zip(shown, right, own.score[query].tolist(), strict=False))
                drawn = thumbnail(held_out.image(image))
                pair = (drawn, held_out.captions[image][0]) if is_image else (texts[query], drawn)
                truth = None if any(right) else pair[1]
                cards[-1].append(Retrieval(pair[0], int(own.rank[query]), candidates, truth))
    return Retrievals(*cards)


def _ends(order: list[int], group_of: list[int]) -> tuple[list[int], list[int]]:
    """Return the first and last few of `order`, at most one of each group, none in both."""
    firsts = dict(zip(reversed(group_of), reversed(order), strict=True))  # the first of each group
    lasts = dict(zip(group_of, order, strict=True))
    groups = list(dict.fromkeys(group_of))
    best_groups = groups[: min(SHOWN, (len(groups) + 1) // 2)]
    worst = [lasts[group] for group in dict.fromkeys(reversed(group_of)) if group not in best_groups][:SHOWN]
    return [firsts[group] for group in best_groups], worst


def _masked_captions(mlm: MaskedLanguage, held_out: EvalPairs, tokenizer: Tokenizer) -> dict[str, list[MaskedCaption]]:
    """Return captions where the right image helped most, where it misled most, and evenly spaced others."""
    caption_of, truth = held_out.caption_of.tolist(), next(iter(mlm.predictions.values())).truth
    first = list(itertools.accumulate(map(len, mlm.masked.labels), initial=0))  # of each caption's tokens among all
    order = list(range(len(held_out.tokens)))
    if mlm.image_of_other is None:
        chosen = {"even": order[:: max(1, len(order) // (3 * MASKED_SHOWN))][: 3 * MASKED_SHOWN]}
    else:
        gain = mlm.predictions[OWN].truth_probability - mlm.predictions[OTHER].truth_probability
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
            for name, predicted in mlm.predictions.items():  # the best token of each masked piece, their probability
                best, probability = predicted.tokens[rows, 0], predicted.probabilities[rows, 0].prod().item()
                is_right = bool((best == truth[rows]).all())
                predictions.append((name, tokenizer.decode(best.tolist()), probability, is_right))
            words.append((tokenizer.decode(truth[rows].tolist()), predictions))
            numbers[word] = number
        in_order = words_of(tokens.word_of).items()
        pieces = [(tokenizer.decode([tokens.ids[p] for p in places]), numbers.get(word)) for word, places in in_order]
        other = None if mlm.image_of_other is None else thumbnail(held_out.image(int(mlm.image_of_other[caption])))
        own = thumbnail(held_out.image(caption_of[caption]))
        cards[kind].append(MaskedCaption(own, other, pieces, words))
    return cards
