"""Rendering of HTML pages: one file with styles, charts and images inside, without network access or scripts."""

import base64
import hashlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline.pages.charts import duration, moment, percent, significant

THUMBNAIL = 160  # maximum side in pixels
LOSSLESS = 96  # images up to this side are stored losslessly
HERE = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader([HERE, HERE.parents[1]]), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.filters |= {f.__name__: f for f in (percent, significant, duration, moment)}


def signature(subject: str) -> str:
    """Return the marker of a page or image of `subject`, which may only overwrite an older one of the same subject."""
    return f"mome {hashlib.sha256(subject.encode(errors='replace')).hexdigest()[:32]}"


def render_page(template: str, subject: str, **values: Any) -> str:
    """Render a template of this folder, or named by its path in the code, with the signature of `subject`."""
    written, marker = moment(1000 * time.time()), signature(subject)
    return ENVIRONMENT.get_template(template).render(written=written, signature=marker, **values)


def thumbnail(pixels: Any, side: int = THUMBNAIL, lossless: int = LOSSLESS) -> str:
    """Return an image (array, tensor or PIL) of at most `side` pixels as a data URI: JPEG, or PNG up to `lossless`."""
    image, buffer = Image.fromarray(np.asarray(pixels)), io.BytesIO()
    image.thumbnail((side, side))
    kind, options = ("png", {"optimize": True}) if max(image.size) <= lossless else ("jpeg", {"quality": 80})
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
