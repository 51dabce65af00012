"""Samples from untrusted input files. What cannot be used raises `Unusable` and is recorded in `Problems`."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from pipeline.config.errors import DataError
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import EXTENSIONS, FORMATS, format_of
from pipeline.data.contents.members import is_visible
from pipeline.data.storage import Storage

T = TypeVar("T")
Sample = dict[str, Any]
Files = dict[str, bytes]  # by extension, the image first
Kind = Literal[
    "folder",
    "jsonl",
    "coco",
    "list",
    "table",
    "parquet",
    "text",
    "vqa",
    "vg_qa",
    "vg_regions",
    "nlvr2",
    "karpathy",
    "classes",
]

# Image formats that are not read: reported one by one, unlike other files in a folder.
OTHER_IMAGES = frozenset({
    "arw", "cr2", "cr3", "dng", "emf", "eps", "exr", "hdr", "heic", "heif", "hif", "ico", "j2k", "jp2", "jpf", "jpx",
    "jxl", "jxr", "nef", "orf", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "raf", "raw", "rw2", "svg", "svgz", "tga",
    "wdp", "wmf", "xcf",
})  # fmt: skip
_BYTE_ORDER_MARKS = (  # longest first: UTF-32's mark begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
KNOWN_SUFFIXES = ", ".join(f".{extension}" for extension in EXTENSIONS)
MAX_KEY = 80  # a plain tar header has names of up to 100 bytes
MAX_MESSAGES = 10


class Unusable(Exception):
    """The reason why an entry of the input cannot be used. Readers skip such an entry: `Problems.skipping`."""


class Absent(Unusable):
    """A listed file that does not exist."""


@dataclass
class Problems:
    """The record of skipped input: counts and the first messages. With `strict` the first fault is raised."""

    strict: bool = False
    count: int = 0  # everything skipped
    faults: int = 0  # of these, those with a fault
    absent: int = 0  # of these, missing files
    first: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # other files, by suffix

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """Record an entry whose processing raises `Unusable` as a fault."""
        try:
            yield
        except Unusable as error:
            self.absent += isinstance(error, Absent)
            self.add(where, str(error))

    def add(self, where: str, reason: str, is_fault: bool = True) -> None:
        """Record skipped input. Raises DataError for a fault if `strict`."""
        self.count += 1
        self.faults += is_fault
        if len(self.first) < MAX_MESSAGES:
            self.first.append(f"{where}: {reason}")
        if self.strict and is_fault:
            raise DataError(f"{where}: {reason}. Correct it, or import without --strict to skip it")

    def pass_over(self, path: Path) -> None:
        """Record a file that is not read: individually if it is an image of another format, else by its suffix."""
        suffix = suffix_of(path.name)
        if suffix in OTHER_IMAGES:
            reason = f"this image format is not supported; convert it to one of {KNOWN_SUFFIXES}"
            self.add(str(path), reason, is_fault=False)
        else:
            self.skipped[f".{suffix}" if suffix else "without suffix"] += 1


@dataclass(frozen=True)
class ImportOptions:
    """Inputs besides the source; each format reads those that it needs."""

    images: Path | None = None  # the folder that image paths are relative to (default: the source's own)
    allow_outside: bool = False  # lists may name images outside that folder
    image_column: str | None = None  # table, parquet: name, or number from 1 (default: detected)
    caption_column: str | None = None
    label_column: str | None = None  # parquet
    keep_columns: tuple[str, ...] = ()  # parquet: stored in the samples' JSON
    words: int = 64  # text: maximum number in a sample
    annotations: tuple[Path, ...] = ()  # vqa: files of answers (default: by the name of the questions file)
    split: str | None = None  # karpathy, parquet: the split to import (default: all, or the only one)
    listed_only: bool = False  # vqa, vg_qa: skip questions without a listed answer
    min_count: int | None = None  # vqa, vg_qa: minimum frequency of a listed answer (default: 9, as published)


@dataclass
class Import:
    """The import of a source: its samples, read lazily, and the lists of choices, complete with the first sample."""

    source: Path
    kind: Kind
    options: ImportOptions = ImportOptions()
    problems: Problems = field(default_factory=Problems)
    samples: Iterator[Sample] = field(default_factory=lambda: iter(()))
    choices: dict[str, Choices] = field(default_factory=dict)  # by the name of the file next to the shards
    url: str | None = None  # of Parquet files in a store, which are read instead of the source
    storage: Storage = field(default_factory=Storage)
    _keys: dict[str, int] = field(default_factory=dict)  # every key, and the last number that was added to it

    def find(self, *names: str) -> Path:
        """Return the first of `names` that is a file, else the first name. Raise Unusable for a forbidden path: one
        outside the folder could pack any file of this machine into shards that are then shared.
        """
        if self.url is not None and self.options.images is None:
            raise Unusable(f"{names[0]:.200} is a path; give the folder of the images on this machine with --images")
        root = self.options.images or (self.source if self.source.is_dir() else self.source.parent)
        base, paths = os.path.abspath(root), list[Path]()
        for name in names:
            check_text(name, f"{name!r:.80} is not a file path: it")
            if not name.strip():
                raise Unusable(f"{name!r:.80} is not a file path")
            if name.startswith(("http://", "https://", "s3://", "gs://")):
                raise Unusable(f"{name:.200} is a URL, which is not fetched; download it first (img2dataset does)")
            paths.append(Path(os.path.abspath(os.path.join(base, name))))
            if not self.options.allow_outside and os.path.commonpath([base, paths[-1]]) != base:
                raise Unusable(f"{name} is outside {root}; set --images to a folder above it, or pass --allow-outside")
        for path in paths:
            with suppress(OSError, ValueError):  # a name that is too long
                if path.is_file():
                    return path
        return paths[0]

    def sample(self, path: str, files: Files, record: Mapping[str, Any] | None = None) -> Sample:
        """Return a sample with its json, under a unique key made from a path. Raises Unusable for invalid Unicode."""
        if record is not None:
            check_text(encoded := json.dumps(record, ensure_ascii=False))
            files = files | {"json": encoded.encode()}
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", path).strip("_")[-MAX_KEY:].lstrip("_") or "sample"
        key, number = plain, self._keys.get(plain, 1)
        while key in self._keys:
            number += 1
            key = f"{plain}-{number}"
        self._keys |= {key: 1, plain: number}
        return {"__key__": key, **files}

    def pair(
        self, path: str, files: Files, captions: list[str] | None, image_id: int | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Sample:  # fmt: skip
        """Return an image with its captions, or alone. Without an `image_id`, equal bytes are the same image."""
        if image_id is None:
            image_id = int.from_bytes(hashlib.sha256(next(iter(files.values()))).digest()[:8], "big") >> 1
        record = {**more, "image_id": image_id} | ({} if captions is None else {"captions": captions})
        return self.sample(path, files, record)


def check_text(text: str, what: str = "it") -> None:
    """Raise Unusable unless a text of `lines_of` or of JSON is valid Unicode without NUL."""
    if "\0" in text:
        raise Unusable(f"{what} contains NUL characters (UTF-16 without a byte order mark?); save it as UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        fault = f"contains a lone surrogate (U+{code:04X}: a truncated text?)"
        if 0xDC80 <= code <= 0xDCFF:
            fault = f"is not UTF-8 (byte {code - 0xDC00:#x}; Latin-1 or Windows-1252?); save it as UTF-8"
        raise Unusable(f"{what} {fault}") from None


def lines_of(path: Path, longest: int = -1) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each line, in pieces of at most `longest` characters. Bytes that cannot be
    decoded become lone surrogates, which `check_text` reports. Raises DataError if the file cannot be read to its end.
    """
    number = 0
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS if begin.startswith(mark)), "utf-8-sig")
        with path.open(encoding=encoding, errors="surrogateescape") as text:
            for number, line in enumerate(iter(partial(text.readline, longest), ""), 1):
                yield f"{path}, line {number}", line.removeprefix("\ufeff") if number == 1 else line
    except (OSError, ValueError) as error:
        place = f"{path}, after line {number}" if number else path
        remedy = ". Save it as UTF-8" if isinstance(error, UnicodeError) else ""
        raise DataError(f"{place}: cannot be read ({getattr(error, 'strerror', None) or error}){remedy}") from error


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield the location and the content of each line of JSON; skip empty lines, and record those that are invalid."""
    for where, line in lines_of(path):
        with problems.skipping(where):
            if line.strip():
                check_text(line)
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise Unusable(f"not JSON ({error})") from error
                yield where, content


def json_of(path: Path, form: str = "", *fields: str) -> Any:
    """Return a JSON file's content. Raises DataError unless it is an object with the `fields` of its `form`, if any."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({type(error).__name__}: {error})") from error
    if fields and not (isinstance(content, dict) and content.keys() >= set(fields)):
        raise DataError(f"{path} is not a {form}. Expected an object with {' and '.join(map(repr, fields))}")
    return content


def clean_captions(captions: object, where: str, problems: Problems, expected: str = "a text") -> list[str]:
    """Return the visible texts of one or several captions, each on one line. Raises Unusable if there is none."""
    clean, faults = list[str](), list[str]()
    for caption in captions if isinstance(captions, list) else [] if captions is None else [captions]:
        try:
            if not isinstance(caption, str):
                raise Unusable(f"a caption is not a text but a {type(caption).__name__}")
            check_text(caption, "a caption is skipped: it")
            clean += filter(is_visible, [" ".join(caption.split())])
        except Unusable as error:
            faults.append(str(error))
    if not clean:
        raise Unusable(faults[0] if faults else f"it has no caption, or an empty one (expected {expected})")
    for fault in faults:
        problems.add(where, fault)
    return clean


def entries_of(
    file: Path, what: str, entries: object, read: Callable[[Any], T], problems: Problems, expected: str
) -> list[T]:
    """Return `read` of each entry of a list or of `json_lines`. Raises DataError if it is no list, or none is read."""
    if isinstance(entries, list):
        entries = [(f"{file}, {what} {number}", entry) for number, entry in enumerate(entries)]
    elif not isinstance(entries, Iterator):
        raise DataError(f"{file}: {what} is not a list but a {type(entries).__name__}. Expected {expected}")
    results: list[T] = []
    fault = ""
    for where, entry in entries:
        try:
            results.append(read(entry))
        except (Unusable, KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            reason = str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
            fault = f"cannot be used ({reason}); expected {expected}"
            problems.add(where, fault)
    if fault and not results:
        raise DataError(f"{file}: none of its {what} can be used; the last {fault}")
    return results


def fields(entry: Any, **kinds: type) -> tuple[Any, ...]:
    """Return an entry's texts with content (str), ids of 64 bits (int), truth values (bool, of NLVR2 as texts), or
    other values; raise Unusable for values of another kind.
    """
    values = []
    for name, kind in kinds.items():
        value = entry.get(name)
        if kind is int:
            is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int | str)
            if isinstance(value, bool) or not is_whole:
                raise Unusable(f"its {name} is not a whole number but {value!r:.50}")
            if abs(value := int(value)) >= 1 << 63:
                raise Unusable(f"its {name} is beyond 64 bits: {value!r:.50}")
        elif kind is bool:
            if (text := str(value).lower()) not in ("true", "false"):
                raise Unusable(f"its {name} is neither True nor False but {value!r:.50}")
            value = text == "true"
        elif not isinstance(value, kind):
            raise Unusable(f"its {name} is not a {'text' if kind is str else kind.__name__} but {value!r:.50}")
        elif isinstance(value, str):
            if not value.strip():
                raise Unusable(f"its {name} is empty")
            check_text(value, f"its {name}: it")
        values.append(value)
    return tuple(values)


def read_file(path: Path, what: str = "image") -> bytes:
    """Return the content of a file. Raises Unusable if it cannot be read, and Absent if it does not exist."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        kind = Absent if isinstance(error, FileNotFoundError) else Unusable
        raise kind(f"{what} {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def encoded_image(image: bytes | Path, name: str = "") -> Files:
    """Return an image by the extension of its content, not decoded. Raises Unusable if it is none or missing."""
    data, name = (read_file(image), str(image)) if isinstance(image, Path) else (image, name)
    kind = format_of(data)
    if kind is None:
        raise Unusable(f"{name} is not a {', '.join(FORMATS)} (it begins with {data[:8]!r})")
    return {FORMATS[kind][0]: data}


def folders_below(folder: Path, problems: Problems) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield a folder and those below, each once and with its sorted visible folders and files; links are followed."""
    entered, pending = set[tuple[int, int]](), [folder]
    while pending:
        path = pending.pop()
        try:
            state = path.stat()
            names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
        except OSError as error:
            problems.add(str(path), f"the folder cannot be read ({error.strerror or error})")
            continue
        if (state.st_dev, state.st_ino) in entered:
            problems.add(str(path), "it links to a folder that was already read", is_fault=False)
            continue
        entered.add((state.st_dev, state.st_ino))
        folders = [name for name in names if (path / name).is_dir()]
        files = [name for name in names if (path / name).is_file()]
        for name in sorted(set(names).difference(folders, files)):
            problems.add(str(path / name), "it is neither a file nor a folder (a broken link?)")
        yield path, folders, files
        pending += [path / name for name in reversed(folders)]


def files_below(folder: Path, extensions: Sequence[str], problems: Problems) -> Iterator[Path]:
    """Yield the files below `folder` with one of `extensions`, folder by folder; count the others."""
    for path, _, names in folders_below(folder, problems):
        for name in names:
            if suffix_of(name) in extensions:
                yield path / name
            else:
                problems.pass_over(path / name)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower().lstrip(".")
