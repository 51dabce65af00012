"""Explanation of a model on one image and one text: the patches each word aligns to, and predictions of each word.

Patches are those that optimal transport assigns to the word's final features (`objectives.wpa`), as in ViLT's figure 4.
For the predictions each word is masked in turn, with and without the image. An explanation is drawn as one HTML file or
one PNG, and in the report of an evaluation.

Shapes: H x W pixels as the model reads them, G x C rows and columns of patches, L tokens, P = GC patches.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.images import resize_for
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked_language import MaskedCaptions, MaskedTokenPredictions, predict_masked_tokens
from pipeline.evaluation.report_data import AlignedCaption, Alignments
from pipeline.evaluation.retrieval import eval_mode
from pipeline.models.forward import ForwardInput
from pipeline.models.model import Model
from pipeline.objectives import modules_for
from pipeline.objectives.wpa import wpa_cost, wpa_distance, wpa_plan
from pipeline.pages.page import data_uri, render_page, thumbnail


@dataclass(frozen=True)
class Guess:
    word: str
    probability: float
    is_right: bool


@dataclass(frozen=True)
class Condition:
    """The best predictions for a masked word, and the probability of the true word."""

    guesses: tuple[Guess, ...]
    truth_probability: float


@dataclass(frozen=True)
class ExplainedWord:
    word: str
    heat: Tensor  # (G, C) float32: fraction of the word assigned to each patch
    with_image: Condition
    without_image: Condition


@dataclass(frozen=True)
class Explanation:
    picture: Tensor  # (H, W, 3) uint8, as the model reads it
    words: tuple[ExplainedWord, ...]
    distance: float  # cost of the plan: 0 where words equal their patches, 1 where they are orthogonal


def explain(model: Model, tokenizer: Tokenizer, picture: np.ndarray, text: str, max_text_length: int) -> Explanation:
    """Explain the model on an image (H, W, 3) uint8 with a text of at most `max_text_length` tokens; the rest is cut.

    The model has the heads `alignment` and `mlm`. Raises DataError where no token is left of the text.
    """
    tokens = tokenizer.encode(text, max_text_length)
    words = positions_of_words(tokens)
    if not words:
        raise DataError(f"no token is left of the text {text!r}; give at least one word")
    shown = torch.from_numpy(resize_for(picture, model.config).copy())
    plan, distance = _plan(model, shown, tokens)
    masked = mask_each(tokens, words, tokenizer.mask_id)
    every_word = torch.zeros(len(words), dtype=torch.int64)
    with_image = predict_masked_tokens(model, masked, tokenizer.pad_id, shown[None], every_word)
    without_image = predict_masked_tokens(model, masked, tokenizer.pad_id)
    columns = shown.shape[1] // model.config.patch_size
    first = masked.first()
    explained = [
        ExplainedWord(
            word=tokenizer.decode(tokens.ids[position] for position in places),
            heat=share_of(plan, places).view(-1, columns),
            with_image=_condition(with_image, masked, first[number : number + 2], tokenizer),
            without_image=_condition(without_image, masked, first[number : number + 2], tokenizer),
        )
        for number, places in enumerate(words)
    ]
    return Explanation(shown, tuple(explained), distance)


def untrained_notes(config: RunConfig, stage_name: str) -> list[str]:
    """Return a note for each part of an explanation that neither this stage nor an earlier one trained."""
    index = config.stages.index(config.stage_named(stage_name))
    before = config.stages[: index + 1]
    notes = []
    if not any("wpa" in stage.objectives for stage in before):
        notes.append("No stage trained wpa: the drawn alignment comes from features that were not trained for it.")
    if not any("mlm" in stage.objectives for stage in before):
        notes.append("No stage trained mlm: the guesses are those of an untrained head.")
    elif not any("mlm" in s.objectives and config.source_type_of(s) == "pairs" for s in before):
        notes.append("No stage trained mlm with images: only the predictions without an image were trained.")
    return notes


def positions_of_words(tokens: Tokens) -> list[list[int]]:
    """Return the positions of each word's tokens, in text order."""
    words: dict[int, list[int]] = {}
    for position, word in enumerate(tokens.word_of):
        if word >= 0:
            words.setdefault(word, []).append(position)
    return list(words.values())


def mask_each(tokens: Tokens, words: Sequence[Sequence[int]], mask_id: int) -> MaskedCaptions:
    """Return one masked copy of the text per word."""
    rows = tuple(
        tuple(mask_id if position in places else token for position, token in enumerate(tokens.ids)) for places in words
    )
    labels = tuple(tuple(tokens.ids[position] for position in places) for places in words)
    return MaskedCaptions(rows, tuple(tuple(places) for places in words), labels)


def share_of(plan: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the distribution (P,) of the tokens at `positions` over patches, from a transport plan (L, P)."""
    moved = plan[list(positions)].sum(dim=0)
    return moved / moved.sum()


def _plan(model: Model, picture: Tensor, tokens: Tokens) -> tuple[Tensor, float]:
    """Return the transport plan (L, P) of a text and an image, and its cost."""
    with eval_mode(model) as device:
        forward_input = ForwardInput(
            heads=("alignment",), image=picture[None].to(device), text=torch.tensor([tokens.ids], device=device)
        )
        explanation = model({"only": forward_input})["only"]
        cost = wpa_cost(explanation["words"], explanation["patches"])
        plan = wpa_plan(cost, explanation["words_keep"], explanation["patches_keep"])
        return plan[0].cpu(), float(wpa_distance(cost, plan))


def _condition(
    guesses: MaskedTokenPredictions, masked: MaskedCaptions, span: Sequence[int], tokenizer: Tokenizer
) -> Condition:
    """Return the predictions of the word whose tokens are `span` (start, stop) among all masked tokens.

    A word of several tokens gets one prediction, the best of each token: second-best pieces do not form a word.
    """
    rows = slice(*span)
    truth = masked.truth()[rows]
    ranks = range(guesses.tokens.shape[1] if len(truth) == 1 else 1)
    best = [
        Guess(
            word=tokenizer.decode(guesses.tokens[rows, rank].tolist()),
            probability=guesses.probabilities[rows, rank].prod().item(),
            is_right=bool((guesses.tokens[rows, rank] == truth).all()),
        )
        for rank in ranks
    ]
    return Condition(tuple(best), guesses.truth_probability[rows].prod().item())


PANEL = 224  # pixels of a panel's longer side
LINE = 15  # pixels of a line of text below it
COLUMNS = 4
HOT = np.array([215, 48, 31])
MAX_OPACITY = 0.8  # opacity of the hottest patch


def explanation_html(explanation: Explanation, text: str, heading: str, notes: Sequence[str]) -> str:
    """Render an HTML page; `notes` state what the checkpoint was not trained for."""
    return render_page(
        "explain.html.j2",
        [Path(__file__).parent],
        subject=explanation_subject(explanation, text, heading),
        found=explanation,
        text=text,
        heading=heading,
        notes=notes,
        picture=_uri(_enlarged(explanation)),
        panels=[(word, _uri(draw_heat_map(explanation, word))) for word in explanation.words],
    )


def explanation_subject(explanation: Explanation, text: str, heading: str) -> str:
    """Return an identifier of an explanation: weights, image and text."""
    return f"explanation {heading} {text} {hashlib.sha256(explanation.picture.numpy().tobytes()).hexdigest()}"


def explanation_png(explanation: Explanation, text: str, heading: str, notes: Sequence[str]) -> Image.Image:
    """Draw an explanation as one image: heat maps in rows, with each word and its predictions below."""
    font = ImageFont.load_default(12)
    panels = [_enlarged(explanation), *(draw_heat_map(explanation, word) for word in explanation.words)]
    captions = [["the image"], *(_lines(word) for word in explanation.words)]
    height = panels[0].height
    width = max([PANEL, *(round(font.getlength(line)) for lines in captions for line in lines)])
    cell = (width + 16, height + LINE * max(map(len, captions)) + 24)
    top = 16 + LINE * (2 + len(notes)) + 8
    columns = min(COLUMNS, len(panels))
    page = Image.new("RGB", (16 + columns * cell[0], top + -(-len(panels) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate([heading, text, *notes]):
        draw.text((16, 12 + number * LINE), line, "black", font)
    for number, (picture, lines) in enumerate(zip(panels, captions, strict=True)):
        row, column = divmod(number, columns)
        left, upper = 16 + column * cell[0], top + row * cell[1]
        page.paste(picture, (left, upper))
        for place, line in enumerate(lines):
            draw.text((left, upper + height + 4 + place * LINE), line, "black", font)
    return page


def draw_heat_map(explanation: Explanation, word: ExplainedWord) -> Image.Image:
    """Draw the image in grey, redder where more of the word goes; each word's hottest patch is equally red."""
    picture = _enlarged(explanation)
    grey = np.asarray(picture.convert("L").convert("RGB")).astype(np.float32)
    heat = Image.fromarray((word.heat / word.heat.max()).numpy().astype(np.float32))
    # Patches stay squares: smoothing would show a finer map than there is.
    weight = MAX_OPACITY * np.asarray(heat.resize(picture.size, Image.Resampling.NEAREST))[:, :, None]
    return Image.fromarray((grey * (1 - weight) + HOT * weight).round().astype(np.uint8))


def _enlarged(explanation: Explanation) -> Image.Image:
    picture = Image.fromarray(explanation.picture.numpy())
    scale = PANEL / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _lines(word: ExplainedWord) -> list[str]:
    hottest = f"{word.word}  (hottest patch {word.heat.max():.0%})"
    return [hottest, f"with: {_guesses_text(word.with_image)}", f"without: {_guesses_text(word.without_image)}"]


def _guesses_text(condition: Condition) -> str:
    return ", ".join(f"{guess.word} {guess.probability:.0%}" for guess in condition.guesses)


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "PNG")


ALIGNMENT_EXAMPLES = 4  # images
HEAT_MAP_PIXELS = 112  # pixels of a heat map


def alignment_examples(
    model: Model, tokenizer: Tokenizer, held_out: EvalPairs, config: RunConfig, stage: StageConfig
) -> Alignments:
    """Explain the first captions of evenly spaced images; empty for a model that does not align words and patches.

    Notes state what the weights were not trained for.
    """
    if modules_for(model, "wpa", "pairs") is None or not len(held_out):
        return Alignments()
    chosen = range(0, len(held_out), -(-len(held_out) // ALIGNMENT_EXAMPLES))
    return Alignments(
        [_aligned(model, tokenizer, held_out, number, stage.max_text_length) for number in chosen],
        untrained_notes(config, stage.name),
    )


def _aligned(
    model: Model, tokenizer: Tokenizer, held_out: EvalPairs, number: int, max_text_length: int
) -> AlignedCaption:
    caption, picture = held_out.captions[number][0], held_out.image(number).numpy()
    explanation = explain(model, tokenizer, picture, caption, max_text_length)
    words = [
        (word.word, thumbnail(np.asarray(draw_heat_map(explanation, word)), HEAT_MAP_PIXELS), word.heat.max().item())
        for word in explanation.words
    ]
    return AlignedCaption(thumbnail(explanation.picture.numpy(), HEAT_MAP_PIXELS), caption, words)
