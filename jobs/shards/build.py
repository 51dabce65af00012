"""`mome shards build` and `mome shards index`: from files, or tars as they lie, to shards that training can read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_args

import typer

from jobs.arguments import local_file
from jobs.console import echo
from jobs.shards.report import JsonOption, ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.building import annotation_files, importers
from pipeline.data.building.files import Problems, Sample, suffix_of
from pipeline.data.building.tables import Columns
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import EXTENSIONS, format_of, measure
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join

AUTO = "auto"
KindOption = StrEnum("KindOption", [AUTO, *get_args(importers.Kind), *annotation_files.KINDS])  # type: ignore[misc]


# Options that only some formats have; given for another they would be ignored.
APPLIES_TO = {
    "--image-column": ("table", "parquet"),
    "--caption-column": ("table", "parquet"),
    "--annotations": ("vqa",),
    "--listed-only": ("vqa", "vg_qa"),
    "--min-count": ("vqa", "vg_qa"),
    "--split": ("karpathy",),
}


def build(
    source: Annotated[
        Path,
        typer.Argument(
            parser=local_file,
            help="Folder of images, list of images with captions, table, Parquet, annotation file or text.",
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder or URL (s3://bucket/path) that the shards are written to.")],
    kind: Annotated[KindOption, typer.Option(help="Format of SOURCE; auto looks at it.")] = KindOption(AUTO),
    images: Annotated[
        Path | None,
        typer.Option(parser=local_file, help="Folder that image paths are relative to. \\[default: SOURCE's folder]"),
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Read images that a list names outside of that folder.")
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="table, parquet: name or number of the column with image paths (or bytes).")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="table, parquet: name or number of the column with captions.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 1000,
    words: Annotated[int, typer.Option(min=1, help="text: maximum words per sample.")] = importers.WORDS_PER_TEXT,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            "--annotations",
            parser=local_file,
            help="vqa: annotations file; repeat for each file whose answers are listed.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="karpathy: import the images of this split only.")] = None,
    listed_only: Annotated[
        bool, typer.Option("--listed-only", help="vqa, vg_qa: leave out questions without a listed answer.")
    ] = False,
    min_count: Annotated[
        int | None,
        typer.Option(min=1, help="vqa, vg_qa: times an answer must be given to be listed. \\[default: 9]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Import this many samples only.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the shards at OUT, once the new ones are whole.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first missing image or bad line.")] = False,
    max_missing: Annotated[
        str | None,
        typer.Option(
            help="Fail, and write nothing, if more of the entries cannot be used: 1% or 0.01. \\[default: 100%]"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Import images and captions, or text, into tars with a manifest. Nothing is left half-written.

    folder: the caption of x.jpg is in x.txt, x.caption or x.jpg.txt beside it.
    jsonl: lines of {"image": path, "captions": \\[text, …]}.
    list: a JSON list of the same objects (BLIP, ALBEF).
    table: CSV, TSV or lines with '|', with a header or Flickr's names
    (captions.txt, results.csv, *.token).
    parquet: a file or a folder of files, with paths or the images themselves.
    coco: COCO's captions.

    VQA v2's questions, Visual Genome's question_answers.json, NLVR2's lines and
    Karpathy's splits are recognized by their content. A folder with one folder
    of images per class needs --kind classes. The answers and classes that a
    head predicts are written beside the shards: answers.json, classes.json.
    """
    storage = Storage()
    threshold = _fraction(max_missing)
    chosen = str(kind)
    if chosen == AUTO:
        chosen = annotation_files.find_annotations(source) or importers.find_kind(source)
    given = (image_column, caption_column, answers, listed_only, min_count, split)
    for (option, kinds), value in zip(APPLIES_TO.items(), given, strict=True):
        if value and chosen not in kinds:
            raise ConfigError(f"{option} is for --kind {' or '.join(kinds)}; {source} is read as {chosen}")
    importers.check_writable(storage, out, overwrite)
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder; expected the folder that image paths are relative to")
    problems = Problems(strict=strict, allow_outside=allow_outside)
    choices: Mapping[str, Choices] = {}
    if chosen in annotation_files.KINDS:
        options = annotation_files.Options(images, tuple(answers or ()), split, listed_only, min_count)
        found = annotation_files.read_annotations(source, chosen, problems, options)  # type: ignore[arg-type]
        samples, choices = found.samples, found.choices
    else:
        columns = Columns(image_column, caption_column)
        samples = importers.read_samples(source, chosen, problems, images, words, columns)  # type: ignore[arg-type]
    tally = Tally()
    samples = _enough(tally.count(_limited(samples, limit)), problems, tally, threshold)
    try:
        with ShardProgress("indexing") as progress:
            counted = progress.count(samples)
            manifest = importers.write_shards(storage, counted, out, samples_per_shard, progress.shard)
        for name, listed in choices.items():
            storage.write(join(out, name), listed.to_bytes())
    finally:
        _report_problems(problems)
        for hint in _hints(source, chosen, problems, tally):
            echo(f"hint: {hint}", err=True)
    facts = {"kind": chosen, "left_out": problems.count, "skipped": dict(problems.skipped)}
    facts |= tally.facts() | {name: len(listed) for name, listed in choices.items()}
    report_manifest(manifest, out, as_json, facts)
    if not as_json:
        for name, listed in choices.items():
            echo(f"{join(out, name)}: {len(listed)} of them, the number that the stage's config names")


def index(
    url: Annotated[str, typer.Argument(help="A folder of tars, or a brace pattern: s3://b/train-{0000..0095}.tar")],
    trust_counts: Annotated[
        bool, typer.Option("--trust-counts", help="Read no tar that another tool has counted already (see above).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Index tars written by anyone (webdataset, img2dataset, …) as they lie; run again to continue.

    Every tar is read once, in parallel, and proved whole. With --trust-counts a tar is not read where Megatron-Energon
    (.tar.idx), DALI (.idx) or img2dataset (_stats.json) left its number of samples beside it: it is then indexed when
    training first needs it, a wrong count stops the run, and the data's digest names the tar by its ETag and size.
    """
    with ShardProgress("indexing") as progress:
        manifest = index_shards(Storage(), url, progress.shard, trust_counts=trust_counts)
    report_manifest(manifest, url, as_json, {"trusted": sum(shard.is_trusted for shard in manifest.shards)})


def _limited(samples: Iterator[Sample], limit: int | None) -> Iterator[Sample]:
    for number, sample in enumerate(samples, 1):
        yield sample
        if number == limit:
            return


@dataclass
class Tally:
    """Counts of what was imported."""

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

    def facts(self) -> dict[str, int]:
        facts = asdict(self)
        del facts["samples"]
        return facts


def _is_animated(image: bytes) -> bool:
    if format_of(image) in ("JPEG", "BMP"):  # cannot be; the others are opened
        return False
    try:
        return measure(image).is_animated
    except BadSample:  # training counts what is damaged
        return False


def _fraction(text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"--max-missing {text}: expected a share of the entries, such as 1% or 0.01")
    return value


def _enough(samples: Iterator[Sample], problems: Problems, tally: Tally, threshold: float) -> Iterator[Sample]:
    """Yield the samples. At their end raise DataError if too many entries could not be used."""
    yield from samples
    entries = tally.samples + problems.faults
    if problems.faults > threshold * entries:
        raise DataError(
            f"{problems.faults} of {entries} entries could not be used ({problems.faults / entries:.1%}), more than "
            f"--max-missing {threshold:.1%}; nothing is written"
        )


def _hints(source: Path, kind: str, problems: Problems, tally: Tally) -> Iterator[str]:
    if problems.absent and not tally.images:
        yield "not one of the listed images exists; give the folder that their paths are relative to with --images"
    elif problems.faults > tally.samples:
        yield f"more entries could not be used ({problems.faults}) than were imported ({tally.samples})"
    if kind == "folder" and tally.images and not tally.captions and _is_folder_of_classes(source):
        yield "there are no captions, but one folder per class? Import it with --kind classes to train a classifier"


def _is_folder_of_classes(folder: Path) -> bool:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return sum(entry.is_dir() for entry in entries) > 1 and not any(suffix_of(e.name) in EXTENSIONS for e in entries)


def _report_problems(problems: Problems) -> None:
    for problem in problems.first:
        echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        echo(f"left out: {problems.count - len(problems.first)} more", err=True)
    if problems.skipped:
        files = ", ".join(f"{count} {suffix}" for suffix, count in problems.skipped.most_common(10))
        echo(f"files of other kinds, not read: {files}", err=True)
