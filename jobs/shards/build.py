"""`mome shards build` and `mome shards index`: from files, or tars as they lie, to shards that training can read."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.shards.report import JsonOption, ShardProgress, report_manifest
from pipeline.config.errors import ConfigError
from pipeline.data import importers
from pipeline.data.manifest import index_shards
from pipeline.data.storage import Storage


class KindOption(StrEnum):
    auto = "auto"
    folder = "folder"
    jsonl = "jsonl"
    coco = "coco"
    text = "text"


def build(
    source: Annotated[Path, typer.Argument(help="A folder of images, a .jsonl, a COCO captions .json, or text.")],
    out: Annotated[str, typer.Argument(help="Folder or URL (s3://bucket/path) that the shards are written to.")],
    kind: Annotated[KindOption, typer.Option(help="What SOURCE is; auto looks at it.")] = KindOption.auto,
    images: Annotated[Path | None, typer.Option(help="Folder the image paths of a jsonl or COCO file are in.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 1000,
    words: Annotated[int, typer.Option(min=1, help="Most words of one text sample.")] = importers.WORDS_PER_TEXT,
    limit: Annotated[int | None, typer.Option(min=1, help="Import this many samples only.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards at OUT.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first missing image or bad line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Import images and captions, or text, into tars with a manifest. Nothing is left half-written.

    jsonl: one {"image": path, "captions": [text, …]} a line. Folder: a .txt beside an image is its caption.
    """
    storage = Storage()
    chosen: importers.Kind = importers.find_kind(source) if kind is KindOption.auto else kind.value  # type: ignore[assignment]
    importers.check_writable(storage, out, overwrite)
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder; expected the folder that image paths are relative to")
    problems = importers.Problems(strict=strict)
    samples = _limited(importers.read_samples(source, chosen, problems, images, words), limit)
    try:
        with ShardProgress("indexing") as progress:
            counted = progress.count(samples)
            manifest = importers.write_shards(storage, counted, out, samples_per_shard, progress.shard)
    finally:
        _report_problems(problems)
    report_manifest(manifest, out, as_json, {"kind": chosen, "left_out": problems.count})


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


def _limited(samples: Iterator[importers.Sample], limit: int | None) -> Iterator[importers.Sample]:
    for number, sample in enumerate(samples, 1):
        yield sample
        if number == limit:
            return


def _report_problems(problems: importers.Problems) -> None:
    for problem in problems.first:
        typer.echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        typer.echo(f"left out: {problems.count - len(problems.first)} more", err=True)
