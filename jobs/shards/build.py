"""`mome shards build` and `mome shards index`: from files, or tars as they lie, to shards that training can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import echo
from jobs.shards.report import JsonOption, ShardProgress, report_manifest
from pipeline.config.errors import ConfigError
from pipeline.data.building import annotation_files, importers
from pipeline.data.contents.choices import Choices
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join


class KindOption(StrEnum):
    auto = "auto"
    folder = "folder"
    jsonl = "jsonl"
    coco = "coco"
    text = "text"
    vqa = "vqa"
    vg_qa = "vg_qa"
    nlvr2 = "nlvr2"
    karpathy = "karpathy"
    classes = "classes"


def build(
    source: Annotated[
        Path, typer.Argument(help="A folder of images, a .jsonl, a COCO captions .json, text, or an annotation file.")
    ],
    out: Annotated[str, typer.Argument(help="Folder or URL (s3://bucket/path) that the shards are written to.")],
    kind: Annotated[KindOption, typer.Option(help="What SOURCE is; auto looks at it.")] = KindOption.auto,
    images: Annotated[Path | None, typer.Option(help="Folder the image paths of a jsonl or COCO file are in.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 1000,
    words: Annotated[int, typer.Option(min=1, help="Most words of one text sample.")] = importers.WORDS_PER_TEXT,
    answers: Annotated[
        list[Path] | None,
        typer.Option("--annotations", help="vqa: a file of answers; once for each file whose answers are listed."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="karpathy: the pictures of this split only.")] = None,
    listed_only: Annotated[
        bool, typer.Option("--listed-only", help="vqa: leave out questions that no listed answer is right for.")
    ] = False,
    min_count: Annotated[
        int | None,
        typer.Option(min=1, help="vqa: questions that an answer must be chosen for to be listed. [default: 9]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Import this many samples only.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards at OUT.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first missing image or bad line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Import images and captions, or text, into tars with a manifest. Nothing is left half-written.

    jsonl: one {"image": path, "captions": [text, …]} a line. Folder: a .txt beside an image is its caption.
    Annotation files: VQA v2's questions, Visual Genome's question_answers.json, NLVR2's lines and Karpathy's splits are
    told by their content; a folder of one folder of pictures a class needs --kind classes. What a head chooses among,
    answers.json or classes.json, is written beside the shards.
    """
    storage = Storage()
    chosen = kind.value
    if kind is KindOption.auto:
        chosen = annotation_files.find_annotations(source) or importers.find_kind(source)
    importers.check_writable(storage, out, overwrite)
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder; expected the folder that image paths are relative to")
    problems = importers.Problems(strict=strict)
    choices: Mapping[str, Choices] = {}
    if chosen in annotation_files.KINDS:
        options = annotation_files.Options(images, tuple(answers or ()), split, listed_only, min_count)
        found = annotation_files.read_annotations(source, chosen, problems, options)  # type: ignore[arg-type]
        samples, choices = found.samples, found.choices
    else:
        samples = importers.read_samples(source, chosen, problems, images, words)  # type: ignore[arg-type]
    samples = _limited(samples, limit)
    try:
        with ShardProgress("indexing") as progress:
            counted = progress.count(samples)
            manifest = importers.write_shards(storage, counted, out, samples_per_shard, progress.shard)
        for name, listed in choices.items():
            storage.write(join(out, name), listed.to_bytes())
    finally:
        _report_problems(problems)
    facts = {"kind": chosen, "left_out": problems.count} | {name: len(listed) for name, listed in choices.items()}
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


def _limited(samples: Iterator[importers.Sample], limit: int | None) -> Iterator[importers.Sample]:
    for number, sample in enumerate(samples, 1):
        yield sample
        if number == limit:
            return


def _report_problems(problems: importers.Problems) -> None:
    for problem in problems.first:
        echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        echo(f"left out: {problems.count - len(problems.first)} more", err=True)
