"""Pages: each is one HTML file with its styles, drawings and pictures inside, and needs neither network nor script."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline.pages.words import duration, moment, money, number, percent, significant

THUMBNAIL = 160  # pixels at most
LOSSLESS = 96  # pictures up to this side are kept exact
HERE = Path(__file__).parent


def signature(subject: str) -> str:
    """Return what a page or picture of ours bears to tell what it is of; no other subject has the same."""
    return f"mome {hashlib.sha256(subject.encode(errors='replace')).hexdigest()[:32]}"


def render_page(template: str, folders: Sequence[Path], subject: str, **values: Any) -> str:
    """The page that `template` makes, found in `folders`; what pages share (`base.html.j2`, …) lies here.

    `subject` tells apart what pages are of: a page may take the place of an older one of the same subject.
    """
    return (
        _environment(tuple(folders))
        .get_template(template)
        .render(written=moment(1000 * time.time()), signature=signature(subject), **values)
    )


@functools.lru_cache
def _environment(folders: tuple[Path, ...]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (percent, number, significant, money, duration, moment)}
    return environment


def thumbnail(pixels: np.ndarray, side: int = THUMBNAIL) -> str:
    """A picture (H, W, 3) uint8 as a data URI, at most `side` pixels wide or high; small ones without loss."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    kind, options = ("PNG", {"optimize": True}) if max(picture.size) <= LOSSLESS else ("JPEG", {"quality": 80})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), kind)


def data_uri(encoded: bytes, kind: str) -> str:
    """An encoded picture as an address that holds it; `kind` is PNG or JPEG."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode()}"
