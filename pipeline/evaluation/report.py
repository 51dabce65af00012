"""The report of an evaluation: one HTML file that needs nothing else, with its pictures inside.

What is shown is chosen by rule, not by eye: retrievals by the margin between the best right and the best wrong
candidate, masked words by how much the right picture changed the truth's probability, both ends of each.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.curves import Curve, curve
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.masked_language import Guesses, words_of
from pipeline.evaluation.retrieval import Ranked, Recall

THUMBNAIL = 160  # pixels at most
LOSSLESS = 96  # pictures up to this side are kept exact
SHOWN = 4  # retrievals at each end
CANDIDATES = 5  # of each retrieval
MASKED_SHOWN = 4  # captions of each kind
RECONSTRUCTIONS_SHOWN = 6
REASONS_SHOWN = 8

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class RecallRow:
    """A line of the headline table: recall beside chance."""

    direction: str
    scores: str
    cells: list[tuple[float, float]]  # (recall, chance) at each k
    median_rank: float
    candidates: int


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


def write_report(
    found: Evaluation,
    config: RunConfig,
    tokenizer: Tokenizer,
    page: Path,
    curves: Curves | None = None,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Writes the page. `curves` holds each stage's (step, loss); `digests` each source's manifest digest."""
    page.write_text(render(found, config, tokenizer, curves or {}, digests or {}), encoding="utf-8")


def render(
    found: Evaluation, config: RunConfig, tokenizer: Tokenizer, curves: Curves, digests: Mapping[str, str]
) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    held_out = found.held_out
    return environment.get_template("report.html.j2").render(
        found=found,
        config=config,
        curves=[_drawn(name, points) for name, points in curves.items() if points],
        last_loss={name: points[-1][1] for name, points in curves.items() if points},
        digests={**digests, found.source: held_out.digest},
        recall=_recall_rows(found),
        ks=list(found.retrieval.image_to_text.at) if found.retrieval else [],
        mlm=_mlm_rows(found),
        images=_image_galleries(found),
        captions=_caption_galleries(found),
        masked=_masked_captions(found, tokenizer),
        conditions=[name for name, _ in _conditions(found)],
        reconstructions=_reconstructions(found),
        fine_tuned=_fine_tuned_rows(found),
        skipped=sorted(held_out.skipped.items(), key=lambda each: -each[1])[:REASONS_SHOWN],
        yaml=yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def percent(fraction: float | None) -> str:
    """'12.5 %' with a space that does not break: one decimal, two below one percent; a dash where there is no value."""
    if fraction is None:
        return "–"
    return f"{fraction * 100:.{2 if 0 < round(fraction, 4) < 0.01 else 1}f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _drawn(name: str, points: Sequence[tuple[int, float]]) -> Curve:
    return curve(name, sorted(points))


def _recall_rows(found: Evaluation) -> list[RecallRow]:
    rows = []
    captions = int((found.held_out.caption_of < found.retrieval_images).sum())
    for scores, retrieval in (
        ({"itc": "contrastive", "itm": "matching", "ranking": "ranking"}[found.retrieval_by], found.retrieval),
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


def _mlm_rows(found: Evaluation) -> list[tuple[str, float]]:
    return [(name, guesses.accuracy) for name, guesses in _conditions(found)]


def _conditions(found: Evaluation) -> list[tuple[str, Guesses]]:
    """The ways masked words were guessed, as the report names them."""
    if found.mlm is None:
        return []
    named = [
        ("own picture", found.mlm.own_image),
        ("another picture", found.mlm.other_image),
        ("text only", found.mlm.text_only),
        *((f"text only, {name} stage", guesses) for name, guesses in found.language_stages.items()),
    ]
    return [(name, guesses) for name, guesses in named if guesses is not None]


def _fine_tuned_rows(found: Evaluation) -> list[tuple[str, float, str]]:
    """(measure, share, what to hold it against) of what fine-tuning trained."""
    rows: list[tuple[str, float, str]] = []
    if (answering := found.answering) is not None:
        beside = f"{answering.questions} questions; {percent(answering.accuracy_without_model)} by one answer to all"
        rows.append(("Questions answered (VQA accuracy)", answering.accuracy, beside))
    if (reasoning := found.reasoning) is not None:
        beside = f"{reasoning.statements} statements; {percent(reasoning.accuracy_without_model)} by the frequent label"
        rows.append(("Statements judged rightly", reasoning.accuracy, beside))
        if reasoning.consistency is not None:
            rows.append(("Sentences judged rightly throughout", reasoning.consistency, "all pictures of a sentence"))
    if (classified := found.classification) is not None:
        beside = f"{classified.pictures} pictures; chance {percent(classified.chance)}"
        rows.append(("Class named first", classified.top1, beside))
        rows.append(("Class among the first five", classified.top5, ""))
    if (named := found.zero_shot) is not None:
        beside = f"{named.pictures} pictures; chance {percent(named.chance)}"
        rows.append(("Class named first, told by its name alone", named.top1, beside))
        rows.append(("Class among the first five, by its name alone", named.top5, ""))
    if (probed := found.linear_probe) is not None:
        beside = f"{probed.pictures} pictures, trained on {probed.trained_on}; chance {percent(probed.chance)}"
        rows.append(("Class named first by a linear classifier", probed.top1, beside))
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
        return CaptionsOfImage(thumbnail(held_out.picture(image)), int(ranked.place[image]), list(listed), truth)

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
        pictures = [thumbnail(held_out.picture(i)) for i in best.tolist()]
        truth = None if any(right) else thumbnail(held_out.picture(image))
        listed = list(zip(pictures, right, ranked.score[caption].tolist(), strict=False))
        return ImagesOfCaption(texts[caption], int(ranked.place[caption]), listed, truth)

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
    other = None if mlm.image_of_other is None else held_out.picture(int(mlm.image_of_other[caption]))
    return MaskedCaption(
        picture=thumbnail(held_out.picture(int(held_out.caption_of[caption]))),
        other_picture=None if other is None else thumbnail(other),
        pieces=_pieces(tokens.ids, tokens.word_of, number_of, tokenizer),
        words=guesses,
    )


def _word_guess(
    guesses: Guesses, places: list[int], found: Evaluation, tokenizer: Tokenizer
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
    """A picture (H, W, 3) uint8 as a data URI, at most THUMBNAIL pixels wide; small ones without loss."""
    picture = Image.fromarray(image.numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, options = ("PNG", {"optimize": True}) if max(picture.size) <= LOSSLESS else ("JPEG", {"quality": 80})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
