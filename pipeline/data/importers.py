"""What people have on disk (folders, jsonl, COCO captions, plain text) to samples, and samples to tar shards.

A reader yields samples one by one, {"__key__": …, "jpg": bytes, "json": bytes} or {"__key__": …, "txt": bytes},
and tells `Problems` what it had to leave out. Encoded images are copied as they are, never re-encoded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from webdataset.writer import TarWriter

from pipeline.config.errors import DataError
from pipeline.data.images import EXTENSIONS
from pipeline.data.index import SIDECAR
from pipeline.data.manifest import MANIFEST, Manifest, index_shards
from pipeline.data.randomness import hash64
from pipeline.data.storage import Storage, join

Sample = dict[str, Any]
Kind = Literal["folder", "jsonl", "coco", "text"]
Progress = Callable[[int, int, str], None]  # shards done, shards in all (0: not known), name

MAX_KEY = 80  # a tar's plain header holds names of 100 bytes
WORDS_PER_TEXT = 64


@dataclass
class Problems:
    """What could not be imported: all counted, the first ones kept. With `strict` the first one is raised."""

    strict: bool = False
    keep: int = 10
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if self.strict:
            raise DataError(f"{where}: {reason}. Mend it, or import without --strict to leave it out")
        if len(self.first) < self.keep:
            self.first.append(f"{where}: {reason}")


def find_kind(source: Path) -> Kind:
    """What a source looks like. Raises DataError when it is nothing that can be imported."""
    if source.is_dir():
        if next(_files(source, EXTENSIONS), None) is not None:
            return "folder"
        if next(_files(source, ("txt",)), None) is not None:
            return "text"
        raise DataError(f"{source}: no images (.jpg, .png, .webp) and no .txt files in this folder")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    kinds: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "coco", ".txt": "text"}
    kind = kinds.get(source.suffix.lower())
    if kind is None:
        raise DataError(f"{source}: unknown kind of file. Expected .jsonl, .json (COCO) or .txt, or give --kind")
    return kind


def read_samples(
    source: Path, kind: Kind, problems: Problems, images: Path | None = None, words: int = WORDS_PER_TEXT
) -> Iterator[Sample]:
    """The samples of a source of the given kind. `images` is the folder that image paths are relative to."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    if kind == "folder":
        return folder_samples(source, problems)
    if kind == "jsonl":
        return jsonl_samples(source, problems, images)
    if kind == "coco":
        return coco_samples(source, problems, images)
    return text_samples(source, problems, words)


def folder_samples(folder: Path, problems: Problems) -> Iterator[Sample]:
    """Every image below `folder`, in the order of their paths; a .txt beside it of the same name is its caption."""
    key_of = _Keys()
    for path in _files(folder, EXTENSIONS):
        caption = path.with_suffix(".txt")
        captions = _clean([caption.read_text("utf-8", errors="replace")]) if caption.exists() else None
        if captions == []:
            problems.add(str(caption), "the caption is empty")
            continue
        image = _read_image(path, str(path), problems)
        if image is not None:
            yield _pair(key_of(str(path.relative_to(folder).with_suffix(""))), image, captions)


def jsonl_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """Lines {"image": path, "captions": [text, …]} or {"image": path, "caption": text}.

    Paths are relative to `images`, or to the file. Lines of one image that follow each other become one sample.
    """
    key_of = _Keys()
    root = images or file.parent
    with file.open(encoding="utf-8", errors="replace") as stream:
        numbered = ((f"{file}, line {number}", line) for number, line in enumerate(stream, 1) if line.strip())
        parsed = (record for where, line in numbered if (record := _parse_line(where, line, problems)) is not None)
        for name, group in itertools.groupby(parsed, key=lambda record: record.image):
            records = list(group)
            image = _read_image(root / name, records[0].where, problems)
            if image is not None:
                captions = [caption for record in records for caption in record.captions]
                yield _pair(key_of(str(Path(name).with_suffix(""))), image, captions, records[0].image_id)


def coco_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """COCO's caption JSON (`images`, `annotations`), with its pictures in the folder `images`."""
    try:
        content = json.loads(file.read_text("utf-8"))
        pictures = {int(entry["id"]): str(entry["file_name"]) for entry in content["images"]}
        annotations = [(int(entry["image_id"]), str(entry["caption"])) for entry in content["annotations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is no COCO caption file ({type(error).__name__}: {error}). "
            "Expected an object with 'images' (id, file_name) and 'annotations' (image_id, caption)"
        ) from error
    captions: dict[int, list[str]] = {}
    for picture, caption in annotations:
        captions.setdefault(picture, []).append(caption)
    key_of = _Keys()
    for picture, name in pictures.items():
        where = f"{file}, image {picture}"
        if not (said := _clean(captions.get(picture, []))):
            problems.add(where, "it has no caption")
            continue
        image = _read_image((images or file.parent) / name, where, problems)
        if image is not None:
            yield _pair(key_of(str(Path(name).with_suffix(""))), image, said, picture)


def text_samples(source: Path, problems: Problems, words: int = WORDS_PER_TEXT) -> Iterator[Sample]:
    """Plain text (a file, or every .txt below a folder) in pieces of at most `words` words.

    Pieces end where sentences end if they can, and never cross an empty line. WikiText's headings are left out,
    its `<unk>` is dropped and its ` @-@ ` joined again.
    """
    key_of = _Keys()
    for path in [source] if source.is_file() else list(_files(source, ("txt",))):
        number = -1
        for number, piece in enumerate(text_pieces(_paragraphs(path), words)):
            yield {"__key__": key_of(f"{path.stem}-{number:07d}"), "txt": piece.encode()}
        if number < 0:
            problems.add(str(path), "it holds no text")


def text_pieces(paragraphs: Iterable[str], words: int) -> Iterator[str]:
    """Whole sentences packed into pieces of at most `words` words; a longer sentence is cut."""
    for paragraph in paragraphs:
        piece: list[str] = []
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
            said = sentence.split()
            if piece and len(piece) + len(said) > words:
                yield " ".join(piece)
                piece = []
            while len(said) > words:
                yield " ".join(said[:words])
                said = said[words:]
            piece += said
        if piece:
            yield " ".join(piece)


def check_writable(storage: Storage, url: str, overwrite: bool) -> None:
    """Raises DataError when shards already lie at `url`, unless they are to be overwritten."""
    found = [name for name in storage.list(url) if name.endswith(".tar") or name == MANIFEST]
    if found and not overwrite:
        state = "shards" if MANIFEST in found else "tars without a manifest (another import, not finished?)"
        raise DataError(f"{url} already holds {state}. Choose another folder, or give --overwrite to replace them")


def write_shards(
    storage: Storage,
    samples: Iterable[Sample],
    url: str,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Write samples to tars at any URL, in place of the shards there, then index them; `manifest.json` comes last.

    Each tar is written by webdataset to a temporary file first, so that a shard is whole or absent. The same
    samples give the same bytes. Raises DataError, and leaves everything as it was, when there is no sample.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise DataError(f"nothing to write to {url}: not one usable sample was found")
    _clear(storage, url)
    try:
        _upload_tars(storage, itertools.chain([first], stream), url, samples_per_shard, progress)
    except Exception:
        _clear(storage, url)  # a reader that fails half-way leaves no tars behind
        raise
    return index_shards(storage, url, progress)


def _upload_tars(
    storage: Storage, samples: Iterator[Sample], url: str, samples_per_shard: int, progress: Progress | None
) -> None:
    with tempfile.TemporaryDirectory(prefix="mome-shards-") as folder:
        for number, batch in enumerate(_batched(samples, samples_per_shard)):
            local = Path(folder) / shard_name(number)
            _write_tar(local, batch)
            storage.upload(local, join(url, local.name))
            local.unlink()
            if progress:
                progress(number + 1, 0, local.name)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _clear(storage: Storage, url: str) -> None:
    """Remove the shards at `url`: manifest first, so that no moment shows a manifest of missing tars."""
    names = storage.list(url)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if name == MANIFEST or name.endswith((".tar", ".tar" + SIDECAR)):
            storage.delete(join(url, name))


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _batched(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


@dataclass(frozen=True)
class _Line:
    where: str
    image: str
    captions: list[str]
    image_id: int | None


def _parse_line(where: str, line: str, problems: Problems) -> _Line | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        problems.add(where, f"not JSON ({error})")
        return None
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        problems.add(where, 'expected {"image": path, "captions": [text, …]}')
        return None
    captions = record.get("captions", record.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not (captions := _clean(captions)):
        problems.add(where, "it has no caption (expected 'captions': a list of texts, or 'caption': a text)")
        return None
    return _Line(where, record["image"], captions, _as_image_id(record.get("image_id")))


def _as_image_id(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return hash64("image_id", str(value)) >> 1


def _pair(key: str, image: tuple[str, bytes], captions: list[str] | None, image_id: int | None = None) -> Sample:
    """An image with its captions, or alone. Without an id of its own, equal bytes are the same image."""
    extension, data = image
    if image_id is None:
        image_id = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
    described: dict[str, Any] = {"image_id": image_id}
    if captions is not None:
        described["captions"] = captions
    return {"__key__": key, extension: data, "json": json.dumps(described, ensure_ascii=False).encode()}


def _read_image(path: Path, where: str, problems: Problems) -> tuple[str, bytes] | None:
    """(extension by content, bytes). Pixels are not decoded here: a picture damaged inside is training's to count."""
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.add(where, f"image {path} cannot be read ({error.strerror or error})")
        return None
    extension = _image_extension(data)
    if extension is None:
        problems.add(where, f"{path} is no JPEG, PNG or WebP (it begins with {data[:8]!r})")
        return None
    return extension, data


def _image_extension(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _files(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Files below `folder` in the order of their paths; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower().lstrip(".") in extensions and not hidden and path.is_file():
            yield path


def _clean(captions: Iterable[Any]) -> list[str]:
    """Captions on one line each, without empty ones and what is no text."""
    return [said for caption in captions if isinstance(caption, str) and (said := " ".join(caption.split()))]


def _paragraphs(path: Path) -> Iterator[str]:
    """The text between empty lines and headings, cleaned."""
    lines: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in itertools.chain(stream, [""]):
            heading = re.fullmatch(r"\s*=+ .* =+\s*", line)
            if line.strip() and not heading:
                lines.append(_untokenise(line))
            elif lines:
                yield " ".join(lines)
                lines = []


def _untokenise(line: str) -> str:
    """Undo WikiText's marks: `film @-@ maker` is film-maker, `<unk>` stands for a word that was removed."""
    return re.sub(r" @([-.,])@ ", r"\1", line).replace("<unk>", " ").replace("\ufeff", "")


class _Keys:
    """Distinct sample keys from paths: letters, digits, '_' and '-', as tars and webdataset want them."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def __call__(self, path: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", path).strip("_")[-MAX_KEY:].lstrip("_") or "sample"
        key, number = plain, 1
        while key in self._used:
            number += 1
            key = f"{plain}-{number}"
        self._used.add(key)
        return key
