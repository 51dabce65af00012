"""Rendering of HTML pages: one file with styles, charts and images inside, without network access or scripts."""

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
    loader = FileSystemLoader([*folders, Path(__file__).parent])
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, undefined=StrictUndefined, **options)
    environment.filters |= {f.__name__: f for f in (percent, number, significant, duration, moment)}
    return environment


def thumbnail(pixels: Any, side: int = THUMBNAIL, lossless: int = LOSSLESS) -> str:
    """Return an image (H, W, 3) uint8 (array, tensor or PIL) as a data URI, at most `side` pixels wide and high.

    It is a PNG if neither side is longer than `lossless`, otherwise a JPEG.
    """
    image, buffer = Image.fromarray(np.asarray(pixels)), io.BytesIO()
    image.thumbnail((side, side))
    kind, options = ("png", {"optimize": True}) if max(image.size) <= lossless else ("jpeg", {"quality": 80})
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
