"""What a page shows of an evaluation: plain values and small pictures, kept in the run's folder as one JSON file.

The evaluation's own report is drawn from it at once; the campaign's report and another run's comparison are drawn from
the file, when the weights and the held-out pairs may be far away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from pipeline.data.storage import Storage, join

FOLDER = "evaluations"


@dataclass(frozen=True)
class RecallRow:
    """A line of the headline table: recall beside chance."""

    direction: str
    scores: str
    cells: list[tuple[float, float]]  # (recall, chance) at each k
    median_rank: float
    candidates: int


@dataclass(frozen=True)
class MeasureRow:
    """A line of another table: a share, what it is held against, and where on its bar that lies."""

    name: str
    share: float
    beside: str
    mark: float | None = None


@dataclass(frozen=True)
class CaptionsOfImage:
    picture: str
    rank: int
    found: list[tuple[str, bool, float]]  # caption, is right, similarity
    truth: list[str]  # its own captions, where none is among the found


@dataclass(frozen=True)
class ImagesOfCaption:
    caption: str
    rank: int
    found: list[tuple[str, bool, float]]  # picture, is right, similarity
    truth: str | None  # its own picture, where it is not among the found


@dataclass(frozen=True)
class WordGuess:
    """A masked word, and for each condition (guess, probability, is right)."""

    truth: str
    number: int
    guesses: list[tuple[str, float, bool] | None]


@dataclass(frozen=True)
class MaskedCaption:
    picture: str
    other_picture: str | None
    pieces: list[tuple[str, int | None]]  # words; the number of the masked one, or None
    words: list[WordGuess]


@dataclass(frozen=True)
class AlignedCaption:
    """A picture and, for each word of its caption, the patches it aligns to."""

    picture: str
    caption: str
    words: list[tuple[str, str, float]]  # word, heat map, share of the hottest patch


@dataclass(frozen=True)
class Alignments:
    captions: list[AlignedCaption] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the weights were not trained for


@dataclass(frozen=True)
class Shown:
    """One evaluation. Pictures are data URIs; a list is empty where the stage did not train what it shows."""

    name: str  # of the run
    stage: str
    source: str
    digest: str  # of the held-out data
    checkpoint: str
    at: int  # milliseconds since 1970
    pairs: int
    captions: int
    trained_on: list[str]
    metrics: dict[str, float]  # as MLflow has them, without `eval/<source>/`
    small_pictures: bool  # to be shown with their pixels
    retrieval_by: str
    retrieval_images: int
    reranked_best: int  # candidates a query; 0: none were read again
    ks: list[int]
    recall: list[RecallRow]
    fine_tuned: list[MeasureRow]
    masked_rows: list[MeasureRow]
    images: dict[str, list[CaptionsOfImage]]  # best, worst
    sentences: dict[str, list[ImagesOfCaption]]
    conditions: list[str]  # under which masked words were guessed
    masked: dict[str, list[MaskedCaption]]  # helped, misled, even
    reconstruction_stage: str
    reconstructions: list[tuple[str, str, str]]  # original, masked, filled in
    alignments: Alignments
    skipped: list[tuple[str, int]]  # held-out samples left out: reason, count


_JSON = TypeAdapter(Shown)


def keep(storage: Storage, folder: str, shown: Shown) -> None:
    """Beside the run, in the place of an earlier evaluation of the same stage and source."""
    storage.write(join(folder, FOLDER, f"{shown.stage}-{shown.source}.json"), _JSON.dump_json(shown))


def kept(storage: Storage, folder: str) -> list[Shown]:
    """The run's evaluations, the newest first; what another version wrote is passed over."""
    place = join(folder, FOLDER)
    found = (_parsed(storage.read(join(place, name))) for name in storage.list(place) if name.endswith(".json"))
    return sorted((each for each in found if each is not None), key=lambda each: -each.at)


def _parsed(data: bytes) -> Shown | None:
    try:
        return _JSON.validate_json(data)
    except ValidationError:
        return None
