"""Import of files into tar shards. A reader yields samples one by one, {"__key__": …, "jpg": bytes, "json": bytes} or
{"__key__": …, "txt": bytes}, and records in `Problems` what it skips. Encoded images are copied unchanged.
"""

import itertools
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building import annotation_files as published
from pipeline.data.building import inputs
from pipeline.data.building.inputs import Import, Sample, Unusable
from pipeline.data.building.tables import Record, first_row, table_records
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.contents.members import REGIONS, is_visible
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64
from pipeline.data.shards.index import SIDECAR
from pipeline.data.shards.manifest import MANIFEST, Manifest, index_shards
from pipeline.data.storage import Progress, Storage, join

CAPTION_SUFFIXES = ("txt", "caption")
_HEAD = 65_536  # characters at the start of a file by which its kind is detected
_KIND_OF_SUFFIX: dict[str, inputs.Kind] = {
    "jsonl": "jsonl", "ndjson": "jsonl", "txt": "text", "csv": "table", "tsv": "table", "psv": "table",
    "token": "table", "parquet": "parquet",
}  # fmt: skip
# The kind of a folder, by the first of these extensions that it contains.
_KIND_OF_FOLDER: dict[tuple[str, ...], inputs.Kind] = {EXTENSIONS: "folder", ("txt",): "text", ("parquet",): "parquet"}
# The kind of an annotation file, by patterns that the beginning of its JSON contains.
_KIND_OF_JSON: dict[inputs.Kind, tuple[str, ...]] = {
    "vg_regions": (r'"regions"\s*:\s*\[', r'"phrase"\s*:'),
    "vg_qa": (r'"qas"\s*:', r'"qa_id"\s*:'),
    "vqa": (r'"questions"\s*:\s*\[',),
    "karpathy": (r'"sentences"\s*:', r'"split"\s*:', r'"filename"\s*:'),
    "nlvr2": (r'"sentence"\s*:', r'"identifier"\s*:', r'"label"\s*:'),
}


def find_kind(source: Path) -> inputs.Kind:
    """Return the kind of a source. Raises DataError when it cannot be imported."""
    if source.is_dir():
        for extensions, kind in _KIND_OF_FOLDER.items():
            path = next(inputs.files_below(source, extensions, inputs.Problems()), None)
            if path is not None and not path.with_suffix(".tar").exists():  # else it lists a tar of img2dataset
                return kind
        if next(inputs.files_below(source, ("tar",), inputs.Problems()), None) is not None:
            command = f"mome shards index {shlex.quote(str(source))}"
            raise DataError(f"{source}: a folder of tars, which need no import: run `{command}`")
        raise DataError(f"{source}: no images ({inputs.KNOWN_SUFFIXES}), no .txt and no .parquet files in this folder")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    suffix = inputs.suffix_of(source.name)
    if suffix in ("json", "jsonl", "ndjson"):
        head = ""
        for _, line in inputs.lines_of(source, _HEAD):
            head += line
            if len(head) >= _HEAD:
                break
        for kind, patterns in _KIND_OF_JSON.items():
            if all(re.search(pattern, head) for pattern in patterns):
                return kind
        first, is_lines, _ = head.lstrip().partition("\n")
        if suffix != "json":
            return "jsonl"
        with suppress(ValueError, RecursionError, AttributeError):  # lines of JSON, or COCO's object
            if is_lines and not json.loads(first).keys().isdisjoint(("image", "regions")):
                return "jsonl"
        return "list" if first.startswith("[") else "coco"
    if suffix == "txt" and first_row(source)[2]:  # Flickr8k.token.txt, and Kaggle's captions.txt
        return "table"
    if suffix not in _KIND_OF_SUFFIX:
        expected = ", ".join(f".{suffix}" for suffix in (*_KIND_OF_SUFFIX, "json"))
        raise DataError(f"{source}: unknown file type. Expected {expected}, or pass --kind")
    return _KIND_OF_SUFFIX[suffix]


def read_source(
    source: Path | str, kind: inputs.Kind, problems: inputs.Problems,
    options: inputs.ImportOptions = inputs.ImportOptions(), storage: Storage = Storage(),
) -> Import:  # fmt: skip
    """Read a source of the given kind; a text is the URL of Parquet files in `storage`.

    Raises DataError when it is missing, and later as its reader does.
    """
    if isinstance(source, str):
        job = Import(Path(), kind, options, problems, url=source, storage=storage)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    else:
        job = Import(source, kind, options, problems)
    if kind == "parquet":
        from pipeline.data.building.parquet import parquet_records  # imports pyarrow, which other kinds do not need

        job.samples = record_samples(job, parquet_records(job))
        return job
    if kind in ("folder", "text") and options.images is not None:
        remedy = "For a list of images with captions pass --kind table or --kind jsonl; else remove --images"
        raise DataError(f"{source} is read as {kind}, which lists no images, but --images was given. {remedy}")
    readers: dict[inputs.Kind, Callable[[Import], Iterator[Any]]] = {
        "folder": folder_samples, "text": text_samples, "coco": published.coco_samples, "jsonl": json_records,
        "nlvr2": published.nlvr2_samples, "karpathy": published.karpathy_samples, "vqa": published.vqa_samples,
        "vg_qa": published.visual_genome_samples,
        "vg_regions": published.visual_genome_captions, "classes": published.class_samples, "list": json_records,
        "table": table_records,
    }  # fmt: skip
    samples = readers[kind](job)
    job.samples = record_samples(job, samples) if kind in ("jsonl", "list", "table") else samples
    return job


def folder_samples(job: Import) -> Iterator[Sample]:
    """Yield the images below a folder; the caption of x.jpg is in x.txt, x.caption, x.jpg.txt or x.jpg.caption."""
    problems = job.problems
    for path, _, names in inputs.folders_below(job.source, problems):
        suffixes = {name: inputs.suffix_of(name) for name in names}
        stems = {name: os.path.splitext(name)[0] for name in names}
        caption_files = {f"{stems[n]}.{suffix}": n for n, suffix in suffixes.items() if suffix in CAPTION_SUFFIXES}
        used = set()
        for name in (name for name in names if suffixes[name] in EXTENSIONS):
            candidates = [f"{begin}.{suffix}" for begin in (stems[name], name) for suffix in CAPTION_SUFFIXES]
            caption_file = next((caption_files[c] for c in candidates if c in caption_files), None)
            captions = None
            if caption_file:
                used.add(caption_file)
                where = str(path / caption_file)
                with problems.skipping(where):
                    try:
                        text = "".join(line for _, line in inputs.lines_of(path / caption_file))
                    except DataError as error:
                        raise Unusable(str(error)) from error
                    captions = inputs.clean_captions(text, where, problems)
                if captions is None:
                    continue
            with problems.skipping(str(path / name)):
                key = os.path.relpath(path / stems[name], job.source)
                yield job.pair(key, inputs.encoded_image(path / name), captions)
        for name, suffix in suffixes.items():
            if suffix in CAPTION_SUFFIXES and name not in used:
                problems.add(str(path / name), "there is no image of this name next to it", is_fault=False)
            elif suffix not in (*CAPTION_SUFFIXES, *EXTENSIONS):
                problems.pass_over(path / name)


def text_samples(job: Import) -> Iterator[Sample]:
    """Yield a text, or every .txt below a folder, in pieces of whole sentences, at most `options.words` words each."""
    is_file, problems = job.source.is_file(), job.problems
    for path in [job.source] if is_file else inputs.files_below(job.source, ("txt",), problems):
        number = -1
        try:
            for number, piece in enumerate(filter(is_visible, text_pieces(path, job.options.words, problems))):
                yield job.sample(f"{path.stem}-{number:07d}", {"txt": piece.encode()})
            if number < 0:
                problems.add(str(path), "it contains no text")
        except DataError as error:
            if is_file or problems.strict:
                raise
            problems.add(str(path), str(error))  # one unreadable text among many is skipped


def text_pieces(path: Path, words: int, problems: inputs.Problems) -> Iterator[str]:
    """Yield pieces of whole sentences, at most `words` words each; a longer sentence is split."""
    paragraph: list[str] = []
    for where, line in itertools.chain(inputs.lines_of(path), [("", "")]):
        with problems.skipping(where):
            inputs.check_text(line)
            if line.strip() and not re.fullmatch(r"\s*=+ .* =+\s*", line):  # WikiText's headings end a paragraph
                # WikiText's marks: `film @-@ maker` is film-maker, `<unk>` is a removed word.
                paragraph.append(re.sub(r" @([-.,])@ ", r"\1", line).replace("<unk>", " ").replace("\ufeff", ""))
                continue
            piece: list[str] = []
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph)):
                tokens = sentence.split()
                if piece and len(piece) + len(tokens) > words:
                    yield " ".join(piece)
                    piece = []
                while len(tokens) > words:
                    yield " ".join(tokens[:words])
                    tokens = tokens[words:]
                piece += tokens
            yield " ".join(piece)  # the caller omits empty ones
            paragraph = []


def json_records(job: Import) -> Iterator[Record]:
    """Yield the records {"image": path, "captions": [text, …]} (or "caption": text) of lines or a list. With "regions",
    a detector's .npz, the image is optional, and "image_size" may give the boxes' [height, width].
    """
    if job.kind == "jsonl":
        entries = inputs.json_lines(job.source, job.problems)
    elif isinstance(content := inputs.json_of(job.source), list):  # annotation files of BLIP and ALBEF
        entries = ((f"{job.source}, entry {number}", entry) for number, entry in enumerate(content))
    else:
        form = '[{"image": path, "caption": text or list of texts}, …]'
        raise DataError(f"{job.source} is not a list. Expected {form}")
    for where, entry in entries:
        with job.problems.skipping(where):
            entry = entry if isinstance(entry, dict) else {}
            paths = [entry[name] for name in ("image", "regions") if entry.get(name) is not None]
            if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
                raise Unusable('expected {"image": path, "captions": [text, …]}')
            size = entry.get("image_size")
            sides = tuple(size) if isinstance(size, list) else ()
            if size is not None and not (len(sides) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in sides)):
                raise Unusable(f"its image_size is {size!r:.50}; expected [height, width]")
            captions = entry.get("caption") if entry.get("captions") is None else entry["captions"]
            expected = "'captions': a list of texts, or 'caption': a text"
            captions = inputs.clean_captions(captions, where, job.problems, expected)
            image_id = entry.get("image_id")
            if isinstance(image_id, float) and not math.isfinite(image_id):
                raise Unusable(f"its image_id is {image_id}; expected a finite number or a text")
            if image_id is not None and not (isinstance(image_id, int) and abs(image_id) < 1 << 63):
                inputs.check_text(str(image_id), "its image_id: it")
                image_id = hash64("image_id", str(image_id)) >> 1
            yield Record(where, paths[0], captions, entry.get("image"), image_id, entry.get("regions"), sides or None)


def record_samples(job: Import, records: Iterable[Record]) -> Iterator[Sample]:
    """Yield a sample for each image: consecutive records of one image become one sample, and all those of a list."""
    groups: Iterable[list[Record]]
    if job.kind == "list":
        by_name: dict[str, list[Record]] = {}
        for record in records:
            by_name.setdefault(record.name, []).append(record)
        groups = by_name.values()
    else:
        groups = (list(group) for _, group in itertools.groupby(records, key=lambda record: record.name))
    for first, *others in groups:
        is_usable = False
        with job.problems.skipping(first.where):
            files: inputs.Files = {}
            if first.image is not None:
                image = first.image if isinstance(first.image, bytes) else job.find(first.image)
                files = inputs.encoded_image(image, first.name)
            if first.regions is not None:
                path = job.find(first.regions)
                data = inputs.read_file(path, "regions")
                try:
                    regions = parse_regions(data, first.image_size)
                except BadSample as error:
                    raise Unusable(f"{path}: {error.reason}") from error
                files |= {REGIONS: data if first.image_size is None else regions.to_bytes()}
            captions = [caption for record in (first, *others) for caption in record.captions]
            files |= {} if first.label is None else {"cls": str(first.label).encode()}
            name = os.path.splitext(first.name)[0] if isinstance(first.image, str) else first.name
            yield job.pair(name, files, captions or None, first.image_id, first.more)
            is_usable = True
        for record in others if not is_usable else ():
            job.problems.add(record.where, f"its image {first.name} is skipped, see {first.where}")


def write_shards(
    storage: Storage, samples: Iterable[Sample], url: str, samples_per_shard: int = 1000,
    progress: Progress | None = None, *, overwrite: bool = False,
) -> Manifest:  # fmt: skip
    """Write samples to tars at any URL, then index them (`manifest.json` last). Existing shards are replaced once all
    tars are written, which takes their size in temporary files. Raises DataError and changes nothing when shards may
    not be overwritten, there is no sample, or a reader fails.
    """

    def existing() -> list[str]:
        """Return the files to replace, the manifest first: it must never list tars that were removed."""
        names = storage.list(url)
        old = [name for name in names if name == MANIFEST or name.endswith(".tar")]
        if old and not overwrite:
            state = "shards" if MANIFEST in old else "tars without a manifest (another import, not finished?)"
            raise DataError(f"{url} already has {state}. Choose another folder, or pass --overwrite to replace them")
        sidecars = [name for name in names if name.endswith(".tar" + SIDECAR)]
        return sorted((*old, *sidecars), key=lambda name: name != MANIFEST)

    existing()
    stream: Iterator[Sample] = iter(samples)
    if (first := next(stream, None)) is None:
        raise DataError(f"nothing to write to {url}: no usable sample was found")
    stream = itertools.chain([first], stream)
    with tempfile.TemporaryDirectory(prefix="mome-shards-") as folder:
        batches = enumerate(iter(lambda: list(itertools.islice(stream, samples_per_shard)), []))
        tars: Iterator[Path] = (write_tar(Path(folder, f"{n:06d}.tar"), batch) for n, batch in batches)
        replaced = existing()
        if any(not name.endswith(SIDECAR) for name in replaced):
            tars = iter(list(tars))
            replaced = existing()  # again: another import may have ended since
        for name in replaced:
            storage.delete(join(url, name))
        written: list[str] = []
        try:
            for tar in tars:
                written.append(join(url, tar.name))
                storage.upload(tar, written[-1])
                tar.unlink()
                if progress:
                    progress(len(written), 0, tar.name)
        except Exception:
            for location in written:  # a reader that fails half-way must leave no tars
                storage.delete(location)
            raise
    return index_shards(storage, url, progress)


def write_tar(path: Path, samples: Iterable[Sample]) -> Path:
    """Write the samples to one tar of a temporary folder, and return it; the same samples give the same bytes."""
    try:
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
    except MomeError:  # of the samples' reader
        raise
    except OSError as error:
        reason = f"cannot write temporary files ({error.strerror or error})"
        raise DataError(f"{path.parent}: {reason}. Free space there, or set TMPDIR to another folder") from error
    return path
