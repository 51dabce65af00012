"""An explanation drawn, as one HTML file with its pictures inside or as one PNG: a heat map a word, and its guesses."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation.explain import Condition, ExplainedWord, Explanation
from pipeline.pages.page import data_uri, render_page

PANEL = 224  # pixels of a panel's longer side
LINE = 15  # pixels of a line of text below it
COLUMNS = 4
HOT = np.array([215, 48, 31])
STRONGEST = 0.8  # how much of the picture the hottest patch covers


def to_html(found: Explanation, text: str, heading: str, notes: Sequence[str]) -> str:
    """`notes` say what the checkpoint was not trained for."""
    return render_page(
        "explain.html.j2",
        [Path(__file__).parent],
        subject=subject_of(found, text, heading),
        found=found,
        text=text,
        heading=heading,
        notes=notes,
        picture=_uri(_enlarged(found)),
        panels=[(word, _uri(panel(found, word))) for word in found.words],
    )


def subject_of(found: Explanation, text: str, heading: str) -> str:
    """Return what an explanation is of: weights, picture and text."""
    return f"explanation {heading} {text} {hashlib.sha256(found.picture.numpy().tobytes()).hexdigest()}"


def to_png(found: Explanation, text: str, heading: str, notes: Sequence[str]) -> Image.Image:
    """The same as one picture: the panels in rows, under each the word and its guesses."""
    font = ImageFont.load_default(12)
    panels = [_enlarged(found), *(panel(found, word) for word in found.words)]
    captions = [["the picture"], *(_lines(word) for word in found.words)]
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


def panel(found: Explanation, word: ExplainedWord) -> Image.Image:
    """The picture in grey, redder where more of the word goes; the hottest patch is equally red for every word."""
    picture = _enlarged(found)
    grey = np.asarray(picture.convert("L").convert("RGB")).astype(np.float32)
    heat = Image.fromarray((word.heat / word.heat.max()).numpy().astype(np.float32))
    # Patches stay squares: smoothing would show a finer map than there is.
    weight = STRONGEST * np.asarray(heat.resize(picture.size, Image.Resampling.NEAREST))[:, :, None]
    return Image.fromarray((grey * (1 - weight) + HOT * weight).round().astype(np.uint8))


def _enlarged(found: Explanation) -> Image.Image:
    picture = Image.fromarray(found.picture.numpy())
    scale = PANEL / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _lines(word: ExplainedWord) -> list[str]:
    hottest = f"{word.word}  (hottest patch {word.heat.max():.0%})"
    return [hottest, f"with: {_told(word.with_image)}", f"without: {_told(word.without_image)}"]


def _told(condition: Condition) -> str:
    return ", ".join(f"{each.word} {each.probability:.0%}" for each in condition.guesses)


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "PNG")
