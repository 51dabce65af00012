"""Tables of images with captions: CSV and its relatives, the captions files of Flickr8k and Flickr30k, and Parquet.

    image,caption                       Kaggle's captions.txt of Flickr8k, and most CSV files, with a header
    image_name| comment_number| comment Flickr30k's results.csv
    1000.jpg#0<TAB>a caption            Flickr8k.token.txt and results_20130124.token, without a header
    filepath<TAB>title                  open_clip's; CC3M's and CC12M's lists with downloaded images

Consecutive rows of one image become one sample. Parquet files contain paths, or the images themselves.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.errors import DataError
from pipeline.data.building.files import ImportOptions, Problems, clean_captions, fault_of, files_below, lines_of
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
BATCH_ROWS = 64  # rows of Parquet, with their images, in memory at a time
_NUMBERED = re.compile(rf"(.+\.(?:{'|'.join(EXTENSIONS)}))#\w+", re.IGNORECASE)  # Flickr's name of a caption
_IMAGE = re.compile(rf".+\.(?:{'|'.join(EXTENSIONS)})(?:#\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """One image, as a path or as bytes, with some of its captions."""

    where: str
    image: str | None
    captions: list[str]
    image_id: int | None = None
    regions: str | None = None
    image_size: tuple[int, int] | None = None
    data: bytes | None = None

    @property
    def name(self) -> str:
        """The path from which the sample's key is made."""
        name = self.image or self.regions
        assert name is not None
        return name


def is_table(file: Path) -> bool:
    """Return whether a .txt starts like a table of images and captions, rather than like prose."""
    delimiter, cells = _first_row(file)
    return delimiter is not None and ((len(cells) <= 8 and _is_header(cells)) or _IMAGE.fullmatch(cells[0]) is not None)


def table_records(file: Path, options: ImportOptions, problems: Problems) -> Iterator[Record]:
    """Yield the rows of a table. Raises DataError if its columns cannot be detected."""
    delimiter, first = _first_row(file)
    if delimiter is None:
        line = "".join(first)
        raise DataError(f"{file}: its first line {line!r:.80} has no tab, '|', ';' or ',' between columns")
    if delimiter in _QUOTED:
        rows = _quoted_rows(file, delimiter, problems)
    else:
        lines = ((where, line.rstrip("\r\n")) for where, line in lines_of(file) if line.strip())
        rows = ((where, line.split(delimiter)) for where, line in lines)
    image_column = caption_column = width = 0
    for number, (where, cells) in enumerate(rows):
        if number == 0:
            first, width = [_cell(cell) for cell in cells], len(cells)
            # Without a header, the first line already contains an image.
            images = [place for place, cell in enumerate(first) if _IMAGE.fullmatch(cell) or "://" in cell]
            image_column, caption_column = _find_columns(file, first, images, options)
            if not images:
                continue
        if len(cells) > width and caption_column == width - 1:  # unquoted caption with delimiters
            cells = [*cells[:caption_column], delimiter.join(cells[caption_column:])]
        if len(cells) <= max(image_column, caption_column):
            problems.add(where, f"it has {len(cells)} columns; expected {width}")
            continue
        cells = [_cell(cell) for cell in cells]
        image = cells[image_column]
        if numbered := _NUMBERED.fullmatch(image):
            image = numbered[1]
        if reason := next((reason for cell in cells if (reason := fault_of(cell))), None):
            problems.add(where, reason)
        elif not image:
            problems.add(where, "it has no image")
        elif captions := clean_captions(cells[caption_column], where, problems):
            yield Record(where, image, captions)


def _quoted_rows(file: Path, delimiter: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Yield the location and the cells of each non-empty row of CSV.

    A quotation mark that is never closed affects its own line only, not those after it.
    """

    def parse(text: str, strict: bool) -> list[str] | None:
        try:
            return next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=strict), [])
        except csv.Error:
            return None

    lines = lines_of(file)
    pending: deque[tuple[str, str]] = deque()
    while pending or (pending := deque(islice(lines, 1))):
        where, text = pending[0]
        count, cells = 1, parse(text, strict=True)
        while cells is None and count < MAX_LINES and text.count('"') % 2:
            pending.extend(islice(lines, max(0, count + 1 - len(pending))))
            if len(pending) == count:  # the end of the file
                break
            text, count = text + pending[count][1], count + 1
            cells = parse(text, strict=True) if text.count('"') % 2 == 0 else None
        if cells is None:  # try the first line alone, with stray quotation marks
            text, count = pending[0][1], 1
            cells = parse(text, strict=False) if text.count('"') % 2 == 0 else None
        for _ in range(count):
            pending.popleft()
        if cells is None:
            problems.add(where, "not a CSV row; is a quotation mark not closed?")
        elif any(cell.strip() for cell in cells):
            yield where, cells


def _first_row(file: Path) -> tuple[str | None, list[str]]:
    """Return the delimiter of a file's first line that is not blank, and its cells; None without a delimiter.

    A delimiter that separates an image or known column names is preferred.
    """
    line = next((line for _, line in lines_of(file) if line.strip()), "")
    rows = {delimiter: [_cell(cell) for cell in line.split(delimiter)] for delimiter in "\t|;," if delimiter in line}
    for delimiter, cells in rows.items():
        if any(map(_IMAGE.fullmatch, cells)) or _is_header(cells):
            return delimiter, cells
    return next(iter(rows.items()), (None, [line.strip()]))


def _cell(cell: str) -> str:
    cell = cell.strip()
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"').strip() if is_quoted else cell


def _is_header(cells: Sequence[str]) -> bool:
    names = {cell.lower() for cell in cells}
    return not names.isdisjoint(IMAGE_NAMES) and not names.isdisjoint(CAPTION_NAMES)


def _find_columns(
    file: Path, cells: Sequence[str], images: Sequence[int] | None, options: ImportOptions
) -> tuple[int, int]:
    """Return the positions of the columns of images and captions.

    `cells` are the names of the columns, or the first line of a table, of which the cells `images` are images.
    """
    names = [cell.lower() for cell in cells]
    chosen: list[int | None] = []
    for role, column, known in (
        ("image", options.image_column, IMAGE_NAMES),
        ("caption", options.caption_column, CAPTION_NAMES),
    ):
        if column is None:
            chosen.append(None if images else next((names.index(name) for name in known if name in names), None))
        elif column.lower() in names:
            chosen.append(names.index(column.lower()))
        elif column.isdecimal() and 1 <= int(column) <= len(names):
            chosen.append(int(column) - 1)
        else:
            raise DataError(f"{file}: no column '{column}' (--{role}-column); its columns: {', '.join(names):.200}")
    image, caption = chosen
    if images:
        image = images[0] if image is None else image
        others = [number for number in range(len(cells)) if number != image]
        caption = max(others, key=lambda number: len(cells[number]), default=None) if caption is None else caption
    if image is None or caption is None or image == caption:
        place = "" if images is None else " from its first line"
        raise DataError(
            f"{file}: cannot detect the columns of images and captions{place} ({', '.join(cells):.200}). "
            "Pass --image-column and --caption-column, names or numbers from 1"
        )
    return image, caption


# Parquet --------------------------------------------------------------------------------------------------------------


def parquet_records(source: Path, options: ImportOptions, problems: Problems) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of every one below a folder."""
    import pyarrow
    import pyarrow.parquet

    files = [source] if source.is_file() else list(files_below(source, ("parquet",), problems))
    if not files:
        raise DataError(f"{source}: no .parquet file in this folder")
    for file in files:
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                image, caption = _find_columns(file, names, None, options)
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[names[image], names[caption]]):
                    images, captions = batch.column(names[image]), batch.column(names[caption])
                    for number in range(batch.num_rows):
                        name = f"{file.stem}-{row:07d}"
                        record = _parquet_record(f"{file}, row {row}", name, images[number], captions[number], problems)
                        row += 1
                        if record is not None:
                            yield record
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise DataError(f"{file}: not a Parquet file, or damaged after row {row} ({error})") from error


def _parquet_record(where: str, name: str, image: Any, caption: Any, problems: Problems) -> Record | None:
    """Return one row of Arrow scalars; record a problem and return None if it cannot be used."""
    try:
        image, caption = image.as_py(), caption.as_py()
    except UnicodeDecodeError as error:
        problems.add(where, f"a text is not UTF-8 ({error.reason} at byte {error.start})")
        return None
    except (ValueError, OverflowError, NotImplementedError) as error:  # such as a time beyond the year 9999
        problems.add(where, f"a value cannot be read ({error})")
        return None
    data = None
    if isinstance(image, dict):  # Hugging Face datasets: {"bytes": …, "path": …}
        data, image = image.get("bytes"), image.get("path")
    elif isinstance(image, bytes):
        data, image = image, None
    if data is not None and not isinstance(data, bytes):
        problems.add(where, f"its image is not bytes but a {type(data).__name__}")
    elif data is None and (not isinstance(image, str) or not image.strip()):
        problems.add(where, "it has no image (expected bytes, a path, or a struct of both)")
    elif captions := clean_captions(caption, where, problems):
        return Record(where, image if data is None else name, captions, data=data)
    return None
