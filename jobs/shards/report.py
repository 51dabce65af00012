"""Output of the shards commands: progress, totals of a manifest, bad samples (`check`), some samples (`show`)."""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.console import check_output, echo, list_of_findings, write_output
from pipeline.config.schema import DataConfig, SourceType
from pipeline.data.contents.images import EXTENSIONS, decode
from pipeline.data.contents.members import record_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.check import ShardFinding, check_shards
from pipeline.data.shards.manifest import Manifest, load_index, load_manifest, shard_folder
from pipeline.data.storage import Storage, join
from pipeline.pages.page import signature

T = TypeVar("T")
BROKEN, BAD = 1, 3  # exit statuses of a check
_MAX_PRINTED = 20  # broken shards
TILE, CAPTION_LINES, LINE_CHARACTERS, LINE_HEIGHT = 224, 6, 38, 15  # of the contact sheet, in pixels and characters


class ShardProgress(Progress):
    """Progress bar on standard error: samples read, then shards done. Shown on a terminal only."""

    def __init__(self, action: str) -> None:
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=Console(stderr=True), transient=True)
        self._action, self._bar = action, self.add_task("starting", total=None)

    def count(self, samples: Iterator[T]) -> Iterator[T]:
        """Yield the samples and show their number."""
        for number, sample in enumerate(samples, 1):
            self.update(self._bar, description="reading samples", completed=number)
            yield sample

    def shard(self, done: int, total: int, name: str) -> None:
        """Show a finished shard; `total` is 0 while it is unknown."""
        if total:
            self.update(self._bar, description=f"{self._action} {name}", completed=done, total=total)


def manifest_facts(manifest: Manifest, url: str) -> dict[str, Any]:
    """Return a manifest's totals as a JSON object."""
    return {
        "url": url,
        "shards": len(manifest.shards),
        "num_samples": manifest.num_samples,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "manifest": manifest.digest,
    }


def report_manifest(manifest: Manifest, url: str, as_json: bool, more: dict[str, Any]) -> None:
    """Print a manifest's totals and the command's own facts."""
    facts = manifest_facts(manifest, url) | more
    if as_json:
        echo(json.dumps(facts, ensure_ascii=False))
        return

    def counted(count: int, noun: str) -> str:
        return f"{count:,} {noun}" + ("" if count == 1 else "s")

    left_out = f", {facts['left_out']} left out" if facts.get("left_out") else ""
    totals = f"{counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    echo(f"{totals} at {url}{left_out}")
    if "images" in facts:
        parts = [counted(facts[f"{noun}s"], noun) for noun in ("image", "caption") if facts[f"{noun}s"]]
        notes = [
            (facts["without_caption"], "image", "without a caption"),
            (facts["animated"], "animated image", "(first frame)"),
        ]
        suffix = "".join(f"; {counted(count, noun)} {note}" for count, noun, note in notes if count)
        echo(", ".join([*parts, f"{facts['bytes'] / 1e6:,.1f} MB"]) + suffix)
    if trusted := facts.get("trusted"):
        echo(f"{trusted} of the shards were counted by another tool and are read on first use")
    echo(f"inspect them: mome shards show {url} --sheet sheet.png")


def check_folder(url: str, source_type: str, report: Path | None, max_pixels: int, workers: int, as_json: bool) -> int:
    """Check the shards at `url`, print the summary, and return the exit status of `mome shards check`."""
    shards = samples = 0
    broken: list[ShardFinding] = []
    kinds: Counter[str] = Counter()  # of bad samples
    skipped: Counter[str] = Counter()  # entries that belong to no sample, by kind
    examples: dict[str, ShardFinding] = {}
    with (
        ShardProgress("checking") as progress,
        list_of_findings(report, "--report") if report else nullcontext() as lines,
    ):
        for shard in check_shards(Storage(), url, cast(SourceType, source_type), max_pixels, workers, progress.shard):
            shards += 1
            samples += shard.samples
            skipped.update(shard.skipped)
            broken += [shard.broken] if shard.broken else []
            for finding in shard.bad:
                kinds[finding.kind] += 1
                examples.setdefault(finding.kind, finding)
            findings = (*shard.bad, shard.broken) if shard.broken else shard.bad
            if lines is not None:
                lines.writelines(f"{json.dumps(asdict(f), ensure_ascii=False)}\n".encode() for f in findings)
    if as_json:
        summary = {
            "url": url,
            "shards": shards,
            "num_samples": samples,
            "bad_samples": kinds.total(),
            "kinds": dict(kinds.most_common()),
            "broken_shards": {finding.shard: finding.reason for finding in broken},
            "report": str(report) if report else None,
            **({"skipped": dict(skipped.most_common())} if skipped else {}),
        }
        echo(json.dumps(summary, ensure_ascii=False))
    else:
        echo(f"{samples} samples in {shards} shards at {url}")
        echo(f"{len(broken)} broken shards, {kinds.total()} bad samples")
        for finding in broken[:_MAX_PRINTED]:
            echo(f"  {finding.shard}: {finding.reason}")
        if len(broken) > _MAX_PRINTED:
            echo(f"  … and {len(broken) - _MAX_PRINTED} more")
        for reason, count in kinds.most_common():
            echo(f"  {count:>8}  {reason:<50}  {examples[reason].key} in {examples[reason].shard}")
        for entry, count in skipped.most_common():
            echo(f"  {count:>8}  skipped, not part of a sample: {entry}")
        if report:
            echo(f"all findings: {report}")
    return BROKEN if broken else BAD if kinds else 0


@dataclass(frozen=True)
class ShownSample:
    """One sample of a shard."""

    shard: str
    key: str
    members: Mapping[str, bytes]
    captions: list[str]
    image: Image.Image | str | None  # the image, the reason why it cannot be decoded, or None for a sample without one


def show_samples(url: str, samples: int, sheet: Path | None, as_json: bool) -> None:
    """Print `samples` samples of the shards at `url`, and draw their images on the PNG file `sheet`."""
    storage = Storage()
    if sheet is not None:
        check_output(storage, str(sheet), "--sheet")
    manifest = load_manifest(storage, url)
    count = min(samples, manifest.num_samples)
    positions = [i * manifest.num_samples // count for i in range(count)]  # at equal distances over all shards
    shown: list[ShownSample] = []
    first = 0
    for shard in manifest.shards:
        numbers = [position - first for position in positions if first <= position < first + shard.samples]
        first += shard.samples
        if not numbers:
            continue
        index = load_index(storage, url, shard)
        for number in numbers:
            start, stop = index.byte_range(number)
            data = storage.read_range(join(shard_folder(url), shard.name), start, stop)
            members = {name: data[at - start : at - start + size] for name, at, size in index.members(number)}
            encoded = next((content for name, content in members.items() if name.split(".")[-1] in EXTENSIONS), None)
            image: Image.Image | str | None = None
            if encoded is not None:
                try:
                    image = Image.fromarray(decode(encoded, DataConfig().max_pixels))
                except BadSample as error:
                    image = error.reason
            shown.append(ShownSample(shard.name, index.keys[number], members, shown_captions(members), image))
    if sheet is not None:
        buffer, info = io.BytesIO(), PngInfo()
        info.add_text("Software", signature(f"samples of {manifest.digest}"))
        contact_sheet(shown).save(buffer, "PNG", pnginfo=info)
        write_output(storage, str(sheet), buffer.getvalue(), "--sheet")
    if as_json:
        descriptions = [
            {
                "shard": sample.shard,
                "key": sample.key,
                "members": {name: len(data) for name, data in sample.members.items()},
                "image_size": list(sample.image.size) if isinstance(sample.image, Image.Image) else None,
                "fault": sample.image if isinstance(sample.image, str) else None,
                "captions": sample.captions,
            }
            for sample in shown
        ]
        facts = {"samples": descriptions, "sheet": str(sheet) if sheet else None, **manifest_facts(manifest, url)}
        echo(json.dumps(facts, ensure_ascii=False))
        return
    for sample in shown:
        sizes = ", ".join(f"{name} {len(data)} B" for name, data in sample.members.items())
        size = f"  {sample.image.width} x {sample.image.height}" if isinstance(sample.image, Image.Image) else ""
        echo(f"{sample.shard}  {sample.key}  ({sizes}){size}")
        if isinstance(sample.image, str):
            echo(f"    {sample.image}")
        for caption in sample.captions:
            echo(f"    - {textwrap.shorten(caption, 200)}")
    echo(f"{manifest.num_samples} samples in {len(manifest.shards)} shards at {url}")
    if sheet is not None:
        echo(f"contact sheet: {sheet}")


def shown_captions(members: Mapping[str, bytes]) -> list[str]:
    """Return the captions, question or statement of a sample's json, else its text; training may read none of them."""
    try:
        with judging("members"):
            record: Mapping[str, Any] = record_of(members)
    except BadSample:
        record = {}
    if isinstance(sentence := record.get("question") or record.get("sentence"), str):
        answers = record.get("answers", record.get("label"))
        return [sentence, *([str(answers)] if answers is not None else [])]
    captions = record.get("captions") or record.get("caption")
    if isinstance(captions, str | list):
        return [captions] if isinstance(captions, str) else [str(caption) for caption in captions]
    return [members["txt"].decode("utf-8", errors="replace")] if "txt" in members else []


def contact_sheet(samples: list[ShownSample]) -> Image.Image:
    """Draw the samples' images in rows of four, with their captions below."""
    columns = max(1, min(4, len(samples)))
    height = TILE + CAPTION_LINES * LINE_HEIGHT + 16
    rows = -(-len(samples) // columns)
    page = Image.new("RGB", (columns * (TILE + 16) + 16, rows * height + 16), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        x, y = 16 + column * (TILE + 16), 16 + row * height
        image = sample.image
        if isinstance(image, Image.Image):
            scale = TILE / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
            page.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
        elif isinstance(image, str):
            draw.multiline_text((x + 8, y + 8), "\n".join(textwrap.wrap(image, LINE_CHARACTERS)), "firebrick", font)
        lines = [line for caption in sample.captions for line in textwrap.wrap(f"- {caption}", LINE_CHARACTERS)]
        num_lines = CAPTION_LINES if image is not None else CAPTION_LINES + TILE // LINE_HEIGHT
        top = y + TILE + 4 if image is not None else y
        for position, line in enumerate([sample.key, *lines][:num_lines]):
            draw.text((x, top + position * LINE_HEIGHT), line, "black" if position else "gray", font)
    return page
