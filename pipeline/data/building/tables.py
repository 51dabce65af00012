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
from pipeline.data.building.files import Problems, clean_captions, fault_of, files_below, lines_of
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
class Columns:
    """The columns of images and captions: names, or numbers from 1; None: detected from the header."""

    image: str | None = None
    caption: str | None = None


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


@dataclass(frozen=True)
class _Layout:
    delimiter: str
    has_header: bool
    image: int
    caption: int
    width: int  # columns


def is_table(file: Path) -> bool:
    """Return whether a .txt starts like a table of images and captions, rather than like prose."""
    first = _first_line(file)
    delimiter = _delimiter_of(first)
    if delimiter is None:
        return False
    cells = [_cell(cell) for cell in first.split(delimiter)]
    return (len(cells) <= 8 and _is_header(cells)) or _IMAGE.fullmatch(cells[0]) is not None


def table_records(file: Path, columns: Columns, problems: Problems) -> Iterator[Record]:
    """Yield the rows of a table. Raises DataError if its columns cannot be detected."""
    layout: _Layout | None = None
    for where, cells in _rows(file, problems):
        if layout is None:
            layout = _layout_of(file, [_cell(cell) for cell in cells], _delimiter_in(file), columns)
            if layout.has_header:
                continue
        if len(cells) > layout.width and layout.caption == layout.width - 1:  # unquoted caption with delimiters
            rest = layout.delimiter.join(cells[layout.caption :])
            cells = [*cells[: layout.caption], rest]
        if len(cells) <= max(layout.image, layout.caption):
            problems.add(where, f"it has {len(cells)} columns; expected {layout.width}")
            continue
        cells = [_cell(cell) for cell in cells]
        image = cells[layout.image]
        if numbered := _NUMBERED.fullmatch(image):
            image = numbered[1]
        if reason := next((reason for cell in cells if (reason := fault_of(cell))), None):
            problems.add(where, reason)
        elif not image:
            problems.add(where, "it has no image")
        elif captions := clean_captions(cells[layout.caption], where, problems):
            yield Record(where, image, captions)


def _rows(file: Path, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Yield the location of each non-empty row, and its cells with surrounding spaces."""
    delimiter = _delimiter_in(file)
    if delimiter in _QUOTED:
        yield from _quoted_rows(file, delimiter, problems)
        return
    for where, line in lines_of(file):
        if line.strip():
            yield where, line.rstrip("\r\n").split(delimiter)


def _quoted_rows(file: Path, delimiter: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of CSV. A quotation mark that is never closed affects its own line only, not those after it."""
    lines = lines_of(file)
    pending: deque[tuple[str, str]] = deque()
    while pending or (pending := deque(islice(lines, 1))):
        where, text = pending[0]
        count, cells = 1, _csv_row(text, delimiter, strict=True)
        while cells is None and count < MAX_LINES and text.count('"') % 2:
            pending.extend(islice(lines, max(0, count + 1 - len(pending))))
            if len(pending) == count:  # the end of the file
                break
            text, count = text + pending[count][1], count + 1
            cells = _csv_row(text, delimiter, strict=True) if text.count('"') % 2 == 0 else None
        if cells is None:  # try the first line alone, with stray quotation marks
            text, count = pending[0][1], 1
            cells = _csv_row(text, delimiter, strict=False) if text.count('"') % 2 == 0 else None
        for _ in range(count):
            pending.popleft()
        if cells is None:
            problems.add(where, "not a CSV row; is a quotation mark not closed?")
        elif any(cell.strip() for cell in cells):
            yield where, cells


def _csv_row(text: str, delimiter: str, strict: bool) -> list[str] | None:
    try:
        return next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=strict), [])
    except csv.Error:
        return None


def _cell(cell: str) -> str:
    cell = cell.strip()
    is_quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"').strip() if is_quoted else cell


def _first_line(file: Path) -> str:
    """Return the first line that is not blank; '' without one."""
    return next((line for _, line in lines_of(file) if line.strip()), "")


def _delimiter_in(file: Path) -> str:
    first = _first_line(file)
    delimiter = _delimiter_of(first)
    if delimiter is None:
        raise DataError(f"{file}: its first line {first.strip()!r:.80} has no tab, '|', ';' or ',' between columns")
    return delimiter


def _delimiter_of(line: str) -> str | None:
    """Return the delimiter of a first line, preferring one that separates an image or known column names."""
    candidates = [delimiter for delimiter in "\t|;," if delimiter in line]
    for delimiter in candidates:
        cells = [_cell(cell) for cell in line.split(delimiter)]
        if any(map(_IMAGE.fullmatch, cells)) or _is_header(cells):
            return delimiter
    return candidates[0] if candidates else None


def _is_header(cells: Sequence[str]) -> bool:
    names = [cell.lower() for cell in cells]
    return _named(names, IMAGE_NAMES) is not None and _named(names, CAPTION_NAMES) is not None


def _layout_of(file: Path, cells: Sequence[str], delimiter: str, columns: Columns) -> _Layout:
    names = [cell.lower() for cell in cells]
    image = _chosen(file, names, columns.image, "image")
    caption = _chosen(file, names, columns.caption, "caption")
    image_columns = [number for number, cell in enumerate(cells) if _IMAGE.fullmatch(cell) or "://" in cell]
    if image_columns:  # no header: the first line already contains an image
        image = image_columns[0] if image is None else image
        others = [number for number in range(len(cells)) if number != image]
        caption = max(others, key=lambda number: len(cells[number]), default=None) if caption is None else caption
    else:
        image = _named(names, IMAGE_NAMES) if image is None else image
        caption = _named(names, CAPTION_NAMES) if caption is None else caption
    if image is None or caption is None or image == caption:
        raise DataError(
            f"{file}: cannot detect the columns of images and captions from its first line "
            f"({', '.join(cells):.200}). Pass --image-column and --caption-column, names or numbers from 1"
        )
    return _Layout(delimiter, not image_columns, image, caption, len(cells))


def _named(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _chosen(file: Path, names: Sequence[str], column: str | None, role: str) -> int | None:
    if column is None:
        return None
    if column.lower() in names:
        return names.index(column.lower())
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return int(column) - 1
    raise DataError(f"{file}: no column '{column}' (--{role}-column); its columns: {', '.join(names):.200}")


# Parquet --------------------------------------------------------------------------------------------------------------


def parquet_records(source: Path, columns: Columns, problems: Problems) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of every one below a folder."""
    files = [source] if source.is_file() else list(files_below(source, ("parquet",), problems))
    if not files:
        raise DataError(f"{source}: no .parquet file in this folder")
    for file in files:
        yield from _rows_of_parquet(file, columns, problems)


def _rows_of_parquet(file: Path, columns: Columns, problems: Problems) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = [name.lower() for name in parquet.schema_arrow.names]
            image, caption = _parquet_columns(file, names, columns)
            column_names = [parquet.schema_arrow.names[number] for number in (image, caption)]
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=column_names):
                images, captions = batch.column(column_names[0]), batch.column(column_names[1])
                for number in range(batch.num_rows):
                    where = f"{file}, row {row}"
                    record = _parquet_record(where, f"{file.stem}-{row:07d}", images, captions, number, problems)
                    row += 1
                    if record is not None:
                        yield record
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise DataError(f"{file}: not a Parquet file, or damaged after row {row} ({error})") from error


def _parquet_columns(file: Path, names: Sequence[str], columns: Columns) -> tuple[int, int]:
    image, caption = _chosen(file, names, columns.image, "image"), _chosen(file, names, columns.caption, "caption")
    image = _named(names, IMAGE_NAMES) if image is None else image
    caption = _named(names, CAPTION_NAMES) if caption is None else caption
    if image is None or caption is None or image == caption:
        raise DataError(
            f"{file}: cannot detect the columns of images and captions ({', '.join(names):.200}). "
            "Pass --image-column and --caption-column"
        )
    return image, caption


def _parquet_record(
    where: str, name: str, images: Any, captions: Any, number: int, problems: Problems
) -> Record | None:
    try:
        image, caption = images[number].as_py(), captions[number].as_py()
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
        return None
    if data is None and (not isinstance(image, str) or not image.strip()):
        problems.add(where, "it has no image (expected bytes, a path, or a struct of both)")
        return None
    if not (clean := clean_captions(caption, where, problems)):
        return None
    return Record(where, image if data is None else name, clean, data=data)
