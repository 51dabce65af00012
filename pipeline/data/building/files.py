"""Samples from untrusted input files: folders with links, texts in several encodings, images named by lists.

Nothing is skipped silently: what cannot be used is recorded in `Problems` with its file and line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pipeline.config.errors import DataError
from pipeline.data.contents.images import EXTENSIONS, FORMATS, format_of
from pipeline.data.contents.members import is_visible

Sample = dict[str, Any]
Files = dict[str, bytes]  # by extension, the image first

# Image formats that are not read: reported one by one, unlike other files in a folder.
OTHER_IMAGES = frozenset({
    "arw", "cr2", "cr3", "dng", "emf", "eps", "exr", "hdr", "heic", "heif", "hif", "ico", "j2k", "jp2", "jpf", "jpx",
    "jxl", "jxr", "nef", "orf", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "raf", "raw", "rw2", "svg", "svgz", "tga",
    "wdp", "wmf", "xcf",
})  # fmt: skip
_BYTE_ORDER_MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_HEAD = 65_536  # characters at the start of a file by which its kind is detected
KNOWN_SUFFIXES = ", ".join(f".{extension}" for extension in EXTENSIONS)
MAX_KEY = 80  # a plain tar header has names of up to 100 bytes
_ENTRY_ERRORS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)


@dataclass
class Problems:
    """The record of skipped input: counts and the first messages. With `strict` the first fault is raised."""

    strict: bool = False
    keep: int = 10
    allow_outside: bool = False  # lists may name images outside the folder that their paths are relative to
    count: int = 0  # everything skipped
    faults: int = 0  # of these, those with a fault
    absent: int = 0  # of these, missing images
    first: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # other files, by suffix

    def add(self, where: str, reason: str) -> None:
        """Record a fault. Raises DataError if `strict`."""
        self.faults += 1
        self.leave_out(where, reason)
        if self.strict:
            raise DataError(f"{where}: {reason}. Correct it, or import without --strict to skip it")

    def leave_out(self, where: str, reason: str) -> None:
        """Record skipped input that has no fault."""
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(f"{where}: {reason}")


@dataclass(frozen=True)
class ImportOptions:
    """Inputs besides the source; each format reads those that it needs."""

    images: Path | None = None  # the folder that image paths are relative to (default: the source's own)
    image_column: str | None = None  # table, parquet: name, or number from 1 (default: detected)
    caption_column: str | None = None
    words: int = 64  # text: maximum number in a sample
    annotations: tuple[Path, ...] = ()  # vqa: files of answers (default: by the name of the questions file)
    split: str | None = None  # karpathy: the split to import (default: all)
    listed_only: bool = False  # vqa, vg_qa: skip questions without a listed answer
    min_count: int | None = None  # vqa, vg_qa: minimum frequency of a listed answer (default: 9, as published)


# Texts ----------------------------------------------------------------------------------------------------------------


def fault_of(text: str) -> str | None:
    """Return the fault of a text read by `open_text` or from JSON; None for valid Unicode without NUL."""
    if "\0" in text:
        return "it contains NUL characters (UTF-16 without a byte order mark?); save it as UTF-8"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return f"it is not UTF-8 (byte {code - 0xDC00:#x}; Latin-1 or Windows-1252?); save it as UTF-8"
        return f"it contains a lone surrogate (U+{code:04X}: a truncated text?)"
    return None


def open_text(path: Path) -> TextIO:
    """Open a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Bytes that are not UTF-8 become lone surrogates, which `fault_of` reports. Raises DataError if it cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if begin.startswith(mark)), "utf-8-sig")
        return path.open(encoding=encoding, errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def beginning_of(path: Path) -> str:
    """Return the first characters of a text. Raises DataError if they cannot be read."""
    with open_text(path) as stream:
        try:
            return stream.read(_HEAD)
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Save it as UTF-8") from error


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each line. Raises DataError if the file cannot be read to its end."""
    with open_text(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                yield f"{path}, line {number}", line.removeprefix("\ufeff") if number == 1 else line
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path}, after line {number}: cannot be read ({error}). Save it as UTF-8") from error


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield the location and the content of each line of JSON; skip empty lines, and record those that are invalid."""
    for where, line in lines_of(path):
        if not line.strip():
            continue
        if reason := fault_of(line):
            problems.add(where, reason)
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"not JSON ({error})")
            continue
        yield where, content


def json_of(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32. Raises DataError if it cannot be parsed."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({type(error).__name__}: {error})") from error


def clean_captions(captions: object, where: str, problems: Problems, expected: str = "a text") -> list[str]:
    """Return the non-empty captions of a text or a list of texts, each on one line.

    Values that are not texts, invalid Unicode and the absence of any caption are recorded as faults.
    """
    faults = problems.faults
    clean = []
    for caption in captions if isinstance(captions, list) else [] if captions is None else [captions]:
        if not isinstance(caption, str):
            problems.add(where, f"a caption is not a text but a {type(caption).__name__}")
        elif reason := fault_of(caption):
            problems.add(where, f"a caption is skipped: {reason}")
        elif is_visible(line := " ".join(caption.split())):
            clean.append(line)
    if not clean and problems.faults == faults:
        problems.add(where, f"it has no caption, or an empty one (expected {expected})")
    return clean


# Entries of JSON lists ------------------------------------------------------------------------------------------------


T = TypeVar("T")


def entries_of(
    file: Path, what: str, entries: object, read: Callable[[Any], T], problems: Problems, expected: str
) -> list[T]:
    """Return the results of `read` on the entries of a JSON list; entries that it cannot read are recorded as faults.

    Raises DataError if it is not a list, or none of its entries can be read.
    """
    if not isinstance(entries, list):
        raise DataError(f"{file}: {what} is not a list but a {type(entries).__name__}. Expected {expected}")
    results, reason = [], ""
    for number, entry in enumerate(entries):
        try:
            results.append(read(entry))
        except _ENTRY_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            problems.add(f"{file}, {what} {number}", f"cannot be used ({reason}); expected {expected}")
    if entries and not results:
        raise DataError(f"{file}: none of its {what} can be used ({reason}). Expected {expected}")
    return results


def text_in(entry: Mapping[str, Any], name: str) -> str:
    """Return an entry's text. Raises TypeError or ValueError if it is missing or invalid."""
    value = entry.get(name)
    if not isinstance(value, str):
        raise TypeError(f"its {name} is not a text but {value!r:.50}")
    if not value.strip():
        raise ValueError(f"its {name} is empty")
    if reason := fault_of(value):
        raise ValueError(f"its {name}: {reason}")
    return value


def number_in(entry: Mapping[str, Any], name: str) -> int:
    """Return an id as an integer of 64 bits. Raises TypeError, ValueError or OverflowError if it is not one."""
    value = entry[name]
    is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int | str)
    if isinstance(value, bool) or not is_whole:
        raise TypeError(f"its {name} is not a whole number but {value!r:.50}")
    if abs(int(value)) >= 1 << 63:
        raise OverflowError(f"its {name} is beyond 64 bits: {value!r:.50}")
    return int(value)


# Images -------------------------------------------------------------------------------------------------------------


def find_file(root: Path, names: Sequence[str], where: str, problems: Problems) -> Path | None:
    """Return the first of `names` that is a file below `root`, else the first name; None for a forbidden path.

    A list with paths outside `root` could pack any file of this machine into shards that are then shared.
    """
    base = os.path.abspath(root)
    paths = []
    for name in names:
        if not name.strip() or "\0" in name or fault_of(name):
            problems.add(where, f"{name!r:.80} is not a file path")
            return None
        if name.startswith(("http://", "https://", "s3://", "gs://")):
            problems.add(where, f"{name:.200} is a URL, which is not fetched; download it first (img2dataset does)")
            return None
        path = Path(os.path.abspath(os.path.join(base, name)))
        if not problems.allow_outside and os.path.commonpath([base, path]) != base:
            problems.add(where, f"{name} is outside {root}; set --images to a folder above it, or pass --allow-outside")
            return None
        paths.append(path)
    for path in paths:
        with suppress(OSError, ValueError):  # a name that is too long
            if path.is_file():
                return path
    return paths[0]


def read_listed_image(root: Path, names: Sequence[str], where: str, problems: Problems) -> Files | None:
    """Read the image that a list names, from the first of its possible names that exists."""
    path = find_file(root, names, where, problems)
    return None if path is None else read_image(path, where, problems)


def read_image(path: Path, where: str, problems: Problems) -> Files | None:
    """Return an image file by the extension of its content. It is not decoded: training counts damaged images."""
    data = read_file(path, where, problems, "image")
    return None if data is None else image_files(data, str(path), where, problems)


def image_files(data: bytes, name: str, where: str, problems: Problems) -> Files | None:
    """Return an encoded image by the extension of its content; record a fault and return None if it is not an image."""
    kind = format_of(data)
    if kind is None:
        problems.add(where, f"{name} is not a {', '.join(FORMATS)} (it begins with {data[:8]!r})")
        return None
    return {FORMATS[kind][0]: data}


def read_file(path: Path, where: str, problems: Problems, what: str) -> bytes | None:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        problems.absent += isinstance(error, FileNotFoundError)
        problems.add(where, f"{what} {path} cannot be read ({getattr(error, 'strerror', None) or error})")
        return None


# Folders --------------------------------------------------------------------------------------------------------------


def folders_below(folder: Path, problems: Problems) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield a folder and those below it, each with the sorted names of its folders and files; links are followed.

    Hidden names are skipped. A folder that several links lead to is entered once, so that cycles end.
    """
    entered: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        path = pending.pop()
        try:
            state = path.stat()
            names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
        except OSError as error:
            problems.add(str(path), f"the folder cannot be read ({error.strerror or error})")
            continue
        if (state.st_dev, state.st_ino) in entered:
            problems.leave_out(str(path), "it links to a folder that was already read")
            continue
        entered.add((state.st_dev, state.st_ino))
        folders = [name for name in names if (path / name).is_dir()]
        files = [name for name in names if (path / name).is_file()]
        for name in sorted(set(names).difference(folders, files)):
            problems.add(str(path / name), "it is neither a file nor a folder (a broken link?)")
        yield path, folders, files
        pending += [path / name for name in reversed(folders)]


def files_below(folder: Path, extensions: Sequence[str], problems: Problems | None = None) -> Iterator[Path]:
    """Yield the files below `folder` with one of `extensions`, folder by folder; count the others."""
    problems = problems or Problems()
    for path, _, names in folders_below(folder, problems):
        for name in names:
            if suffix_of(name) in extensions:
                yield path / name
            else:
                pass_over(path / name, problems)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower().lstrip(".")


def pass_over(path: Path, problems: Problems) -> None:
    """Record a file that is not read: individually if it is an image of another format, else by its suffix."""
    suffix = suffix_of(path.name)
    if suffix in OTHER_IMAGES:
        problems.leave_out(str(path), f"this image format is not supported; convert it to one of {KNOWN_SUFFIXES}")
    else:
        problems.skipped[f".{suffix}" if suffix else "without suffix"] += 1


# Samples --------------------------------------------------------------------------------------------------------------


class Keys:
    """Unique sample keys from paths, of letters, digits, '_' and '-', valid for tars and webdataset."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._numbers: dict[str, int] = {}  # the last number used for each path

    def __call__(self, path: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", path).strip("_")[-MAX_KEY:].lstrip("_") or "sample"
        key, number = plain, self._numbers.get(plain, 1)
        while key in self._used:
            number += 1
            key = f"{plain}-{number}"
        self._used.add(key)
        self._numbers[plain] = number
        return key


def pair_sample(
    key: str, files: Files, captions: list[str] | None, image_id: int | None, where: str, problems: Problems
) -> Iterator[Sample]:
    """Yield an image with its captions, or alone. Without an `image_id`, equal bytes are the same image."""
    if image_id is None:
        image_id = int.from_bytes(hashlib.sha256(next(iter(files.values()))).digest()[:8], "big") >> 1
    record: dict[str, Any] = {"image_id": image_id}
    if captions is not None:
        record["captions"] = captions
    return sample_with_json(key, files, record, where, problems)


def sample_with_json(
    key: str, files: Files, record: Mapping[str, Any], where: str, problems: Problems
) -> Iterator[Sample]:
    """Yield a sample with its json, or record a problem if a text is not valid Unicode."""
    try:
        encoded = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        problems.add(where, fault_of(error.object) or str(error))
        return
    yield {"__key__": key, **files, "json": encoded}
