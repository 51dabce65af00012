"""Tables of images with captions: CSV and its relatives, and the captions files of Flickr8k and Flickr30k.

image,caption                       Kaggle's captions.txt of Flickr8k, and most CSV files, with a header
image_name| comment_number| comment Flickr30k's results.csv
1000.jpg#0<TAB>a caption            Flickr8k.token.txt and results_20130124.token, without a header
filepath<TAB>title                  open_clip's; CC3M's and CC12M's lists with downloaded images
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.errors import DataError
from pipeline.data.building import inputs
from pipeline.data.building.inputs import Import, Unusable
from pipeline.data.contents.images import EXTENSIONS

IMAGE_NAMES = (
    "image", "filepath", "file_path", "image_path", "img_path", "path", "filename", "file_name", "image_name", "img",
    "image_file", "file", "image_bytes", "bytes", "jpg", "png", "webp", "image_url", "url",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "comment", "title", "text", "txt", "sentence", "sentences", "description", "alt_text", "raw",
)  # fmt: skip
_QUOTED = ",;"  # delimiters of files with quoted cells; with other delimiters quotation marks are plain text
MAX_LINES = 64  # of one CSV row
_NUMBERED = re.compile(rf"(.+\.(?:{'|'.join(EXTENSIONS)}))(#\w+)?", re.IGNORECASE)  # Flickr numbers an image's captions


@dataclass(frozen=True)
class Record:
    """One image with some of its captions."""

    where: str
    name: str  # the path from which the sample's key is made
    captions: list[str]
    image: str | bytes | None  # a path, or the encoded image
    image_id: int | None = None
    regions: str | None = None
    image_size: tuple[int, int] | None = None
    label: int | None = None  # the class of an image without captions
    more: Mapping[str, Any] = field(default_factory=dict)  # of the sample's JSON


def table_records(job: Import) -> Iterator[Record]:
    """Yield the rows of a table. Raises DataError if its columns cannot be detected."""
    delimiter, first, _ = first_row(job.source)
    if not delimiter:
        raise DataError(f"{job.source}: its first line {first[0]!r:.80} has no tab, '|', ';' or ',' between columns")
    if delimiter in _QUOTED:
        rows = _quoted_rows(job.source, delimiter, job.problems)
    else:
        lines = ((where, line.rstrip("\r\n")) for where, line in inputs.lines_of(job.source) if line.strip())
        rows = ((where, line.split(delimiter)) for where, line in lines)
    image_column = caption_column = width = 0
    for number, (where, cells) in enumerate(rows):
        if number == 0:
            first, width = [_cell(cell) for cell in cells], len(cells)
            # Without a header, the first line already contains an image.
            images = [place for place, cell in enumerate(first) if _NUMBERED.fullmatch(cell) or "://" in cell]
            image_column, caption_column = _find_columns(job.source, first, images, job.options)
            if not images:
                continue
        if len(cells) > width and caption_column == width - 1:  # unquoted caption with delimiters
            cells = [*cells[:caption_column], delimiter.join(cells[caption_column:])]
        with job.problems.skipping(where):
            if len(cells) <= max(image_column, caption_column):
                raise Unusable(f"it has {len(cells)} columns; expected {width}")
            cells = [_cell(cell) for cell in cells]
            for cell in cells:
                inputs.check_text(cell)
            if not (image := cells[image_column]):
                raise Unusable("it has no image")
            if numbered := _NUMBERED.fullmatch(image):
                image = numbered[1]
            yield Record(where, image, inputs.clean_captions(cells[caption_column], where, job.problems), image)


def _quoted_rows(file: Path, delimiter: str, problems: inputs.Problems) -> Iterator[tuple[str, list[str]]]:
    """Yield location and cells of each row of CSV; a quotation mark that is never closed affects its own line only."""

    def parse(text: str, strict: bool = True) -> list[str] | None:
        with suppress(csv.Error):
            return next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=strict), [])
        return None

    lines = inputs.lines_of(file)
    pending: deque[tuple[str, str]] = deque()
    while pending or (pending := deque(islice(lines, 1))):
        where, text = pending[0]
        count, cells = 1, parse(text)
        while cells is None and count < MAX_LINES and text.count('"') % 2:
            pending.extend(islice(lines, max(0, count + 1 - len(pending))))
            if len(pending) == count:  # the end of the file
                break
            text, count = text + pending[count][1], count + 1
            cells = parse(text) if text.count('"') % 2 == 0 else None
        if cells is None:  # try the first line alone, with stray quotation marks
            text, count = pending[0][1], 1
            cells = parse(text, strict=False) if text.count('"') % 2 == 0 else None
        for _ in range(count):
            pending.popleft()
        if cells is None:
            problems.add(where, "not a CSV row; is a quotation mark not closed?")
        elif any(cell.strip() for cell in cells):
            yield where, cells


def first_row(file: Path) -> tuple[str, list[str], bool]:
    """Return delimiter ('' for none) and cells of the first line with text; whether a .txt is a table, not prose."""
    line = next((line for _, line in inputs.lines_of(file) if line.strip()), "")
    row = "", [line.strip()], False
    for delimiter in (delimiter for delimiter in "\t|;," if delimiter in line):
        cells = [_cell(cell) for cell in line.split(delimiter)]
        names = {cell.lower() for cell in cells}
        is_header = not names.isdisjoint(IMAGE_NAMES) and not names.isdisjoint(CAPTION_NAMES)
        is_table = (is_header and len(cells) <= 8) or bool(_NUMBERED.fullmatch(cells[0]))
        if is_header or any(map(_NUMBERED.fullmatch, cells)):
            return delimiter, cells, is_table
        row = row if row[0] else (delimiter, cells, is_table)
    return row


def _cell(cell: str) -> str:
    cell = cell.strip()
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"').strip() if is_quoted else cell


def _find_columns(
    file: Path, cells: Sequence[str], images: Sequence[int], options: inputs.ImportOptions
) -> tuple[int, int]:
    """Return the columns of images and captions, by names, or by a first line whose cells `images` are images."""
    names = [cell.lower() for cell in cells]
    roles = ("image", options.image_column, IMAGE_NAMES), ("caption", options.caption_column, CAPTION_NAMES)
    chosen: list[int | None] = []
    for role, column, known in roles:
        if column is None:
            chosen.append(None if images else next((names.index(name) for name in known if name in names), None))
        elif column.lower() in names:
            chosen.append(names.index(column.lower()))
        elif column.isdecimal() and 1 <= int(column) <= len(names):
            chosen.append(int(column) - 1)
        else:
            raise DataError(f"{file}: no column '{column}' (--{role}-column); its columns: {', '.join(names):.200}")
    image, caption = chosen
    if images and image is None:
        image = images[0]
    if images and caption is None:  # the longest of the other cells
        others = [number for number in range(len(cells)) if number != image]
        caption = max(others, key=lambda number: len(cells[number]), default=None)
    if image is None or caption is None or image == caption:
        remedy = "Pass --image-column and --caption-column, names or numbers from 1"
        raise DataError(f"{file}: no columns of images and captions detected in {', '.join(cells):.200}. {remedy}")
    return image, caption
