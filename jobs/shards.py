"""`mome shards`: import what you have into tar shards, index tars that others made, look at samples."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.config.errors import ConfigError
from pipeline.data import importers
from pipeline.data.images import EXTENSIONS, decode
from pipeline.data.manifest import Manifest, ShardRecord, index_shards, load_index, load_manifest
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import Storage, join, split

app = typer.Typer(no_args_is_help=True, help="Build, index and look at shards: tars of images, captions and texts.")

MAX_PIXELS = 50_000_000
TILE, CAPTION_LINES, LINE_CHARACTERS, LINE_HEIGHT = 224, 6, 38, 15  # of the contact sheet, in pixels and characters


class KindOption(StrEnum):
    auto = "auto"
    folder = "folder"
    jsonl = "jsonl"
    coco = "coco"
    text = "text"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


@app.command()
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
        with _progress() as progress:
            counted = progress.count(samples)
            manifest = importers.write_shards(storage, counted, out, samples_per_shard, progress.shard)
    finally:
        _report_problems(problems)
    _report_manifest(manifest, out, as_json, {"kind": chosen, "left_out": problems.count})


@app.command()
def index(
    url: Annotated[str, typer.Argument(help="A folder of tars, or a brace pattern: s3://b/train-{0000..0095}.tar")],
    as_json: JsonOption = False,
) -> None:
    """Index tars written by anyone (webdataset, img2dataset, …) as they lie; run again to continue."""
    with _progress() as progress:
        manifest = index_shards(Storage(), url, progress.shard)
    _report_manifest(manifest, url, as_json, {})


@app.command()
def show(
    url: Annotated[str, typer.Argument(help="A folder of indexed shards, a brace pattern, or one tar of them.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples, spread over the shards.")] = 8,
    sheet: Annotated[Path | None, typer.Option(help="Save a contact sheet of them here (PNG).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print keys, members, sizes and captions of some samples, and save their pictures as one contact sheet."""
    storage = Storage()
    manifest = load_manifest(storage, url)
    shown = list(_spread_samples(storage, url, manifest, samples))
    for sample in shown if not as_json else []:
        _print_sample(sample)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(shown).save(sheet, format="PNG")
    if as_json:
        described = [sample.described() for sample in shown]
        _print_json({"samples": described, "sheet": str(sheet) if sheet else None, **_facts(manifest, url)})
    else:
        typer.echo(f"{manifest.num_samples} samples in {len(manifest.shards)} shards at {url}")
        if sheet is not None:
            typer.echo(f"contact sheet: {sheet}")


@dataclass(frozen=True)
class Shown:
    """One sample as it lies in its shard."""

    shard: str
    key: str
    members: Mapping[str, bytes]

    @property
    def captions(self) -> list[str]:
        """What the members say of the sample: `captions` or `caption` in the json, else the text."""
        described = _parsed(self.members.get("json"))
        found = described.get("captions") or described.get("caption")
        if isinstance(found, str):
            return [found]
        if isinstance(found, list):
            return [str(caption) for caption in found]
        text = self.members.get("txt")
        return [text.decode("utf-8", errors="replace")] if text is not None else []

    def picture(self) -> Image.Image | str | None:
        """The picture, the reason why it cannot be shown, or None where the sample has none."""
        encoded = next((data for name, data in self.members.items() if name.split(".")[-1] in EXTENSIONS), None)
        if encoded is None:
            return None
        try:
            return Image.fromarray(decode(encoded, MAX_PIXELS))
        except BadSample as error:
            return error.reason

    def described(self) -> dict[str, object]:
        picture = self.picture()
        return {
            "shard": self.shard,
            "key": self.key,
            "members": {name: len(data) for name, data in self.members.items()},
            "image_size": list(picture.size) if isinstance(picture, Image.Image) else None,
            "fault": picture if isinstance(picture, str) else None,
            "captions": self.captions,
        }


def contact_sheet(shown: list[Shown], columns: int = 4) -> Image.Image:
    """The samples' pictures in rows, captions under them."""
    columns = min(columns, len(shown))
    height = TILE + CAPTION_LINES * LINE_HEIGHT + 16
    rows = -(-len(shown) // columns)
    page = Image.new("RGB", (columns * (TILE + 16) + 16, rows * height + 16), "white")
    font = ImageFont.load_default(size=11)
    for number, sample in enumerate(shown):
        row, column = divmod(number, columns)
        _paste_sample(page, (16 + column * (TILE + 16), 16 + row * height), sample, font)
    return page


def _paste_sample(
    page: Image.Image, corner: tuple[int, int], sample: Shown, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    x, y = corner
    draw = ImageDraw.Draw(page)
    picture = sample.picture()
    if isinstance(picture, Image.Image):
        scale = TILE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
        page.paste(picture, (x + (TILE - picture.width) // 2, y + (TILE - picture.height) // 2))
    elif isinstance(picture, str):
        draw.multiline_text((x + 8, y + 8), "\n".join(textwrap.wrap(picture, LINE_CHARACTERS)), "firebrick", font)
    lines = [line for caption in sample.captions for line in textwrap.wrap(f"- {caption}", LINE_CHARACTERS)]
    room = CAPTION_LINES if picture is not None else CAPTION_LINES + TILE // LINE_HEIGHT
    top = y + TILE + 4 if picture is not None else y
    for number, line in enumerate([sample.key, *lines][:room]):
        draw.text((x, top + number * LINE_HEIGHT), line, "gray" if number == 0 else "black", font)


def _spread_samples(storage: Storage, url: str, manifest: Manifest, count: int) -> Iterator[Shown]:
    """`count` samples at equal distances over all shards, each read by its own range."""
    count = min(count, manifest.num_samples)
    wanted = [i * manifest.num_samples // count for i in range(count)]
    folder = split(url)[0] if url.endswith(".tar") else url
    before = 0
    for shard in manifest.shards:
        places = [place - before for place in wanted if before <= place < before + shard.samples]
        before += shard.samples
        if places:
            yield from _read_shard(storage, url, folder, shard, places)


def _read_shard(storage: Storage, url: str, folder: str, shard: ShardRecord, places: list[int]) -> Iterator[Shown]:
    found = load_index(storage, url, shard)
    for place in places:
        start, stop = found.span(place)
        data = storage.read_range(join(folder, shard.name), start, stop)
        members = {name: data[at - start : at - start + size] for name, at, size in found.members(place)}
        yield Shown(shard.name, found.keys[place], members)


def _print_sample(sample: Shown) -> None:
    described = sample.described()
    members = ", ".join(f"{name} {len(data)} B" for name, data in sample.members.items())
    size = described["image_size"]
    shape = f"  {size[0]} x {size[1]}" if isinstance(size, list) else ""
    typer.echo(f"{sample.shard}  {sample.key}  ({members}){shape}")
    if described["fault"]:
        typer.echo(f"    {described['fault']}")
    for caption in sample.captions:
        typer.echo(f"    - {textwrap.shorten(caption, 200)}")


def _parsed(data: bytes | None) -> dict[str, object]:
    try:
        found = json.loads(data) if data is not None else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _limited(samples: Iterator[importers.Sample], limit: int | None) -> Iterator[importers.Sample]:
    for number, sample in enumerate(samples, 1):
        yield sample
        if number == limit:
            return


class _progress:
    """A line on standard error: samples read, then shards indexed. Silent where nobody looks on."""

    def __enter__(self) -> _progress:
        said = TextColumn("{task.description}")
        columns = (SpinnerColumn(), said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def count(self, samples: Iterator[importers.Sample]) -> Iterator[importers.Sample]:
        for number, sample in enumerate(samples, 1):
            self._bar.update(self._task, description="reading samples", completed=number)
            yield sample

    def shard(self, done: int, total: int, name: str) -> None:
        """`total` is 0 while shards are written, whose number nobody knows yet."""
        if total:
            self._bar.update(self._task, description=f"indexing {name}", completed=done, total=total)


def _report_problems(problems: importers.Problems) -> None:
    for problem in problems.first:
        typer.echo(f"left out: {problem}", err=True)
    if problems.count > len(problems.first):
        typer.echo(f"left out: {problems.count - len(problems.first)} more", err=True)


def _facts(manifest: Manifest, url: str) -> dict[str, object]:
    return {
        "url": url,
        "shards": len(manifest.shards),
        "num_samples": manifest.num_samples,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "manifest": manifest.digest,
    }


def _report_manifest(manifest: Manifest, url: str, as_json: bool, more: dict[str, object]) -> None:
    facts = _facts(manifest, url) | more
    if as_json:
        _print_json(facts)
        return
    left_out = f", {facts['left_out']} left out" if facts.get("left_out") else ""
    typer.echo(f"{manifest.num_samples} samples in {len(manifest.shards)} shards at {url}{left_out}")
    typer.echo(f"look at them: mome shards show {url} --sheet sheet.png")


def _print_json(facts: dict[str, object]) -> None:
    typer.echo(json.dumps(facts, ensure_ascii=False))
