"""Importer of Parquet files: Hugging Face datasets, img2dataset's `--output_format parquet`, and tables of paths.

image: struct<bytes: binary, path: string>    Hugging Face; also binary, or a path below --images
caption: string, or list<string>              one caption or several
caption_0, caption_1, …: string               a column for each caption
sentences: list<struct<raw: string, …>>       nested texts, by the dotted name `sentences.raw`
label: int64                                  a class, named in the file's `huggingface` metadata; or its name
jpg, caption, status, error_message, url, …   img2dataset; rows without an image have their reason in `status`

Files are read in batches of rows, whatever the size of their row groups, from this machine or by ranges from a store.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from pyarrow import types

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building import inputs
from pipeline.data.building.inputs import Import, ImportOptions, Unusable
from pipeline.data.building.tables import CAPTION_NAMES, IMAGE_NAMES, Record
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.storage import join

BATCH_ROWS = 16  # with their images, in memory at a time
BUFFER_BYTES = 4 * 2**20  # read ahead of each column
MAX_LISTED = 40  # columns in a message
LABEL_NAMES = ("label", "labels", "cls", "class")
IMG2DATASET = frozenset({"key", "status", "error_message", "url"})  # columns that all its files have
RESERVED = frozenset({"image_id", "caption", "captions"})  # in a sample's JSON
_NUMBERED_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}")  # Hugging Face's name: train-00000-of-00042
_NUMBERED_CAPTION = re.compile(r"(caption|sentence|text)_?\d+")  # a column for each caption
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")


class Column(NamedTuple):
    """A column, or a field inside one, which lists of structs also have."""

    name: str  # dotted
    path: tuple[str, ...]
    type: pyarrow.DataType


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    image: Column
    captions: tuple[Column, ...]
    label: Column | None
    class_names: tuple[str, ...]  # of the label; empty if they are not known from the file's metadata
    kept: tuple[Column, ...]  # stored in each sample's JSON
    status: tuple[Column, ...]  # img2dataset's key, status and error message
    split: Column | None


def parquet_records(job: Import) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of every one below a folder; those of `job.options.split`, if given.

    Raises DataError for a damaged file, for columns that cannot be detected, and for a folder of several splits of
    which none was chosen.
    """
    splits, split = Counter[str](), job.options.split
    files, every_file, named = _files_of(job)
    classes: tuple[str, ...] | None = None
    for file in files:
        row = 0
        try:
            with _opened(job, file) as parquet:
                columns = find_columns(file, parquet.schema_arrow, job.options)
                if split is not None and columns.split is None and split not in named:
                    known = f"files are of {', '.join(sorted(named))}" if named else "files and columns name no split"
                    raise DataError(f"{file}: --split {split} selects nothing: the {known}")
                if columns.label is not None:
                    class_names = columns.class_names
                    if _is_text(columns.label):
                        class_names = classes or _label_texts(job, every_file, columns.label)
                    if classes is not None and class_names != classes:
                        raise DataError(f"{file}: its class names differ from those of the other files")
                    classes = class_names
                    job.choices |= {CLASSES: Choices(classes)} if classes else {}
                optional = columns.label, columns.split, *columns.captions, *columns.kept, *columns.status
                used = list(dict.fromkeys(column for column in (columns.image, *optional) if column is not None))
                names = list(dict.fromkeys(column.path[0] for column in used))
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=names):
                    for number in range(batch.num_rows):
                        where, key = f"{file}, row {row}", f"{Path(file).stem}-{row:07d}"
                        row += 1
                        with job.problems.skipping(where):
                            values = {column: _value(batch, number, column) for column in used}
                            if columns.split is not None:
                                splits[name := str(values[columns.split])] += 1
                                if name != split:
                                    continue
                            if (record := _record(job, columns, values, where, key)) is not None:
                                yield record
        except MomeError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise DataError(f"{file}: not a Parquet file, or damaged after row {row} ({error})") from error
    if splits and split not in splits:
        known = ", ".join(f"{name} ({count})" for name, count in splits.most_common(10))
        raise DataError(f"{job.url or job.source}: no row is in split '{split}'; its column 'split' has {known}")


def _files_of(job: Import) -> tuple[list[str], list[str], set[str]]:
    """Return the Parquet files of the chosen split, those of all, and the splits in their names. Raises DataError."""
    if job.url is None:
        is_file = job.source.is_file()
        paths = [job.source] if is_file else inputs.files_below(job.source, ("parquet",), job.problems)
        files = [str(path) for path in paths]
    elif job.url.partition("?")[0].endswith(".parquet"):
        files = [job.url]
    else:
        files, pending = [], [job.url.rstrip("/")]
        while pending:
            folder = pending.pop()
            entries = {name: info for name, info in job.storage.entries(folder).items() if not name.startswith(".")}
            files += [join(folder, name) for name, info in entries.items() if info and name.endswith(".parquet")]
            pending += [join(folder, name) for name in reversed(entries) if entries[name] is None]
    if not files:
        raise DataError(f"{job.url or job.source}: no .parquet file in this folder")
    split_of = dict[str, str]()
    for file in files:
        folder, stem = Path(file).parent.name, Path(file).stem
        numbered = _NUMBERED_FILE.fullmatch(stem)
        candidates = numbered[1] if numbered else stem, folder
        name = next((name for name in candidates if numbered or name.lower() in _SPLITS), None)
        split_of |= {file: name} if name else {}
    counts, chosen = Counter(split_of.values()), job.options.split
    if len(counts) > 1 and chosen is None:
        known = ", ".join(f"{name} ({count} file{'s' * (count > 1)})" for name, count in counts.items())
        raise DataError(f"{job.url or job.source}: files of several splits: {known}. Choose one of them with --split")
    is_chosen = len(counts) > 1 and chosen in counts
    return [file for file in files if not is_chosen or split_of.get(file) == chosen], files, set(counts)


@contextmanager
def _opened(job: Import, file: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a file whose columns are read page by page; by default pyarrow reads those of a row group at once."""
    with (
        pyarrow.OSFile(file) if job.url is None else job.storage.open(file) as stream,
        pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet,
    ):
        yield parquet


def find_columns(file: str, schema: pyarrow.Schema, options: ImportOptions) -> Columns:
    """Return the columns that the options name, or detect them: images of bytes before paths, texts before classes.

    Raises DataError that lists the columns with their types, and likely choices.
    """
    features: Any = {}
    with suppress(ValueError, KeyError, TypeError):  # absent, or not Hugging Face's
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    columns, pending = dict[str, Column](), [Column(field.name, (field.name,), field.type) for field in schema]
    while pending:
        column = pending.pop(0)
        columns.setdefault(column.name, column)
        if types.is_struct(inner := _base(column.type)) and not _is_image(column):
            pending += [Column(f"{column.name}.{f.name}", (*column.path, f.name), f.type) for f in inner]
    images, texts = list(filter(_is_image, columns.values())), list(filter(_is_text, columns.values()))

    def fail(reason: str) -> DataError:
        kinds = [f"  {column.name}: {column.type!s:.90}" for column in [*columns.values()][:MAX_LISTED]]
        kinds += [f"  … and {len(columns) - MAX_LISTED} more"] if len(columns) > MAX_LISTED else []
        likely = [f"--image-column {column.name}" for column in images[:3]]
        likely += [f"--caption-column {column.name}" for column in texts[:3]]
        likely += [f"--label-column {name}" for name in columns if _class_names(features, name)][:3]
        return DataError("\n".join([f"{file}: {reason}. Its columns:", *kinds, f"Candidates: {', '.join(likely)}"]))

    def named(option: str, name: str, fits: Callable[[Column], bool], expected: str) -> Column:
        number = int(name) - 1 if name.isdecimal() and name not in columns else -1
        lower = {key.lower(): column for key, column in columns.items()}
        chosen = columns.get(name) or lower.get(name.lower())
        if chosen is None and 0 <= number < len(schema.names):
            chosen = columns[schema.names[number]]
        if chosen is None:
            raise fail(f"no column '{name}' ({option})")
        if not fits(chosen):
            raise fail(f"{option} {name} has type {chosen.type!s:.60}; expected {expected}")
        return chosen

    def first(candidates: list[Column], names: Sequence[str]) -> Column | None:
        by_name = {column.name.lower(): column for column in reversed(candidates)}
        return next((by_name[name] for name in names if name in by_name), None)

    image = first(images, IMAGE_NAMES) or (images[0] if len(images) == 1 else None) or first(texts, IMAGE_NAMES)
    if options.image_column is not None:
        expected = "bytes, a path, or a struct of both"
        image = named("--image-column", options.image_column, lambda c: _is_image(c) or _is_text(c), expected)
    label, captions = None, list[Column]()
    if options.label_column is not None:
        expected = "whole numbers or texts"
        label = named(
            "--label-column", options.label_column, lambda c: types.is_integer(c.type) or _is_text(c), expected
        )
    if options.caption_column is not None:
        expected = "text, a list of texts, or a field of one"
        listed = [options.caption_column] if options.caption_column in columns else options.caption_column.split(",")
        captions = [named("--caption-column", name.strip(), _is_text, expected) for name in listed]
    elif label is None:
        nested = [column for column in texts if column.path[-1].lower() in CAPTION_NAMES and column != image]
        numbered = [column for column in texts if _NUMBERED_CAPTION.fullmatch(column.name.lower())]
        best = first(texts, CAPTION_NAMES) or (nested[0] if len(nested) == 1 else None)
        captions = numbered if best is None else [best]
        named_classes = [column for column in columns.values() if _class_names(features, column.name)]
        if not captions:
            label = named_classes[0] if len(named_classes) == 1 else None
            label = label or first([c for c in columns.values() if types.is_integer(c.type)], LABEL_NAMES)
    if image is None or image in captions or (not captions and label is None):
        absent = "images" if image is None else "captions or classes"
        raise fail(f"no column of {absent} detected. Pass --image-column, and --caption-column or --label-column")
    is_img2dataset = columns.keys() >= IMG2DATASET
    keep = [*options.keep_columns, *(["url"] if is_img2dataset and "url" not in options.keep_columns else [])]
    for name in RESERVED.intersection(keep):
        raise DataError(f"--keep-column {name}: a sample's JSON uses this name itself. Choose another column")
    kept = [named("--keep-column", name, _is_scalar, "numbers, texts or truth values") for name in keep]
    status = tuple(columns[name] for name in ("key", "status", "error_message")) if is_img2dataset else ()
    split = columns.get("split") if options.split is not None else None
    class_names = () if label is None else _class_names(features, label.name)
    split = split if split and _is_text(split) else None
    return Columns(image, tuple(captions), label, class_names, tuple(kept), status, split)


def _base(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type inside lists and dictionary encodings."""
    while types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return kind


def _is_scalar(column: Column) -> bool:
    """Return whether a column has one number, text or truth value in a row."""
    is_list = len(column.path) > 1 or types.is_list(column.type) or types.is_large_list(column.type)
    is_number = types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)
    return not is_list and (is_number or _is_text(column))


def _is_text(column: Column) -> bool:
    kind = _base(column.type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_image(column: Column) -> bool:
    """Return whether a column has bytes, or Hugging Face's struct of bytes and path."""
    kind = _base(column.type)
    is_struct = types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}
    return bool(is_struct) or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _class_names(features: Any, name: str) -> tuple[str, ...]:
    """Return the names of a `ClassLabel` in Hugging Face's metadata; none for any other column."""
    feature = features.get(name) if isinstance(features, dict) else None
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _label_texts(job: Import, files: Sequence[str], label: Column) -> tuple[str, ...]:
    """Return the distinct texts of a label column of all files, sorted, from a pass over that column alone.

    The files are those of every split, so that splits which are built one by one number the classes alike.
    """
    texts = set[str]()
    for file in files:
        with _opened(job, file) as parquet:
            for batch in parquet.iter_batches(columns=[label.path[0]]):
                texts.update(text for number in range(batch.num_rows) if (text := _value(batch, number, label)))
    return tuple(sorted(texts))


def _value(batch: pyarrow.RecordBatch, row: int, column: Column) -> Any:
    """Return a row's value in a column; of a field inside lists, the list of values. Raises Unusable."""

    def inside(value: Any, path: Sequence[str]) -> Any:
        if isinstance(value, list):
            values = [inside(item, path) for item in value]
            return [part for item in values for part in (item if isinstance(item, list) else [item])]
        return value if not path or value is None else inside(value[path[0]], path[1:])

    try:
        return inside(batch.column(column.path[0])[row].as_py(), column.path[1:])
    except UnicodeDecodeError as error:
        raise Unusable(f"{column.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, OverflowError, NotImplementedError) as error:
        raise Unusable(f"{column.name} cannot be read ({error})") from error


def _record(job: Import, columns: Columns, values: dict[Column, Any], where: str, key: str) -> Record | None:
    """Return a row's record, or None for one that img2dataset could not download. Raises Unusable."""
    image = values[columns.image]
    if columns.status:
        key = str(values[columns.status[0]])
    if image is None and columns.status:
        reason = ": ".join(str(values[column]) for column in columns.status[1:])
        job.problems.add(where, f"img2dataset has no image ({reason:.200})", is_fault=False)
        return None
    if isinstance(image, list):
        if len(image) != 1:
            raise Unusable(f"it has {len(image)} images; a sample has one")
        image = image[0]
    if isinstance(image, dict):  # Hugging Face datasets: {"bytes": …, "path": …}
        data = image.get("bytes")
        if data is not None and not isinstance(data, bytes):
            raise Unusable(f"its image is not bytes but a {type(data).__name__}")
        image = image.get("path") if data is None else data
    if not isinstance(image, str | bytes) or not image.strip():
        raise Unusable(f"it has no image ({image!r:.50}); expected bytes, a path, or a struct of both")
    captions, label = list[str](), None
    if columns.captions:
        texts = [values[column] for column in columns.captions]
        texts = [text for value in texts for text in (value if isinstance(value, list) else [value])]
        captions = inputs.clean_captions([text for text in texts if text is not None], where, job.problems)
    if columns.label is not None:
        value = values[columns.label]
        names = job.choices.get(CLASSES, ())
        label = names.index(value) if value in names else value
        if not isinstance(label, int) or label < 0 or (names and label >= len(names)):
            expected = f"0 to {len(names) - 1}" if names else "a class number"
            raise Unusable(f"its {columns.label.name} is {value!r:.50}; expected {expected} (a test split has -1)")
    more = {column.name: values[column] for column in columns.kept if values[column] is not None}
    for name, value in more.items():
        if isinstance(value, str):
            inputs.check_text(value, f"its {name}")
    more = {name: value for name, value in more.items() if not isinstance(value, float) or math.isfinite(value)}
    return Record(where, image if isinstance(image, str) else key, captions, image, label=label, more=more)
