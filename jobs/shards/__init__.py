"""`mome shards`: build, index, check and show tar shards, and add a detector's regions to them."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jobs.console import FileOption, JsonOption

# "auto", then the formats of pipeline.data.building
SourceFormat = StrEnum(
    "SourceFormat", "auto folder jsonl coco list table parquet text vqa vg_qa vg_regions nlvr2 karpathy classes"
)
SourceType = StrEnum("SourceType", "pairs images text labelled regions questions statements")
Report = Annotated[Path | None, FileOption(help="Write all bad samples to this file, one JSON per line.")]
MaxPixels = Annotated[int, Option(min=1, help="Maximum pixels of an image; more are rejected as a decompression bomb.")]
SOURCE_HELP = "Folder, list or table of images with captions, annotation file, text; or a URL of Parquet files."
MAX_PIXELS = 25_000_000  # default of data.max_pixels

app = typer.Typer(no_args_is_help=True, help="Build, index, check and show shards: tars of images, captions and texts.")


@app.command()
def build(
    source: Annotated[str, Argument(help=SOURCE_HELP)],
    out: Annotated[str, Argument(help="Folder or URL (s3://bucket/path) to write the shards to.")],
    kind: Annotated[SourceFormat, Option(help="Format of SOURCE; auto detects it.")] = SourceFormat.auto,
    images: Annotated[
        Path | None, FileOption(help="Folder that image paths are relative to (default: SOURCE's).")
    ] = None,
    allow_outside: Annotated[bool, Option("--allow-outside", help="Also read images outside of that folder.")] = False,
    image_column: Annotated[str | None, Option(help="table, parquet: name or number of the image column.")] = None,
    caption_column: Annotated[str | None, Option(help="table, parquet: caption column, such as sentences.raw.")] = None,
    label_column: Annotated[str | None, Option(help="parquet: column of classes, instead of captions.")] = None,
    keep_columns: Annotated[
        list[str] | None, Option("--keep-column", help="parquet: column to store in the JSON, for filters; repeatable.")
    ] = None,
    samples_per_shard: Annotated[int, Option(min=1, help="Number of samples in each tar.")] = 1000,
    words: Annotated[int, Option(min=1, help="text: maximum number of words per sample.")] = 64,
    annotations: Annotated[
        list[Path] | None, FileOption(help="vqa: annotations file; repeat for each file whose answers are listed.")
    ] = None,
    split: Annotated[str | None, Option(help="karpathy, parquet: import this split only.")] = None,
    listed_only: Annotated[
        bool, Option("--listed-only", help="vqa, vg_qa: omit questions without a listed answer.")
    ] = False,
    min_count: Annotated[
        int | None, Option(min=1, help="vqa, vg_qa: minimum occurrences of a listed answer (default: 9).")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Maximum number of samples to import.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the shards at OUT by complete new ones.")] = False,
    strict: Annotated[bool, Option("--strict", help="Stop at the first missing image or bad line.")] = False,
    max_missing: Annotated[
        str | None, Option(help="Fail, and write nothing, if more entries cannot be used: 1% or 0.01 (default: 100%).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Import images and captions, or text, into tars with a manifest. Nothing is left half-written.

    folder: the caption of x.jpg is in x.txt, x.caption or x.jpg.txt next to it.
    jsonl: lines of {"image": path, "captions": \\[text, …]}.
    list: a JSON list of the same objects (BLIP, ALBEF).
    table: CSV, TSV or lines with '|', with a header or Flickr's names
    (captions.txt, results.csv, *.token).
    parquet: a file or a folder of files, or its URL, with the images
    themselves or their paths (Hugging Face data sets, img2dataset).
    coco: COCO's captions.
    classes: a folder with one folder of images per class (ImageNet).

    VQA v2's questions, Visual Genome's region descriptions and questions,
    NLVR2's lines and Karpathy's splits are recognized by their content. The
    answers and classes that a head predicts are written next to the shards:
    answers.json, classes.json. pipeline/data/DATASETS.md has examples.
    """
    from jobs.shards.commands import build_shards
    from pipeline.data.building.inputs import ImportOptions, Problems

    options = ImportOptions(
        images, allow_outside, image_column, caption_column, label_column, tuple(keep_columns or ()), words,
        tuple(annotations or ()), split, listed_only, min_count,
    )  # fmt: skip
    problems = Problems(strict=strict)
    build_shards(source, out, kind, options, problems, samples_per_shard, limit, overwrite, max_missing, as_json)


@app.command()
def index(
    url: Annotated[str, Argument(help="Folder of tars, or a brace pattern: s3://b/train-{0000..0095}.tar")],
    trust_counts: Annotated[bool, Option("--trust-counts", help="Do not read tars that another tool counted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Index tars written by any tool (webdataset, img2dataset, …) in place; run again to continue.

    Every tar is read once, in parallel, and verified to be complete. With --trust-counts a tar is not read where
    Megatron-Energon (.tar.idx), DALI (.idx) or img2dataset (_stats.json) stored its number of samples next to it: it is
    then indexed when training first needs it, a wrong count stops the run, and the data's digest identifies the tar by
    its ETag and size.
    """
    from jobs.shards.commands import ShardProgress, report_manifest
    from pipeline.data.shards.manifest import index_shards
    from pipeline.data.storage import Storage

    with ShardProgress("indexing") as progress:
        manifest = index_shards(Storage(), url, progress.shard, trust_counts=trust_counts)
    report_manifest(manifest, url, as_json, {"trusted": sum(shard.is_trusted for shard in manifest.shards)})


@app.command()
def check(
    url: Annotated[str, Argument(help="Folder of tars, brace pattern, or one tar.")],
    source_type: Annotated[SourceType, Option("--type", help="Source type of the samples.")] = SourceType.pairs,
    report: Report = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    workers: Annotated[int, Option(min=1, help="Number of processes.")] = os.cpu_count() or 1,
    as_json: JsonOption = False,
) -> None:
    """Read every shard to its end and decode every sample, as training would.

    Training would quarantine and replace a bad sample (corrupt image, missing member, empty caption, duplicate key,
    member that executes code when loaded, …); a broken shard (truncated, empty, replaced, missing, different from its
    index) would stop the run.

    Exit status: 0 without findings, 3 for bad samples only, 1 for broken shards.
    """
    from jobs.shards.commands import check_folder

    if status := check_folder(url, source_type, report, max_pixels, workers, as_json):
        raise typer.Exit(status)


@app.command()
def show(
    url: Annotated[str, Argument(help="Folder of indexed shards, brace pattern, or one tar of them.")],
    samples: Annotated[int, Option(min=1, help="Number of samples to show, spread over the shards.")] = 8,
    sheet: Annotated[Path | None, FileOption(help="PNG file for a contact sheet of samples.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print keys, members, sizes and captions of some samples, and save their images as one contact sheet."""
    from jobs.shards.commands import show_samples

    show_samples(url, samples, sheet, as_json)


@app.command()
def regions(
    url: Annotated[str, Argument(help="Folder of tars with images, or brace pattern.")],
    out: Annotated[str, Argument(help="Folder or URL to write the shards with regions to.")],
    detector: Annotated[
        Path, FileOption(help="Folder of a Hugging Face object-detection model, present on every node.")
    ],
    max_regions: Annotated[int, Option("--regions", min=1, help="Regions per image, the most confident ones.")] = 100,
    workers: Annotated[int, Option(min=1, help="Number of Ray actors; each loads a detector.")] = 1,
    gpus_per_worker: Annotated[float, Option(min=0, help="Number of GPUs of each actor; may be a fraction.")] = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    address: Annotated[str | None, Option(help="Address of a Ray cluster (default: start a local Ray).")] = None,
    report: Report = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the shards at URL to OUT, adding to each sample a member .npz with a detector's regions.

    Keys and other members stay as they are. A sample whose image is bad gets no regions and is reported; training
    quarantines it. Run the command again to continue after an interruption.
    """
    from jobs.shards.detection import detect_regions
    from pipeline.config.schema import ClusterConfig

    cluster = ClusterConfig(workers=workers, gpus_per_worker=gpus_per_worker, address=address)
    detect_regions(url, out, detector, max_regions, max_pixels, cluster, report, as_json)
