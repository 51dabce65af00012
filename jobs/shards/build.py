"""`mome shards build` and `mome shards index`: make shards for training from files or from existing tars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from jobs.console import echo
from jobs.shards.report import ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.building import annotation_files, importers
from pipeline.data.building.files import Problems, Sample, suffix_of
from pipeline.data.building.tables import Columns
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import EXTENSIONS, format_of, measure
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join

# Options of some formats only; with another format they are an error.
APPLIES_TO = {
    "--image-column": ("table", "parquet"),
    "--caption-column": ("table", "parquet"),
    "--annotations": ("vqa",),
    "--listed-only": ("vqa", "vg_qa"),
    "--min-count": ("vqa", "vg_qa"),
    "--split": ("karpathy",),
}


def build_shards(
    source: Path,
    out: str,
    kind: str,
    *,
    images: Path | None,
    allow_outside: bool,
    image_column: str | None,
    caption_column: str | None,
    samples_per_shard: int,
    words: int,
    answers: list[Path] | None,
    split: str | None,
    listed_only: bool,
    min_count: int | None,
    limit: int | None,
    overwrite: bool,
    strict: bool,
    max_missing: str | None,
    as_json: bool,
) -> None:
    """Write the shards and print the result; the arguments are the options of `mome shards build`."""
    storage = Storage()
    threshold = _parse_fraction(max_missing)
    format_name = kind
    if format_name == "auto":
        format_name = annotation_files.find_annotations(source) or importers.find_kind(source)
    values = (image_column, caption_column, answers, listed_only, min_count, split)
    for (option, kinds), value in zip(APPLIES_TO.items(), values, strict=True):
        if value and format_name not in kinds:
            raise ConfigError(f"{option} is for --kind {' or '.join(kinds)}; {source} is read as {format_name}")
    importers.check_writable(storage, out, overwrite)
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder; expected the folder that image paths are relative to")
    problems = Problems(strict=strict, allow_outside=allow_outside)
    choices: Mapping[str, Choices] = {}
    if format_name in annotation_files.KINDS:
        options = annotation_files.Options(images, tuple(answers or ()), split, listed_only, min_count)
        annotations = annotation_files.read_annotations(source, format_name, problems, options)  # type: ignore[arg-type]
        samples, choices = annotations.samples, annotations.choices
    else:
        columns = Columns(image_column, caption_column)
        samples = importers.read_samples(source, format_name, problems, images, words, columns)  # type: ignore[arg-type]
    counts = ImportCounts()
    samples = _check_missing(counts.count(islice(samples, limit)), problems, counts, threshold)
    try:
        with ShardProgress("indexing") as progress:
            counted = progress.count(samples)
            manifest = importers.write_shards(storage, counted, out, samples_per_shard, progress.shard)
        for name, listed in choices.items():
            storage.write(join(out, name), listed.to_bytes())
    finally:
        _report_problems(problems)
        for hint in _hints(source, format_name, problems, counts):
            echo(f"hint: {hint}", err=True)
    facts = {"kind": format_name, "left_out": problems.count, "skipped": dict(problems.skipped)}
    facts |= {name: count for name, count in asdict(counts).items() if name != "samples"}
    facts |= {name: len(listed) for name, listed in choices.items()}
    report_manifest(manifest, out, as_json, facts)
    if not as_json:
        for name, listed in choices.items():
            echo(f"{join(out, name)}: {len(listed)} entries, the number to set in the stage's config")


def index_folder(url: str, trust_counts: bool, as_json: bool) -> None:
    """Index the tars at `url` and print the manifest's facts."""
    with ShardProgress("indexing") as progress:
        manifest = index_shards(Storage(), url, progress.shard, trust_counts=trust_counts)
    report_manifest(manifest, url, as_json, {"trusted": sum(shard.is_trusted for shard in manifest.shards)})


@dataclass
class ImportCounts:
    """Counts of the imported samples and their contents."""

    samples: int = 0
    images: int = 0
    captions: int = 0
    without_caption: int = 0
    animated: int = 0

    def count(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.samples += 1
            images = [data for name, data in sample.items() if name.rpartition(".")[2] in EXTENSIONS]
            self.images += len(images)
            self.animated += sum(_is_animated(data) for data in images)
            captions = len(json.loads(sample.get("json", b"{}")).get("captions", ()))
            self.captions += captions
            self.without_caption += bool(images) and not captions
            yield sample


def _is_animated(image: bytes) -> bool:
    if format_of(image) in ("JPEG", "BMP"):  # never; the others are opened
        return False
    try:
        return measure(image).is_animated
    except BadSample:  # training counts damaged images
        return False


def _parse_fraction(text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"--max-missing {text}: expected a fraction of the entries, such as 1% or 0.01")
    return value


def _check_missing(
    samples: Iterator[Sample], problems: Problems, counts: ImportCounts, threshold: float
) -> Iterator[Sample]:
    """Yield the samples, then raise DataError if too many entries could not be used."""
    yield from samples
    entries = counts.samples + problems.faults
    if problems.faults > threshold * entries:
        raise DataError(
            f"{problems.faults} of {entries} entries could not be used ({problems.faults / entries:.1%}), more than "
            f"--max-missing {threshold:.1%}; nothing is written"
        )


def _hints(source: Path, kind: str, problems: Problems, counts: ImportCounts) -> Iterator[str]:
    if problems.absent and not counts.images:
        yield "none of the listed images exists; give the folder that their paths are relative to with --images"
    elif problems.faults > counts.samples:
        yield f"more entries could not be used ({problems.faults}) than were imported ({counts.samples})"
    if kind == "folder" and counts.images and not counts.captions:
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        has_images = any(suffix_of(entry.name) in EXTENSIONS for entry in entries)
        if sum(entry.is_dir() for entry in entries) > 1 and not has_images:
            yield "there are no captions, but one folder per class? Import it with --kind classes to train a classifier"


def _report_problems(problems: Problems) -> None:
    for problem in problems.first:
        echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        echo(f"left out: {problems.count - len(problems.first)} more", err=True)
    if problems.skipped:
        files = ", ".join(f"{count} {suffix}" for suffix, count in problems.skipped.most_common(10))
        echo(f"files of other kinds, not read: {files}", err=True)
