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
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.contents.members import REGIONS
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64
from pipeline.data.shards.index import SIDECAR
from pipeline.data.shards.manifest import MANIFEST, Manifest, index_shards
from pipeline.data.storage import Storage, join

Sample = dict[str, Any]
Files = dict[str, bytes]  # by extension, the one that names the image first
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
        """Something is wrong with it."""
        self.leave_out(where, reason)
        if self.strict:
            raise DataError(f"{where}: {reason}. Mend it, or import without --strict to leave it out")

    def leave_out(self, where: str, reason: str) -> None:
        """Nothing is wrong with it, and it was asked to be left out."""
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(f"{where}: {reason}")


def find_kind(source: Path) -> Kind:
    """What a source looks like. Raises DataError when it is nothing that can be imported."""
    if source.is_dir():
        if next(files_below(source, EXTENSIONS), None) is not None:
            return "folder"
        if next(files_below(source, ("txt",)), None) is not None:
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
    key_of = Keys()
    for path in files_below(folder, EXTENSIONS):
        caption = path.with_suffix(".txt")
        captions = clean_captions([caption.read_text("utf-8", errors="replace")]) if caption.exists() else None
        if captions == []:
            problems.add(str(caption), "the caption is empty")
            continue
        image = read_image(path, str(path), problems)
        if image is not None:
            yield pair_sample(key_of(str(path.relative_to(folder).with_suffix(""))), image, captions)


def jsonl_samples(file: Path, problems: Problems, images: Path | None = None) -> Iterator[Sample]:
    """Lines {"image": path, "captions": [text, …]} or {"image": path, "caption": text}.

    Paths are relative to `images`, or to the file. Lines of one image that follow each other become one sample. With
    `"regions"`, the path of a detector's .npz (see `regions`), the image may be left out, and `"image_size"` may give
    [height, width] of the picture that the boxes are told in, where the .npz does not.
    """
    key_of = Keys()
    root = images or file.parent
    with file.open(encoding="utf-8", errors="replace") as stream:
        numbered = ((f"{file}, line {number}", line) for number, line in enumerate(stream, 1) if line.strip())
        parsed = (record for where, line in numbered if (record := _parse_line(where, line, problems)) is not None)
        for name, group in itertools.groupby(parsed, key=lambda record: record.name):
            records = list(group)
            found = _read_files(root, records[0], problems)
            if found is not None:
                captions = [caption for record in records for caption in record.captions]
                yield pair_sample(key_of(str(Path(name).with_suffix(""))), found, captions, records[0].image_id)


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
    key_of = Keys()
    for picture, name in pictures.items():
        where = f"{file}, image {picture}"
        if not (said := clean_captions(captions.get(picture, []))):
            problems.add(where, "it has no caption")
            continue
        image = read_image((images or file.parent) / name, where, problems)
        if image is not None:
            yield pair_sample(key_of(str(Path(name).with_suffix(""))), image, said, picture)


def text_samples(source: Path, problems: Problems, words: int = WORDS_PER_TEXT) -> Iterator[Sample]:
    """Plain text (a file, or every .txt below a folder) in pieces of at most `words` words.

    Pieces end where sentences end if they can, and never cross an empty line. WikiText's headings are left out,
    its `<unk>` is dropped and its ` @-@ ` joined again.
    """
    key_of = Keys()
    for path in [source] if source.is_file() else list(files_below(source, ("txt",))):
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
            write_tar(local, batch)
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


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """One tar of the samples; the same samples give the same bytes."""
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _batched(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


@dataclass(frozen=True)
class _Line:
    where: str
    image: str | None
    captions: list[str]
    image_id: int | None
    regions: str | None = None
    image_size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The path that names its sample."""
        name = self.image or self.regions
        assert name is not None
        return name


def _parse_line(where: str, line: str, problems: Problems) -> _Line | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        problems.add(where, f"not JSON ({error})")
        return None
    if not isinstance(record, dict) or not isinstance(record.get("image", record.get("regions")), str):
        problems.add(where, 'expected {"image": path, "captions": [text, …]}')
        return None
    regions, size = record.get("regions"), record.get("image_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)):
        problems.add(where, f"its image_size is {size!r}, not [height, width]")
        return None
    captions = record.get("captions", record.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not (captions := clean_captions(captions)):
        problems.add(where, "it has no caption (expected 'captions': a list of texts, or 'caption': a text)")
        return None
    size = None if size is None else tuple(size)
    return _Line(where, record.get("image"), captions, _as_image_id(record.get("image_id")), regions, size)


def _as_image_id(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return hash64("image_id", str(value)) >> 1


def pair_sample(key: str, files: Files, captions: list[str] | None, image_id: int | None = None) -> Sample:
    """An image with its captions, or alone. Without an id of its own, equal bytes are the same image."""
    if image_id is None:
        image_id = int.from_bytes(hashlib.sha256(next(iter(files.values()))).digest()[:8], "big") >> 1
    described: dict[str, Any] = {"image_id": image_id}
    if captions is not None:
        described["captions"] = captions
    return {"__key__": key, **files, "json": json.dumps(described, ensure_ascii=False).encode()}


def _read_files(root: Path, line: _Line, problems: Problems) -> Files | None:
    """The line's picture and regions, as far as it names them; None if one cannot be read."""
    files: Files = {}
    if line.image is not None:
        image = read_image(root / line.image, line.where, problems)
        if image is None:
            return None
        files |= image
    if line.regions is not None:
        try:
            data = (root / line.regions).read_bytes()
            found = parse_regions(data, line.image_size)
        except OSError as error:
            problems.add(line.where, f"regions {root / line.regions} cannot be read ({error.strerror or error})")
            return None
        except BadSample as error:
            problems.add(line.where, f"{root / line.regions}: {error.reason}")
            return None
        files[REGIONS] = data if line.image_size is None else found.to_bytes()
    return files


def read_image(path: Path, where: str, problems: Problems) -> Files | None:
    """The bytes, by the extension that fits them. Not decoded: a picture damaged inside is training's to count."""
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.add(where, f"image {path} cannot be read ({error.strerror or error})")
        return None
    extension = _image_extension(data)
    if extension is None:
        problems.add(where, f"{path} is no JPEG, PNG or WebP (it begins with {data[:8]!r})")
        return None
    return {extension: data}


def _image_extension(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def files_below(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Files below `folder` in the order of their paths; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower().lstrip(".") in extensions and not hidden and path.is_file():
            yield path


def clean_captions(captions: Iterable[Any]) -> list[str]:
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


class Keys:
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
