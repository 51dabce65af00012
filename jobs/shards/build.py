"""`mome shards build`: make shards for training from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import cast

from jobs.console import echo
from jobs.shards.report import ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.building.importers import check_writable, find_kind, read_source, write_shards
from pipeline.data.building.inputs import ImportOptions, Kind, Problems, Sample, suffix_of
from pipeline.data.contents.images import EXTENSIONS, format_of, measure
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import Storage, join

# Options of some formats only; with another format they are an error.
APPLIES_TO = {
    "image_column": ("table", "parquet"),
    "caption_column": ("table", "parquet"),
    "annotations": ("vqa",),
    "listed_only": ("vqa", "vg_qa"),
    "min_count": ("vqa", "vg_qa"),
    "split": ("karpathy",),
}


def build_shards(
    source: Path, out: str, kind: str, options: ImportOptions, problems: Problems, *, samples_per_shard: int,
    limit: int | None, overwrite: bool, max_missing: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the shards and print the result; the arguments are the options of `mome shards build`."""
    storage = Storage()
    threshold = 1.0
    if max_missing is not None:
        try:
            threshold = float(max_missing.removesuffix("%")) / (100 if max_missing.endswith("%") else 1)
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise ConfigError(f"--max-missing {max_missing}: expected a fraction of the entries, such as 1% or 0.01")
    format_name = find_kind(source) if kind == "auto" else cast(Kind, kind)
    for name, kinds in APPLIES_TO.items():
        if getattr(options, name) and format_name not in kinds:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for --kind {' or '.join(kinds)}; {source} is read as {format_name}")
    check_writable(storage, out, overwrite)
    if options.images is not None and not options.images.is_dir():
        raise ConfigError(
            f"--images {options.images}: no such folder; expected the folder that image paths are relative to"
        )
    imported = read_source(source, format_name, problems, options)
    num_samples = 0
    counts = {"images": 0, "captions": 0, "without_caption": 0, "animated": 0}

    def count_samples() -> Iterator[Sample]:
        """Yield and count the samples, then raise DataError if too many entries could not be used."""
        nonlocal num_samples
        for sample in islice(imported.samples, limit):
            images = [data for name, data in sample.items() if name.rpartition(".")[2] in EXTENSIONS]
            captions = len(json.loads(sample.get("json", b"{}")).get("captions", ()))
            num_samples += 1
            counts["images"] += len(images)
            counts["captions"] += captions
            counts["without_caption"] += bool(images) and not captions
            for image in images:
                with suppress(BadSample):  # training counts damaged images
                    counts["animated"] += format_of(image) not in ("JPEG", "BMP") and measure(image).is_animated
            yield sample
        entries = num_samples + problems.faults
        if problems.faults > threshold * entries:
            raise DataError(
                f"{problems.faults} of {entries} entries could not be used ({problems.faults / entries:.1%}), more "
                f"than --max-missing {threshold:.1%}; nothing is written"
            )

    try:
        with ShardProgress("indexing") as progress:
            samples = progress.count(count_samples())
            manifest = write_shards(storage, samples, out, samples_per_shard, progress.shard)
        for name, listed in imported.choices.items():
            storage.write(join(out, name), listed.to_bytes())
    finally:
        _report_problems(source, format_name, problems, num_samples, counts)
    facts = {"kind": format_name, "left_out": problems.count, "skipped": dict(problems.skipped)} | counts
    lengths = {name: len(listed) for name, listed in imported.choices.items()}
    report_manifest(manifest, out, as_json, facts | lengths)
    if not as_json:
        for name, length in lengths.items():
            echo(f"{join(out, name)}: {length} entries, the number to set in the stage's config")


def _report_problems(source: Path, kind: Kind, problems: Problems, num_samples: int, counts: Mapping[str, int]) -> None:
    """Print what was not imported, and which option to try."""
    for problem in problems.first:
        echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        echo(f"left out: {problems.count - len(problems.first)} more", err=True)
    if problems.skipped:
        files = ", ".join(f"{count} {suffix}" for suffix, count in problems.skipped.most_common(10))
        echo(f"files of other kinds, not read: {files}", err=True)
    hints = []
    if problems.absent and not counts["images"]:
        hints.append("none of the listed images exists; give the folder that their paths are relative to with --images")
    elif problems.faults > num_samples:
        hints.append(f"more entries could not be used ({problems.faults}) than were imported ({num_samples})")
    if kind == "folder" and counts["images"] and not counts["captions"]:
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        has_images = any(suffix_of(entry.name) in EXTENSIONS for entry in entries)
        if sum(entry.is_dir() for entry in entries) > 1 and not has_images:
            hints.append("no captions, but one folder per class? Import it with --kind classes to train a classifier")
    for hint in hints:
        echo(f"hint: {hint}", err=True)
