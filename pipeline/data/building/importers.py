"""Import of files into tar shards: detection of a source's format, readers of each, and the writer.

A reader yields samples one by one, {"__key__": …, "jpg": bytes, "json": bytes} or {"__key__": …, "txt": bytes},
and records in `Problems` what it skips. Encoded images are copied unchanged, never re-encoded. Tables and published
annotation files have modules of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from webdataset.writer import TarWriter

from pipeline.config.errors import DataError
from pipeline.data.building import annotation_files as published
from pipeline.data.building.files import (
    KNOWN_SUFFIXES,
    Files,
    ImportOptions,
    Keys,
    Problems,
    Sample,
    beginning_of,
    clean_captions,
    entries_of,
    fault_of,
    files_below,
    find_file,
    folders_below,
    image_files,
    json_lines,
    json_of,
    lines_of,
    number_in,
    pair_sample,
    pass_over,
    read_file,
    read_image,
    read_listed_image,
    suffix_of,
    text_in,
)
from pipeline.data.building.tables import Record, is_table, parquet_records, table_records
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.contents.members import REGIONS, is_visible
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64
from pipeline.data.shards.index import SIDECAR
from pipeline.data.shards.manifest import MANIFEST, Manifest, index_shards
from pipeline.data.storage import Progress, Storage, join

Kind = Literal[
    "folder", "jsonl", "coco", "list", "table", "parquet", "text", "vqa", "vg_qa", "nlvr2", "karpathy", "classes"
]
CAPTION_SUFFIXES = ("txt", "caption")
_KIND_OF_SUFFIX: dict[str, Kind] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "txt": "text",
    "csv": "table",
    "tsv": "table",
    "psv": "table",
    "token": "table",
    "parquet": "parquet",
}
# The kind of a folder, by the first of these extensions that it contains.
_KIND_OF_FOLDER: dict[tuple[str, ...], Kind] = {EXTENSIONS: "folder", ("txt",): "text", ("parquet",): "parquet"}
# The kind of an annotation file, by patterns that the beginning of its JSON contains.
_KIND_OF_JSON: dict[Kind, tuple[str, ...]] = {
    "vg_qa": (r'"qas"\s*:', r'"qa_id"\s*:'),
    "vqa": (r'"questions"\s*:\s*\[',),
    "karpathy": (r'"sentences"\s*:', r'"split"\s*:', r'"filename"\s*:'),
    "nlvr2": (r'"sentence"\s*:', r'"identifier"\s*:', r'"label"\s*:'),
}


@dataclass(frozen=True)
class Import:
    """Samples, read lazily, and the lists of choices to be stored next to their shards, by file name."""

    samples: Iterator[Sample]
    choices: Mapping[str, Choices] = field(default_factory=dict)


def find_kind(source: Path) -> Kind:
    """Return the kind of a source. Raises DataError when it cannot be imported."""
    if source.is_dir():
        for extensions, kind in _KIND_OF_FOLDER.items():
            if next(files_below(source, extensions), None) is not None:
                return kind
        if next(files_below(source, ("tar",)), None) is not None:
            raise DataError(f"{source}: a folder of tars, which need no import: run `mome shards index {source}`")
        raise DataError(f"{source}: no images ({KNOWN_SUFFIXES}), no .txt and no .parquet files in this folder")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    suffix = suffix_of(source.name)
    if suffix in ("json", "jsonl", "ndjson"):
        head = beginning_of(source)
        for kind, patterns in _KIND_OF_JSON.items():
            if all(re.search(pattern, head) for pattern in patterns):
                return kind
        first, is_lines, _ = head.lstrip().partition("\n")
        if suffix != "json":
            return "jsonl"
        if first.startswith("["):
            return "list"
        try:  # lines of JSON, or COCO's object
            record = json.loads(first) if is_lines else None
        except (ValueError, RecursionError):
            record = None
        return "jsonl" if isinstance(record, dict) and not record.keys().isdisjoint(("image", "regions")) else "coco"
    if suffix == "txt" and is_table(source):  # Flickr8k.token.txt, and Kaggle's captions.txt
        return "table"
    if suffix not in _KIND_OF_SUFFIX:
        expected = ", ".join(f".{suffix}" for suffix in (*_KIND_OF_SUFFIX, "json"))
        raise DataError(f"{source}: unknown file type. Expected {expected}, or pass --kind")
    return _KIND_OF_SUFFIX[suffix]


def read_source(source: Path, kind: Kind, problems: Problems, options: ImportOptions = ImportOptions()) -> Import:
    """Read a source of the given kind. Raises DataError when it is missing, and as its reader does."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    if kind in ("folder", "text") and options.images is not None:
        raise DataError(
            f"{source} is read as {kind}, which lists no images, but --images was given. For a list of images with "
            "captions pass --kind table (lines of image and caption) or --kind jsonl; else remove --images"
        )
    readers: dict[Kind, Callable[[Path, Problems, ImportOptions], Iterator[Sample]]] = {
        "folder": folder_samples,
        "jsonl": jsonl_samples,
        "list": list_samples,
        "coco": coco_samples,
        "text": text_samples,
        "nlvr2": published.nlvr2_samples,
        "karpathy": published.karpathy_samples,
    }
    if kind in readers:
        return Import(readers[kind](source, problems, options))
    if kind in ("table", "parquet"):
        records = (table_records if kind == "table" else parquet_records)(source, options, problems)
        root = options.images or (source if source.is_dir() else source.parent)
        return Import(samples_of_records(records, root, problems))
    with_choices = {
        "vqa": published.vqa_samples,
        "vg_qa": published.visual_genome_samples,
        "classes": published.class_samples,
    }
    return Import(*with_choices[kind](source, problems, options))


def folder_samples(folder: Path, problems: Problems, _: ImportOptions = ImportOptions()) -> Iterator[Sample]:
    """Yield every image below `folder`, in the order of their paths, with the caption next to it.

    The caption of x.jpg is in x.txt, x.caption, x.jpg.txt or x.jpg.caption, in this order; the suffix is
    case-insensitive.
    """
    key_of = Keys()
    for path, _folders, names in folders_below(folder, problems):
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
            stem = os.path.splitext(name)[0]
            candidates = [f"{begin}.{suffix}" for begin in (stem, name) for suffix in CAPTION_SUFFIXES]
            caption_file = next((caption_files[c] for c in candidates if c in caption_files), None)
            if caption_file:
                used.add(caption_file)
                where = str(path / caption_file)
                try:
                    text = "".join(line for _, line in lines_of(path / caption_file))
                    reason = fault_of(text)
                except DataError as error:
                    reason = str(error)
                if reason:
                    problems.add(where, reason)
                    continue
                captions = clean_captions(text, where, problems)
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


def jsonl_samples(file: Path, problems: Problems, options: ImportOptions = ImportOptions()) -> Iterator[Sample]:
    """Yield the samples of lines {"image": path, "captions": [text, …]} or {"image": path, "caption": text}.

    Paths are relative to `options.images`, or to the file. Consecutive lines of one image become one sample. With
    `"regions"`, the path of a detector's .npz (see `contents.regions`), the image is optional, and `"image_size"` may
    give the [height, width] that the boxes refer to, where the .npz does not.
    """
    records = (_parse_record(where, entry, problems) for where, entry in json_lines(file, problems))
    return samples_of_records(records, options.images or file.parent, problems)


def list_samples(file: Path, problems: Problems, options: ImportOptions = ImportOptions()) -> Iterator[Sample]:
    """Yield the samples of a JSON list of such records (annotation files of BLIP and ALBEF), grouped by image."""
    entries = json_of(file)
    if not isinstance(entries, list):
        raise DataError(f'{file} is not a list. Expected [{{"image": path, "caption": text or list of texts}}, …]')
    records: dict[str, list[Record]] = {}
    for number, entry in enumerate(entries):
        record = _parse_record(f"{file}, entry {number}", entry, problems)
        if record is not None:
            records.setdefault(record.name, []).append(record)
    return samples_of_records(itertools.chain.from_iterable(records.values()), options.images or file.parent, problems)


def _parse_record(where: str, record: Any, problems: Problems) -> Record | None:
    """Return one line of jsonl or entry of a list; record a problem and return None if it cannot be used."""
    record = record if isinstance(record, dict) else {}
    paths = [record[name] for name in ("image", "regions") if record.get(name) is not None]
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
    image_id = record.get("image_id")
    if isinstance(image_id, float) and not math.isfinite(image_id):
        problems.add(where, f"its image_id is {image_id}; expected a finite number or a text")
        return None
    if image_id is not None and not (isinstance(image_id, int) and abs(image_id) < 1 << 63):
        if reason := fault_of(str(image_id)):
            problems.add(where, f"its image_id: {reason}")
            return None
        image_id = hash64("image_id", str(image_id)) >> 1
    image_size = (sides[0], sides[1]) if sides else None
    return Record(where, record.get("image"), captions, image_id, record.get("regions"), image_size)


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


def _read_files(root: Path, record: Record, problems: Problems) -> Files | None:
    """Return the image and the regions that a record names; None if one cannot be read."""
    image: Files | None = {}
    if record.data is not None:
        image = image_files(record.data, record.name, record.where, problems)
    elif record.image is not None:
        image = read_listed_image(root, [record.image], record.where, problems)
    if image is None or record.regions is None:
        return image
    path = find_file(root, [record.regions], record.where, problems)
    data = None if path is None else read_file(path, record.where, problems, "regions")
    if data is None:
        return None
    try:
        regions = parse_regions(data, record.image_size)
    except BadSample as error:
        problems.add(record.where, f"{path}: {error.reason}")
        return None
    return image | {REGIONS: data if record.image_size is None else regions.to_bytes()}


def coco_samples(file: Path, problems: Problems, options: ImportOptions = ImportOptions()) -> Iterator[Sample]:
    """Yield the samples of a COCO caption file (`images`, `annotations`), with image files in `options.images`."""
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
        image = read_listed_image(options.images or file.parent, [name], where, problems)
        if image is not None:
            yield from pair_sample(key_of(os.path.splitext(name)[0]), image, texts, image_id, where, problems)


def text_samples(source: Path, problems: Problems, options: ImportOptions = ImportOptions()) -> Iterator[Sample]:
    """Yield plain text (a file, or every .txt below a folder) in pieces of at most `options.words` words.

    Pieces end at sentence ends where possible and never cross an empty line. WikiText's headings and `<unk>` are
    dropped and its ` @-@ ` is joined.
    """
    key_of = Keys()
    for path in [source] if source.is_file() else files_below(source, ("txt",), problems):
        number = -1
        pieces = (piece for piece in text_pieces(_paragraphs(path, problems), options.words) if is_visible(piece))
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


# Shards ---------------------------------------------------------------------------------------------------------------


def check_writable(storage: Storage, url: str, overwrite: bool) -> None:
    """Raise DataError when `url` already has shards, unless they are to be overwritten."""
    existing = _shards_at(storage, url)
    if existing and not overwrite:
        state = "shards" if MANIFEST in existing else "tars without a manifest (another import, not finished?)"
        raise DataError(f"{url} already has {state}. Choose another folder, or pass --overwrite to replace them")


def write_shards(
    storage: Storage,
    samples: Iterable[Sample],
    url: str,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Write samples to tars at any URL, replacing the shards there, then index them; `manifest.json` is written last.

    Each tar is written to a temporary file first, so that a shard is complete or absent. Existing shards are replaced
    once all tars are written, which takes their size in temporary files. The same samples give the same bytes.
    `progress` receives (shards done, total or 0 if unknown, name of the last). Raises DataError and changes nothing
    when there is no sample or a reader fails.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise DataError(f"nothing to write to {url}: no usable sample was found")

    def clear() -> None:
        """Remove the shards, the manifest first: a manifest must never list missing tars."""
        names = [name for name in storage.list(url) if name == MANIFEST or name.endswith((".tar", ".tar" + SIDECAR))]
        for name in sorted(names, key=lambda name: name != MANIFEST):
            storage.delete(join(url, name))

    with tempfile.TemporaryDirectory(prefix="mome-shards-") as folder:
        tars = _write_tars(Path(folder), itertools.chain([first], stream), samples_per_shard)
        if _shards_at(storage, url):
            tars = iter(list(tars))
        clear()
        try:
            for number, tar in enumerate(tars, 1):
                storage.upload(tar, join(url, tar.name))
                tar.unlink()
                if progress:
                    progress(number, 0, tar.name)
        except Exception:
            clear()  # a reader that fails half-way must leave no tars
            raise
    return index_shards(storage, url, progress)


def _shards_at(storage: Storage, url: str) -> list[str]:
    """Return the names of a folder's shards and of their manifest; sidecars alone are no shards."""
    return [name for name in storage.list(url) if name == MANIFEST or name.endswith(".tar")]


def _write_tars(folder: Path, samples: Iterator[Sample], samples_per_shard: int) -> Iterator[Path]:
    for number in itertools.count():
        if not (batch := list(itertools.islice(samples, samples_per_shard))):
            return
        tar = folder / f"{number:06d}.tar"
        try:
            write_tar(tar, batch)
        except OSError as error:
            reason = f"cannot write temporary files ({error.strerror or error})"
            raise DataError(f"{folder}: {reason}. Free space there, or set TMPDIR to another folder") from error
        yield tar


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """Write the samples to one tar; the same samples give the same bytes."""
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
