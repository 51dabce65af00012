"""Rendering of HTML pages: one file with styles, charts and images inside, without network access or scripts."""

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

from pipeline.pages.formatting import duration, moment, number, percent, significant

THUMBNAIL = 160  # maximum side in pixels
LOSSLESS = 96  # images up to this side are stored losslessly


def signature(subject: str) -> str:
    """Return the marker that identifies a page or image of `subject`; it is unique to the subject."""
    return f"mome {hashlib.sha256(subject.encode(errors='replace')).hexdigest()[:32]}"


def render_page(template: str, folders: Sequence[Path], subject: str, **values: Any) -> str:
    """Render `template` from `folders`, which may use the shared templates of this folder (`base.html.j2`, …).

    The page carries the signature of `subject`: a page may only overwrite an older one of the same subject.
    """
    page = _environment(tuple(folders)).get_template(template)
    return page.render(written=moment(1000 * time.time()), signature=signature(subject), **values)


@functools.lru_cache  # keeps the compiled templates
def _environment(folders: tuple[Path, ...]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, number, significant, duration, moment)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def thumbnail(pixels: Any, side: int = THUMBNAIL) -> str:
    """Return an image (H, W, 3) uint8 (array, tensor or PIL) as a data URI, at most `side` pixels wide and high."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((side, side))
    kind, options = ("PNG", {"optimize": True}) if max(image.size) <= LOSSLESS else ("JPEG", {"quality": 80})
    return data_uri(encode(image, kind, **options), kind)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a file; `kind` is PNG or JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(encoded: bytes, kind: str) -> str:
    """Return an encoded image as a data URI; `kind` is PNG or JPEG."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode()}"
