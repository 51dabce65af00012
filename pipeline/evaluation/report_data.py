"""The values and thumbnails that pages show of an evaluation, stored in the run's folder as one JSON file.

The evaluation's own report is rendered from it at once; the run's report and comparisons with other runs are rendered
from the file, without the weights and the held-out pairs. The file may come from an untrusted writer: images are data
URIs, never addresses, and inconsistent files are skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.urls import file_name_of
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

FOLDER = "evaluations"
LATEST = 4_000_000_000_000  # milliseconds since 1970: the year 2096

ImageUri = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")]
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class EvalKey:
    """The identity of an evaluation: its weights, and its data under a name."""

    stage: str
    step: int | None  # of a checkpoint; None: the final weights of the stage
    name: str
    digest: str  # of the data
    limit: int | None  # number of samples; None: all
    source_type: str  # type of the source
    is_headline: bool  # of the run's own held-out source, as its config asks for it, with the stage's last weights

    def is_of_same_data(self, other: EvalKey) -> bool:
        return (self.digest, self.limit, self.source_type) == (other.digest, other.limit, other.source_type)

    @property
    def data(self) -> str:
        """Describe the data."""
        extent = "all samples" if self.limit is None else f"the first {self.limit} samples"
        return f"digest {self.digest[:12]}…, {extent}, of type {self.source_type}"


@dataclass(frozen=True)
class RecallRow:
    """A row of the retrieval table: recall compared with chance."""

    direction: str
    scores: str
    cells: list[tuple[Number, Number]]  # (recall, chance) at each k
    median_rank: Number
    candidates: int


@dataclass(frozen=True)
class MeasureRow:
    """A row of another table: a fraction with a note, and the baseline that is marked on its bar."""

    name: str
    value: Number
    note: str
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
class MaskedWord:
    """A masked word, and for each condition (prediction, probability, is right)."""

    truth: str
    number: int
    predictions: list[tuple[str, Number, bool]]


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
    """The contents of one report. Images are data URIs; a list is empty where the stage did not train its objective."""

    name: str  # of the run
    stage: str
    source: str
    digest: str  # of the held-out data
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
    ks: list[int]
    recall: list[RecallRow]
    fine_tuned: list[MeasureRow]
    masked_rows: list[MeasureRow]
    images: dict[str, list[CaptionsOfImage]]  # best, worst
    sentences: dict[str, list[ImagesOfCaption]]
    conditions: list[str]  # under which masked words were predicted
    masked: dict[str, list[MaskedCaption]]  # helped, misled, even
    reconstruction_stage: str
    reconstructions: list[tuple[ImageUri, ImageUri, ImageUri]]  # original, masked, filled in
    alignments: Alignments
    skipped: list[tuple[str, int]]  # held-out samples left out: reason, count
    step: int | None = None  # these, and `is_headline`: see `EvalKey`
    limit: int | None = None
    source_type: str = "pairs"
    is_headline: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an inconsistency that pages could not render."""
        if self.recall and (not self.ks or any(len(row.cells) != len(self.ks) for row in self.recall)):
            raise ValueError("recall is missing for some k")
        for name, gallery in (("images", self.images), ("sentences", self.sentences)):
            if gallery and not {"best", "worst"} <= gallery.keys():
                raise ValueError(f"{name} lacks its best or worst examples")
        if bool(self.images) != bool(self.sentences):
            raise ValueError("one of two galleries is missing")
        words = [word for captions in self.masked.values() for caption in captions for word in caption.words]
        if any(len(word.predictions) != len(self.conditions) for word in words):
            raise ValueError("masked words lack predictions for some condition")

    @property
    def key(self) -> EvalKey:
        return EvalKey(self.stage, self.step, self.source, self.digest, self.limit, self.source_type, self.is_headline)


_JSON = TypeAdapter(ReportData)


def save_report_data(storage: Storage, folder: str, data: ReportData) -> None:
    """Write the data next to the weights, replacing an earlier evaluation of the same weights and name."""
    step = "" if data.step is None else f"@step-{data.step}"
    name = file_name_of(f"{data.stage}-{data.source}{step}.json")
    storage.write(join(folder, FOLDER, name), _JSON.dump_json(data))


def load_report_data(storage: Storage, folder: str) -> list[ReportData]:
    """Load the run's evaluations, newest first; skip damaged files and other versions with a warning."""
    evaluations = []
    for name in storage.list(join(folder, FOLDER)):
        if name.endswith(".json"):
            url = join(folder, FOLDER, name)
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
    complete = [evaluation for evaluation in evaluations if evaluation.limit is None and evaluation.step is None]
    return next((evaluation for evaluation in evaluations if evaluation.is_headline), (complete or evaluations)[0])
