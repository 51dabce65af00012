"""Explanation of a model on one image and one text: the patches each word aligns to, and predictions of each word.

Patches are those that optimal transport assigns to the word's final features (`objectives.wpa`), as in ViLT's figure 4.
For the predictions each word is masked in turn, with and without the image.

Shapes: H x W pixels as the model reads them, G x C rows and columns of patches, L tokens, P = GC patches.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked import MaskedCaptions, predict_masked_tokens, words_of
from pipeline.evaluation.report import AlignedCaption, Alignments
from pipeline.evaluation.retrieval import Predictor, run_forward
from pipeline.models.forward import ForwardInput
from pipeline.models.model import Model
from pipeline.objectives import modules_for
from pipeline.objectives.wpa import wpa_cost, wpa_plan
from pipeline.pages.page import render_page, signature, thumbnail

PANEL = 224  # pixels of a panel's longer side
LINE = 15  # pixels of a line of text below it
COLUMNS = 4
HOT = np.array([215, 48, 31])
MAX_OPACITY = 0.8  # opacity of the hottest patch
ALIGNMENT_EXAMPLES = 4  # images in the report of an evaluation
HEAT_MAP_PIXELS = 112  # pixels of a heat map there


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


class ExplainedWord(NamedTuple):
    word: str
    heat: Tensor  # (G, C) float32: fraction of the word assigned to each patch
    with_image: Condition
    without_image: Condition


class Explanation(NamedTuple):
    image: Tensor  # (H, W, 3) uint8
    words: tuple[ExplainedWord, ...]
    distance: float  # cost of the plan: 0 where words equal their patches, 1 where they are orthogonal


def explain(model: Model, tokenizer: Tokenizer, image: Tensor, text: str, max_text_length: int) -> Explanation:
    """Explain a model with the heads `alignment` and `mlm` on an image (H, W, 3) uint8 with a text, cut to the length.

    Raises DataError where no token is left of the text.
    """
    tokens = tokenizer.encode(text, max_text_length)
    words = list(words_of(tokens.word_of).values())
    if not words:
        raise DataError(f"no token is left of the text {text!r}; give at least one word")
    pair = ForwardInput(heads=("alignment",), image=image[None], text=torch.tensor([tokens.ids]))
    features = run_forward(model, pair)
    cost = wpa_cost(features["words"], features["patches"])
    plan = wpa_plan(cost, features["words_keep"], features["patches_keep"])  # (1, L, P)

    masked = MaskedCaptions(  # one copy of the text for each word
        rows=tuple(tuple(tokenizer.mask_id if i in word else t for i, t in enumerate(tokens.ids)) for word in words),
        positions=tuple(tuple(word) for word in words),
        labels=tuple(tuple(tokens.ids[position] for position in word) for word in words),
    )
    predictor, of_word = Predictor(model, tokenizer), torch.zeros(len(words), dtype=torch.int64)
    with_image = predict_masked_tokens(predictor, masked, EvalPairs({}, "", image[None]), of_word)
    without_image = predict_masked_tokens(predictor, masked)
    explained, stop = [], 0
    for word in words:
        rows, conditions = slice(stop, stop + len(word)), []
        stop += len(word)
        for predicted in (with_image, without_image):
            # A word of several tokens gets one prediction, the best of each: second-best pieces do not form a word.
            best = predicted.tokens[rows, : 1 if len(word) > 1 else None]
            probabilities = predicted.probabilities[rows].prod(dim=0).tolist()
            guesses = tuple(
                Guess(tokenizer.decode(ids.tolist()), probability, torch.equal(ids, predicted.truth[rows]))
                for ids, probability in zip(best.T, probabilities, strict=False)
            )
            conditions.append(Condition(guesses, predicted.truth_probability[rows].prod().item()))
        moved = plan[0].cpu()[word].sum(dim=0)
        heat = (moved / moved.sum()).view(-1, image.shape[1] // model.config.patch_size)
        explained.append(ExplainedWord(tokenizer.decode(tokens.ids[p] for p in word), heat, *conditions))
    return Explanation(image, tuple(explained), float((cost * plan).sum()))


def untrained_notes(config: RunConfig, stage_name: str) -> list[str]:
    """Return a note for each part of an explanation that neither this stage nor an earlier one trained."""
    before = config.stages[: config.stages.index(config.stage_named(stage_name)) + 1]
    mlm = [stage for stage in before if "mlm" in stage.objectives]
    notes = []
    if not any("wpa" in stage.objectives for stage in before):
        notes.append("No stage trained wpa: the drawn alignment comes from features that were not trained for it.")
    if not mlm:
        notes.append("No stage trained mlm: the guesses are those of an untrained head.")
    elif all(config.source_type_of(stage) != "pairs" for stage in mlm):
        notes.append("No stage trained mlm with images: only the predictions without an image were trained.")
    return notes


def alignment_examples(
    model: Model, tokenizer: Tokenizer, held_out: EvalPairs, config: RunConfig, stage: StageConfig
) -> Alignments:
    """Explain the first captions of evenly spaced images; empty unless this stage or an earlier one trained wpa."""
    trained = config.stages[: config.stages.index(config.stage_named(stage.name)) + 1]
    is_trained = any("wpa" in earlier.objectives for earlier in trained)
    if not is_trained or modules_for(model, "wpa", "pairs") is None or not len(held_out):
        return Alignments()
    captions = []
    for number in range(0, len(held_out), -(-len(held_out) // ALIGNMENT_EXAMPLES)):
        caption = held_out.captions[number][0]
        explanation = explain(model, tokenizer, held_out.image(number), caption, stage.max_text_length)
        maps = [thumbnail(draw_heat_map(explanation, word), HEAT_MAP_PIXELS) for word in explanation.words]
        words = [(w.word, uri, w.heat.max().item()) for w, uri in zip(explanation.words, maps, strict=True)]
        captions.append(AlignedCaption(thumbnail(explanation.image, HEAT_MAP_PIXELS), caption, words))
    return Alignments(captions, untrained_notes(config, stage.name))


def render_explanation(explanation: Explanation, text: str, heading: str, notes: Sequence[str], suffix: str) -> bytes:
    """Return an explanation as an .html or .png file with its signature; `notes` state what was not trained."""
    subject = f"explanation {heading} {text} {hashlib.sha256(explanation.image.numpy().tobytes()).hexdigest()}"
    if suffix == ".png":
        information, buffer = PngInfo(), io.BytesIO()
        information.add_text("Software", signature(subject))
        page = draw_explanation(explanation, text, heading, notes)
        page.save(buffer, "PNG", optimize=True, pnginfo=information)
        return buffer.getvalue()
    panels = [(word, draw_heat_map(explanation, word)) for word in (None, *explanation.words)]
    drawn = [(word, thumbnail(panel, PANEL, lossless=PANEL)) for word, panel in panels]
    shown = {"explanation": explanation, "text": text, "heading": heading, "notes": notes, "panels": drawn}
    return render_page("pipeline/evaluation/explain.html.j2", subject, **shown).encode()


def draw_explanation(explanation: Explanation, text: str, heading: str, notes: Sequence[str]) -> Image.Image:
    """Draw an explanation as one image: heat maps in rows, with each word and its predictions below."""
    font = ImageFont.load_default(12)
    panels = [(draw_heat_map(explanation), ["the image"])]
    for word in explanation.words:
        lines = [f"{word.word}  (hottest patch {word.heat.max():.0%})"]
        for name, condition in (("with", word.with_image), ("without", word.without_image)):
            guesses = ", ".join(f"{guess.word} {guess.probability:.0%}" for guess in condition.guesses)
            lines.append(f"{name}: {guesses}")
        panels.append((draw_heat_map(explanation, word), lines))
    height = panels[0][0].height
    width = max([PANEL, *(round(font.getlength(line)) for _, lines in panels for line in lines)])
    cell = (width + 16, height + LINE * max(len(lines) for _, lines in panels) + 24)
    top = 16 + LINE * (2 + len(notes)) + 8
    columns = min(COLUMNS, len(panels))
    page = Image.new("RGB", (16 + columns * cell[0], top + -(-len(panels) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate([heading, text, *notes]):
        draw.text((16, 12 + number * LINE), line, "black", font)
    for number, (panel, lines) in enumerate(panels):
        row, column = divmod(number, columns)
        left, upper = 16 + column * cell[0], top + row * cell[1]
        page.paste(panel, (left, upper))
        for place, line in enumerate(lines):
            draw.text((left, upper + height + 4 + place * LINE), line, "black", font)
    return page


def draw_heat_map(explanation: Explanation, word: ExplainedWord | None = None) -> Image.Image:
    """Draw the enlarged image, or in grey and redder where more of `word` goes; hottest patches are equally red."""
    image = Image.fromarray(explanation.image.numpy())
    scale = PANEL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    if word is None:
        return image
    grey = np.asarray(image.convert("L").convert("RGB")).astype(np.float32)
    heat = Image.fromarray((word.heat / word.heat.max()).numpy().astype(np.float32))
    # Patches stay squares: smoothing would show a finer map than there is.
    weight = MAX_OPACITY * np.asarray(heat.resize(image.size, Image.Resampling.NEAREST))[:, :, None]
    return Image.fromarray((grey * (1 - weight) + HOT * weight).round().astype(np.uint8))
