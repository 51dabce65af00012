"""Files to import, and what importers made of them."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.building.importers import find_kind, read_source
from pipeline.data.building.inputs import Import, ImportOptions, Problems, Sample

TABLES = {  # of two images, the first with two captions
    "captions.txt": 'image,caption\na.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',  # Kaggle's Flickr8k
    "unquoted.csv": "image,caption\na.jpg,A dog, running .\na.jpg,A cat .\nb.jpg,Third .\n",
    "Flickr8k.token.txt": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results_20130124.token": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results.csv": "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog, running .\na.jpg| 1| A cat .\nb.jpg| 0| Third .\n",
    "open_clip.tsv": 'filepath\ttitle\na.jpg\tA dog, running .\na.jpg\t"A cat ."\nb.jpg\tThird .\n',
    "cc3m.tsv": "A dog, running .\ta.jpg\nA cat .\ta.jpg\nThird .\tb.jpg\n",
    "more.csv": 'id,Text ,Path\n1,"A dog,\nrunning .",a.jpg\n2,A cat .,a.jpg\n\n3,Third .,b.jpg\n',
    "semicolon.csv": "file;caption\na.jpg;A dog, running .\na.jpg;A cat .\nb.jpg;Third .\n",
    "quoted_semicolon.csv": 'caption;file\n"A dog,\nrunning .";a.jpg\n"A cat .";a.jpg\nThird .;b.jpg\n',
    "no_header.csv": 'a.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',
    "bom.csv": '\ufeffimage,caption\r\na.jpg,"A dog, running ."\r\na.jpg,A cat .\r\nb.jpg,Third .\r\n',
}


def save_image(path: Path, shade: int = 0, kind: str | None = None) -> bytes:
    """Write a small grey image and return its bytes; the format follows the suffix (default: JPEG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(buffer, kind or {".png": "PNG"}.get(path.suffix, "JPEG"))
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_lines(path: Path, *records: object) -> Path:
    """Write one record per line: a text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def read(source: Path, problems: Problems | None = None, kind: Any = None, **options: Any) -> Import:
    """Read a source with its detected kind; without `problems`, its first fault is raised."""
    return read_source(source, kind or find_kind(source), problems or Problems(strict=True), ImportOptions(**options))


def record_of(sample: Sample) -> dict[str, Any]:
    """Return a sample's json; an empty object without one."""
    return json.loads(sample.get("json", b"{}"))


def captions_in(samples: Iterable[Sample]) -> list[list[str]]:
    return [record_of(sample).get("captions", []) for sample in samples]


def members_of(sample: Sample) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if name != "__key__"}
