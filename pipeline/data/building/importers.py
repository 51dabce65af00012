"""Importers of folders, lists, tables, COCO captions and plain text, and the writer of tar shards.

A reader yields samples one by one, {"__key__": …, "jpg": bytes, "json": bytes} or {"__key__": …, "txt": bytes},
and records in `Problems` what it skips. Encoded images are copied unchanged, never re-encoded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from webdataset.writer import TarWriter

from pipeline.config.errors import DataError
from pipeline.data.building.files import (
    Files,
    Problems,
    Sample,
    beginning_of,
    clean_captions,
    clean_lines,
    entries_of,
    fault_of,
    files_below,
    find_file,
    folders_below,
    image_files,
    json_of,
    known_suffixes,
    lines_of,
    number_in,
    pass_over,
    read_file,
    read_image,
    read_listed_image,
    suffix_of,
    text_in,
)
from pipeline.data.building.tables import Columns, Record, is_table, parquet_records, table_records
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.contents.members import REGIONS, is_visible
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64
from pipeline.data.shards.index import SIDECAR
from pipeline.data.shards.manifest import MANIFEST, Manifest, index_shards
from pipeline.data.storage import Storage, join

Kind = Literal["folder", "jsonl", "coco", "list", "table", "parquet", "text"]
Progress = Callable[[int, int, str], None]  # shards done, total (0: unknown), name of the last

MAX_KEY = 80  # a plain tar header has names of up to 100 bytes
WORDS_PER_TEXT = 64
CAPTION_SUFFIXES = ("txt", "caption")
# The kind of a file by its suffix, and of a folder by the first of these extensions that it contains.
_SUFFIXES: dict[str, Kind] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "txt": "text",
    "csv": "table",
    "tsv": "table",
    "psv": "table",
    "token": "table",
    "parquet": "parquet",
}
_FOLDERS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (EXTENSIONS, "folder"),
    (("txt",), "text"),
    (("parquet",), "parquet"),
)


def find_kind(source: Path) -> Kind:
    """Return the kind of a source. Raises DataError when it cannot be imported."""
    if source.is_dir():
        for extensions, kind in _FOLDERS:
            if next(files_below(source, extensions), None) is not None:
                return kind
        if next(files_below(source, ("tar",)), None) is not None:
            raise DataError(f"{source}: a folder of tars, which need no import: run `mome shards index {source}`")
        raise DataError(f"{source}: no images ({known_suffixes()}), no .txt and no .parquet files in this folder")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    suffix = suffix_of(source.name)
    if suffix == "json":
        return _kind_of_json(source)
    if suffix == "txt" and is_table(source):  # Flickr8k.token.txt, and Kaggle's captions.txt
        return "table"
    if suffix not in _SUFFIXES:
        expected = ", ".join(f".{suffix}" for suffix in (*_SUFFIXES, "json"))
        raise DataError(f"{source}: unknown file type. Expected {expected}, or pass --kind")
    return _SUFFIXES[suffix]


def _kind_of_json(source: Path) -> Kind:
    """Distinguish COCO's object, a list of images, and lines of JSON in a .json file."""
    first, is_lines, _ = beginning_of(source).lstrip().partition("\n")
    if first.startswith("["):
        return "list"
    try:
        record = json.loads(first) if is_lines else None
    except (ValueError, RecursionError):
        return "coco"
    return "jsonl" if isinstance(record, dict) and not record.keys().isdisjoint(("image", "regions")) else "coco"


def read_samples(
    source: Path,
    kind: Kind,
    problems: Problems,
    images: Path | None = None,
    words: int = WORDS_PER_TEXT,
    columns: Columns = Columns(),
) -> Iterator[Sample]:
    """Return the samples of a source of the given kind. `images` is the folder that image paths are relative to."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    root = images or (source if source.is_dir() else source.parent)
    if kind in ("folder", "text") and images is not None:
        raise DataError(
            f"{source} is read as {kind}, which lists no images, but --images was given. For a list of images with "
            "captions pass --kind table (lines of image and caption) or --kind jsonl; else remove --images"
        )
    if kind == "folder":
        return folder_samples(source, problems)
    if kind == "jsonl":
        return jsonl_samples(source, problems, images)
    if kind == "coco":
        return coco_samples(source, problems, images)
    if kind == "list":
        return list_samples(source, problems, images)
    if kind == "table":
        return samples_of_records(table_records(source, columns, problems), root, problems)
    if kind == "parquet":
        return samples_of_records(parquet_records(source, columns, problems), root, problems)
    return text_samples(source, problems, words)


def folder_samples(folder: Path, problems: Problems) -> Iterator[Sample]:
    """Yield every image below `folder`, in the order of their paths, with the caption next to it.

    The caption of x.jpg is in x.txt, x.caption, x.jpg.txt or x.jpg.caption, in this order; the suffix is
    case-insensitive.
    """
    key_of = Keys()
    for path, _, names in folders_below(folder, problems):
        caption_files = {
            f"{os.path.splitext(name)[0]}.{suffix_of(name)}": name
            for name in names
            if suffix_of(name) in CAPTION_SUFFIXES
        }
        used = set()
        for name in names:
            if suffix_of(name) not in EXTENSIONS:
                continue
            captions = None
            stems = (os.path.splitext(name)[0], name)
            candidates = [f"{stem}.{suffix}" for stem in stems for suffix in CAPTION_SUFFIXES]
            caption_file = next((caption_files[c] for c in candidates if c in caption_files), None)
            if caption_file:
                used.add(caption_file)
                text = _text_of(path / caption_file, problems)
                if text is None:
                    continue
                captions = clean_captions(text, str(path / caption_file), problems)
                if not captions:
                    continue
            image = read_image(path / name, str(path / name), problems)
            if image is not None:
                key = key_of(os.path.splitext(os.path.relpath(path / name, folder))[0])
                yield from pair_sample(key, image, captions, None, str(path / name), problems)
        for name in names:
            if name in used or suffix_of(name) in EXTENSIONS:
                continue
            if suffix_of(name) in CAPTION_SUFFIXES:
                problems.leave_out(str(path / name), "there is no image of this name next to it")
            else:
                pass_over(path / name, problems)


def _text_of(path: Path, problems: Problems) -> str | None:
    try:
        text = "".join(line for _, line in lines_of(path))
    except DataError as error:
        problems.add(str(path), str(error))
        return None
    if reason := fault_of(text):
        problems.add(str(path), reason)
        return None
    return text


def jsonl_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """Yield the samples of lines {"image": path, "captions": [text, …]} or {"image": path, "caption": text}.

    Paths are relative to `images`, or to the file. Consecutive lines of one image become one sample. With `"regions"`,
    the path of a detector's .npz (see `contents.regions`), the image is optional, and `"image_size"` may give the
    [height, width] that the boxes refer to, where the .npz does not.
    """
    records = (_parse_line(where, line, problems) for where, line in clean_lines(file, problems))
    return samples_of_records(records, images or file.parent, problems)


def list_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """Yield the samples of a JSON list of such records (annotation files of BLIP and ALBEF), grouped by image."""
    entries = json_of(file)
    if not isinstance(entries, list):
        raise DataError(f'{file} is not a list. Expected [{{"image": path, "caption": text or list of texts}}, …]')
    records: dict[str, list[Record]] = {}
    for number, entry in enumerate(entries):
        record = _parse_record(f"{file}, entry {number}", entry, problems)
        if record is not None:
            records.setdefault(record.name, []).append(record)
    return samples_of_records(itertools.chain.from_iterable(records.values()), images or file.parent, problems)


def samples_of_records(records: Iterable[Record | None], root: Path, problems: Problems) -> Iterator[Sample]:
    """Yield a sample for each image; consecutive records of one image become one sample."""
    key_of = Keys()
    valid = (record for record in records if record is not None)
    for name, group in itertools.groupby(valid, key=lambda record: record.name):
        first, *others = group
        files = _read_files(root, first, problems)
        if files is None:
            for record in others:
                problems.add(record.where, f"its image {name} is skipped, see {first.where}")
            continue
        captions = [*first.captions, *(caption for record in others for caption in record.captions)]
        key = key_of(os.path.splitext(name)[0])
        yield from pair_sample(key, files, captions, first.image_id, first.where, problems)


def coco_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """Yield the samples of a COCO caption file (`images`, `annotations`), with image files in the folder `images`."""
    content = json_of(file)
    expected = "an object with 'images' (id, file_name) and 'annotations' (image_id, caption)"
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise DataError(f"{file} is not a COCO caption file. Expected {expected}")
    listed = entries_of(
        file, "images", content["images"], lambda entry: (number_in(entry, "id"), text_in(entry, "file_name")),
        problems, expected,
    )  # fmt: skip
    annotations = entries_of(
        file, "annotations", content["annotations"],
        lambda entry: (number_in(entry, "image_id"), text_in(entry, "caption")), problems, expected,
    )  # fmt: skip
    names: dict[int, str] = {}
    for image_id, name in listed:
        if image_id in names:
            problems.add(f"{file}, image {image_id}", f"its id occurs twice; {name} is skipped")
        else:
            names[image_id] = name
    captions: dict[int, list[str]] = {}
    for image_id, caption in annotations:
        if image_id not in names:
            problems.leave_out(f"{file}, caption of image {image_id}", "no image of this id is listed")
        captions.setdefault(image_id, []).append(caption)
    key_of = Keys()
    for image_id, name in names.items():
        where = f"{file}, image {image_id}"
        if not (texts := clean_captions(captions.get(image_id, []), where, problems)):
            continue
        image = read_listed_image(images or file.parent, [name], where, problems)
        if image is not None:
            yield from pair_sample(key_of(os.path.splitext(name)[0]), image, texts, image_id, where, problems)


def text_samples(source: Path, problems: Problems, words: int = WORDS_PER_TEXT) -> Iterator[Sample]:
    """Yield plain text (a file, or every .txt below a folder) in pieces of at most `words` words.

    Pieces end at sentence ends where possible and never cross an empty line. WikiText's headings and `<unk>` are
    dropped and its ` @-@ ` is joined.
    """
    key_of = Keys()
    for path in [source] if source.is_file() else files_below(source, ("txt",), problems):
        number = -1
        pieces = (piece for piece in text_pieces(_paragraphs(path, problems), words) if is_visible(piece))
        try:
            for number, piece in enumerate(pieces):
                yield {"__key__": key_of(f"{path.stem}-{number:07d}"), "txt": piece.encode()}
        except DataError as error:
            if source.is_file() or problems.strict:
                raise
            problems.add(str(path), str(error))  # one unreadable text among many is skipped
            continue
        if number < 0:
            problems.add(str(path), "it contains no text")


def text_pieces(paragraphs: Iterable[str], words: int) -> Iterator[str]:
    """Yield pieces of whole sentences, at most `words` words each; a longer sentence is split."""
    for paragraph in paragraphs:
        piece: list[str] = []
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
            tokens = sentence.split()
            if piece and len(piece) + len(tokens) > words:
                yield " ".join(piece)
                piece = []
            while len(tokens) > words:
                yield " ".join(tokens[:words])
                tokens = tokens[words:]
            piece += tokens
        if piece:
            yield " ".join(piece)


def check_writable(storage: Storage, url: str, overwrite: bool) -> None:
    """Raise DataError when `url` already has shards, unless they are to be overwritten."""
    existing = _shards_at(storage, url)
    if existing and not overwrite:
        state = "shards" if MANIFEST in existing else "tars without a manifest (another import, not finished?)"
        raise DataError(f"{url} already has {state}. Choose another folder, or pass --overwrite to replace them")


def _shards_at(storage: Storage, url: str) -> list[str]:
    return [name for name in storage.list(url) if name.endswith(".tar") or name == MANIFEST]


def write_shards(
    storage: Storage,
    samples: Iterable[Sample],
    url: str,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Write samples to tars at any URL, replacing the shards there, then index them; `manifest.json` is written last.

    Each tar is written to a temporary file first, so that a shard is complete or absent. Existing shards are replaced
    once all tars are written, which takes their size in temporary files. The same samples give the same bytes. Raises
    DataError and changes nothing when there is no sample or a reader fails.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise DataError(f"nothing to write to {url}: no usable sample was found")
    with tempfile.TemporaryDirectory(prefix="mome-shards-") as folder:
        tars = _write_tars(Path(folder), itertools.chain([first], stream), samples_per_shard)
        if _shards_at(storage, url):
            tars = iter(list(tars))
        _clear(storage, url)
        try:
            for number, tar in enumerate(tars, 1):
                storage.upload(tar, join(url, tar.name))
                tar.unlink()
                if progress:
                    progress(number, 0, tar.name)
        except Exception:
            _clear(storage, url)  # a reader that fails half-way must leave no tars
            raise
    return index_shards(storage, url, progress)


def _write_tars(folder: Path, samples: Iterator[Sample], samples_per_shard: int) -> Iterator[Path]:
    for number in itertools.count():
        if not (batch := list(itertools.islice(samples, samples_per_shard))):
            return
        tar = folder / shard_name(number)
        try:
            write_tar(tar, batch)
        except OSError as error:
            reason = f"cannot write temporary files ({error.strerror or error})"
            raise DataError(f"{folder}: {reason}. Free space there, or set TMPDIR to another folder") from error
        yield tar


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _clear(storage: Storage, url: str) -> None:
    """Remove the shards at `url`, the manifest first: a manifest must never list missing tars."""
    names = storage.list(url)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if name == MANIFEST or name.endswith((".tar", ".tar" + SIDECAR)):
            storage.delete(join(url, name))


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """Write the samples to one tar; the same samples give the same bytes."""
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _parse_line(where: str, line: str, problems: Problems) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.add(where, f"not JSON ({error})")
        return None
    return _parse_record(where, record, problems)


def _parse_record(where: str, record: Any, problems: Problems) -> Record | None:
    """Return one line of jsonl or entry of a list; record a problem and return None if it cannot be used."""
    paths = (
        [record[name] for name in ("image", "regions") if record.get(name) is not None]
        if isinstance(record, dict)
        else []
    )
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        problems.add(where, 'expected {"image": path, "captions": [text, …]}')
        return None
    size = record.get("image_size")
    sides = size if isinstance(size, list) else []
    is_size = len(sides) == 2 and all(type(side) is int and 0 < side < 1 << 31 for side in sides)
    if size is not None and not is_size:
        problems.add(where, f"its image_size is {size!r:.50}; expected [height, width]")
        return None
    expected = "'captions': a list of texts, or 'caption': a text"
    texts = record["caption"] if record.get("captions") is None and "caption" in record else record.get("captions")
    captions = clean_captions(texts, where, problems, expected)
    if not captions:
        return None
    try:
        image_id = _as_image_id(record.get("image_id"))
    except ValueError as error:
        problems.add(where, str(error))
        return None
    size = None if size is None else (size[0], size[1])
    return Record(where, record.get("image"), captions, image_id, record.get("regions"), size)


def _as_image_id(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its image_id is {value}; expected a finite number or a text")
    if reason := fault_of(str(value)):
        raise ValueError(f"its image_id: {reason}")
    return hash64("image_id", str(value)) >> 1


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


def _read_files(root: Path, record: Record, problems: Problems) -> Files | None:
    """Return the image and the regions that a record names; None if one cannot be read."""
    files: Files = {}
    if record.data is not None:
        image = image_files(record.data, record.name, record.where, problems)
    elif record.image is not None:
        image = read_listed_image(root, [record.image], record.where, problems)
    else:
        image = {}
    if image is None:
        return None
    files |= image
    if record.regions is not None:
        path = find_file(root, [record.regions], record.where, problems)
        data = None if path is None else read_file(path, record.where, problems, "regions")
        if data is None:
            return None
        try:
            regions = parse_regions(data, record.image_size)
        except BadSample as error:
            problems.add(record.where, f"{path}: {error.reason}")
            return None
        files[REGIONS] = data if record.image_size is None else regions.to_bytes()
    return files


def _paragraphs(path: Path, problems: Problems) -> Iterator[str]:
    """Yield the text between empty lines and headings, cleaned."""
    lines: list[str] = []
    for where, line in itertools.chain(lines_of(path), [("", "")]):
        if reason := fault_of(line):
            problems.add(where, reason)
            continue
        heading = re.fullmatch(r"\s*=+ .* =+\s*", line)
        if line.strip() and not heading:
            # WikiText's marks: `film @-@ maker` is film-maker, `<unk>` is a removed word.
            lines.append(re.sub(r" @([-.,])@ ", r"\1", line).replace("<unk>", " ").replace("\ufeff", ""))
        elif lines:
            yield " ".join(lines)
            lines = []


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
