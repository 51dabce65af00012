"""`mome shards` build, check and show: shards made from files, their bad samples, and some of their samples."""

import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.console import aligned, check_output, echo, line_width, list_of_findings, write_output
from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import DataConfig, SourceType
from pipeline.config.urls import is_local, parse
from pipeline.data.building.importers import find_kind, read_source, write_shards
from pipeline.data.building.inputs import ImportOptions, Kind, Problems, Sample, suffix_of
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.images import EXTENSIONS, decode, format_of, measure
from pipeline.data.contents.members import record_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.check import ShardFinding, check_shards, fitting_type
from pipeline.data.shards.manifest import Manifest, load_index, load_manifest, parse_pattern
from pipeline.data.storage import NotFound, Storage, join
from pipeline.pages.page import signature

BROKEN, BAD = 1, 3  # exit statuses of a check
_MAX_PRINTED = 20  # broken shards
TILE, CAPTION_LINES, LINE_CHARACTERS, LINE_HEIGHT, MARGIN = 224, 6, 38, 15, 16  # of the contact sheet, in pixels
# Options of some formats only; with another format they are an error.
APPLIES_TO = {
    "image_column": ("table", "parquet"), "caption_column": ("table", "parquet"), "label_column": ("parquet",),
    "keep_columns": ("parquet",), "annotations": ("vqa",), "listed_only": ("vqa", "vg_qa"),
    "min_count": ("vqa", "vg_qa"), "split": ("karpathy", "parquet"),
}  # fmt: skip


class ShardProgress(Progress):
    """Progress bar on standard error: samples read, then shards done. Shown on a terminal only."""

    def __init__(self, action: str) -> None:
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=Console(stderr=True), transient=True)
        self._action, self.bar = action, self.add_task("starting", total=None)

    def shard(self, done: int, total: int, name: str) -> None:
        """Show a finished shard; `total` is 0 while it is unknown."""
        if total:
            self.update(self.bar, description=f"{self._action} {name}", completed=done, total=total)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def report_manifest(manifest: Manifest, url: str, as_json: bool, more: dict[str, Any]) -> None:
    """Print a manifest's totals and the command's own facts."""
    size, shards, samples = sum(shard.bytes for shard in manifest.shards), len(manifest.shards), manifest.num_samples
    if as_json:
        totals = {"url": url, "shards": shards, "num_samples": samples, "bytes": size, "manifest": manifest.digest}
        echo(json.dumps(totals | more, ensure_ascii=False))
        return

    left_out = f", {more['left_out']} left out" if more.get("left_out") else ""
    echo(f"{counted(samples, 'sample')} in {counted(shards, 'shard')} at {url}{left_out}")
    if "images" in more:
        parts = [
            counted(more[f"{noun}s"], noun) for noun in ("image", "caption", "question", "label") if more[f"{noun}s"]
        ]
        line = ", ".join([*parts, f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"])
        line += f"; {counted(more['without_caption'], 'image')} without a caption" if more["without_caption"] else ""
        line += f"; {counted(more['animated'], 'animated image')} (first frame)" if more["animated"] else ""
        echo(line)
    if (regions := more.get("regions")) is not None:
        echo(f"{counted(regions, 'region')}, {regions / max(1, samples - more['bad_samples']):.3g} a sample")
    if trusted := more.get("trusted"):
        echo(f"{trusted} of the shards were counted by another tool and are read on first use")
    echo(f"inspect them: mome shards show {url} --sheet sheet.png")


def build_shards(
    url: str, out: str, kind: str, options: ImportOptions, problems: Problems, samples_per_shard: int,
    limit: int | None, overwrite: bool, max_missing: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the shards and print the result; the arguments are the options of `mome shards build`."""
    threshold = 1.0
    if max_missing is not None:
        try:
            threshold = float(max_missing.removesuffix("%")) / (100 if max_missing.endswith("%") else 1)
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise ConfigError(f"--max-missing {max_missing}: expected a fraction of the entries, such as 1% or 0.01")
    source = Path(parse(url)[1]) if is_local(url) else url
    format_name = cast(Kind, kind)
    if isinstance(source, str) and kind not in ("auto", "parquet"):
        raise ConfigError(f"{url}: only Parquet files are read from a URL; copy files of --kind {kind} to this machine")
    if kind == "auto":
        format_name = "parquet" if isinstance(source, str) else find_kind(source)
    for name, kinds in APPLIES_TO.items():
        if getattr(options, name) and format_name not in kinds:
            option = f"--{name.replace('_', '-').removesuffix('s' if name == 'keep_columns' else '')}"
            raise ConfigError(f"{option} is for --kind {' or '.join(kinds)}; {source} is read as {format_name}")
    if options.images is not None and not options.images.is_dir():
        expected = "the folder that image paths are relative to"
        raise ConfigError(f"--images {options.images}: no such folder; expected {expected}")
    storage = Storage()
    imported = read_source(source, format_name, problems, options, storage)
    num_samples = 0
    counts = {"images": 0, "captions": 0, "questions": 0, "labels": 0, "without_caption": 0, "animated": 0}

    def count_samples() -> Iterator[Sample]:
        """Yield and count the samples, then raise DataError if too many entries could not be used."""
        nonlocal num_samples
        for sample in islice(imported.samples, limit):
            images = [data for name, data in sample.items() if name.rpartition(".")[2] in EXTENSIONS]
            record = json.loads(sample.get("json", b"{}"))
            captions, has_label = len(record.get("captions", ())), "cls" in sample or "label" in record
            num_samples += 1
            counts["images"] += len(images)
            counts["captions"] += captions
            counts["questions"] += "question" in record
            counts["labels"] += has_label
            counts["without_caption"] += bool(images) and not (captions or has_label or "question" in record)
            for image in images:
                with suppress(BadSample):  # training counts damaged images
                    counts["animated"] += format_of(image) not in ("JPEG", "BMP") and measure(image).is_animated
            progress.update(progress.bar, description="reading samples", completed=num_samples)
            yield sample
        entries = num_samples + problems.faults
        if problems.faults > threshold * entries:
            fault = f"{problems.faults} of {entries} entries could not be used ({problems.faults / entries:.1%})"
            raise DataError(f"{fault}, more than --max-missing {threshold:.1%}; nothing is written")

    try:
        with ShardProgress("indexing") as progress:
            samples = count_samples()
            manifest = write_shards(storage, samples, out, samples_per_shard, progress.shard, overwrite=overwrite)
        for name, listed in imported.choices.items():
            storage.write(join(out, name), listed.to_bytes())
    finally:  # report what was not imported, and which option to try
        # If nothing exists, --images is wrong, and one example says all.
        first = problems.first[: 1 if problems.absent == problems.count and not counts["images"] else None]
        notes = [f"left out: {problem}" for problem in first]
        if problems.count > len(first):
            notes.append(f"left out: {problems.count - len(first):,} more")
        if problems.skipped:
            files = ", ".join(f"{count} {suffix}" for suffix, count in problems.skipped.most_common(10))
            notes.append(f"files of other kinds, not read: {files}")
        if problems.absent and not counts["images"]:
            remedy = "give the folder that their paths are relative to with --images"
            notes.append(f"hint: none of the listed images exists; {remedy}")
        elif problems.faults > num_samples:
            notes.append(f"hint: more entries could not be used ({problems.faults}) than were imported ({num_samples})")
        if isinstance(source, Path) and format_name == "folder" and counts["images"] and not counts["captions"]:
            entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
            has_images = any(suffix_of(entry.name) in EXTENSIONS for entry in entries)
            if sum(entry.is_dir() for entry in entries) > 1 and not has_images:
                remedy = "Import it with --kind classes to train a classifier"
                notes.append(f"hint: no captions, but one folder per class? {remedy}")
        for note in notes:
            echo(note, err=True)
    facts = {"kind": format_name, "left_out": problems.count, "skipped": dict(problems.skipped)} | counts
    lengths = {name: len(listed) for name, listed in imported.choices.items()}
    report_manifest(manifest, out, as_json, facts | lengths)
    for name, length in lengths.items() if not as_json else ():
        echo(f"{join(out, name)}: {length} entries, the number to set in the stage's config")


def check_folder(url: str, source_type: str, report: Path | None, max_pixels: int, workers: int, as_json: bool) -> int:
    """Check the shards at `url`, print the summary, and return the exit status of `mome shards check`."""
    shards = samples = 0
    broken: dict[str, str] = {}  # shard -> reason
    kinds, skipped = Counter[str](), Counter[str]()  # of bad samples, and of entries that belong to no sample
    examples: dict[str, ShardFinding] = {}
    with ShardProgress("checking") as progress, list_of_findings(report, "--report") as lines:
        for shard in check_shards(Storage(), url, cast(SourceType, source_type), max_pixels, workers, progress.shard):
            shards, samples = shards + 1, samples + shard.samples
            skipped.update(shard.skipped)
            for finding in shard.bad:  # counted by the reason without the details of the sample
                kind = f"{finding.stage}: {re.sub('[0-9]+', 'N', re.split('[:;(]', finding.reason)[0]).strip()}"
                kinds[kind] += 1
                examples.setdefault(kind, finding)
            broken |= {shard.shard: shard.broken.reason} if shard.broken else {}
            if lines is not None:
                findings = (*shard.bad, shard.broken) if shard.broken else shard.bad
                lines.writelines(f"{json.dumps(f._asdict(), ensure_ascii=False)}\n".encode() for f in findings)
    other = None
    if samples and kinds.total() == samples and not broken:
        other = fitting_type(Storage(), url, next(iter(examples.values())).shard, max_pixels)
    if as_json:
        summary = {
            "url": url, "shards": shards, "num_samples": samples, "bad_samples": kinds.total(),
            "kinds": dict(kinds.most_common()), "broken_shards": broken, "report": str(report) if report else None,
        }  # fmt: skip
        echo(json.dumps(summary | ({"skipped": dict(skipped.most_common())} if skipped else {}), ensure_ascii=False))
    else:
        echo(f"{counted(samples, 'sample')} in {counted(shards, 'shard')} at {url}")
        echo(f"{counted(len(broken), 'broken shard')}, {counted(kinds.total(), 'bad sample')}")
        for name, reason in islice(broken.items(), _MAX_PRINTED):
            echo(f"  {name}: {reason}")
        if len(broken) > _MAX_PRINTED:
            echo(f"  … and {len(broken) - _MAX_PRINTED} more")
        lines_of_kinds = [[f"{count:,}", f"{kind}, such as {examples[kind].key} in {examples[kind].shard}"]
                          for kind, count in kinds.most_common()]  # fmt: skip
        lines_of_kinds += [
            [f"{count:,}", f"skipped, not part of a sample: {entry}"] for entry, count in skipped.most_common()
        ]
        if lines_of_kinds:
            echo(aligned(lines_of_kinds, right=(0,), width=line_width()))
        if report:
            echo(f"all findings: {report}")
        if hint := other and f"hint: every sample fails; they can be read with --type {other}":
            echo(hint)
    return BROKEN if broken else BAD if kinds else 0


def show_samples(url: str, samples: int, sheet: Path | None, as_json: bool) -> None:
    """Print `samples` samples of the shards at `url`, and draw their images on the PNG file `sheet`."""
    storage = Storage()
    if sheet is not None:
        check_output(storage, str(sheet), "--sheet")
    manifest, classes = load_manifest(storage, url), Choices()
    with suppress(NotFound, ConfigError):
        names = join(parse_pattern(url).folder, CLASSES)
        classes = Choices.from_bytes(storage.read(names), names)
    count = min(samples, manifest.num_samples)
    positions = [i * manifest.num_samples // count for i in range(count)]  # at equal distances over all shards
    shown: list[dict[str, Any]] = []
    images: list[Image.Image | None] = []
    first = 0
    for shard in manifest.shards:
        numbers = [position - first for position in positions if first <= position < first + shard.samples]
        first += shard.samples
        if not numbers:
            continue
        index = load_index(storage, url, shard)
        for number in numbers:
            start, stop = index.byte_range(number)
            data = storage.read(join(parse_pattern(url).folder, shard.name), start, stop)
            members = {name: data[at - start : at - start + size] for name, at, size in index.members(number)}
            encoded = next((content for name, content in members.items() if name.split(".")[-1] in EXTENSIONS), None)
            image, fault = None, None
            record: dict[str, Any] = {}
            try:
                image = None if encoded is None else Image.fromarray(decode(encoded, DataConfig().max_pixels))
            except BadSample as error:
                fault = error.reason
            with suppress(BadSample), judging("members"):
                record = record_of(members)
            # Texts of any type of source: training may read none of them.
            texts = record.get("captions") or record.get("caption")
            if isinstance(sentence := record.get("question") or record.get("sentence"), str):
                answers = record.get("answers", record.get("label"))
                texts = [sentence] if answers is None else [sentence, answers]
            elif not isinstance(texts, str | list):
                texts = [members["txt"].decode("utf-8", errors="replace")] if "txt" in members else []
            label = members.get("cls", b"").strip().decode(errors="replace")
            place = int(label) if label.isdecimal() and len(label) <= 9 else len(classes)
            name = f": {classes[place]}" if place < len(classes) else ""
            shown.append({
                "shard": shard.name, "key": index.keys[number], "fault": fault,
                "members": {name: len(content) for name, content in members.items()},
                "image_size": list(image.size) if image else None,
                "captions": [str(text) for text in ([texts] if isinstance(texts, str) else texts)],
                "class": f"class {label}{name}" if label else None,
            })  # fmt: skip
            images.append(image)
    if sheet is not None:
        buffer, info = io.BytesIO(), PngInfo()
        info.add_text("Software", signature(f"samples of {manifest.digest}"))
        contact_sheet(shown, images).save(buffer, "PNG", pnginfo=info)
        write_output(storage, str(sheet), buffer.getvalue(), "--sheet")
    if as_json:
        return report_manifest(manifest, url, as_json, {"samples": shown, "sheet": str(sheet) if sheet else None})
    width = line_width()
    for sample in shown:
        sizes = ", ".join(f"{name} {size:,} B" for name, size in sample["members"].items())
        pixels = ", {} x {}".format(*sample["image_size"]) if sample["image_size"] else ""
        heading = f"{sample['shard']}  {sample['key']}  ({sizes}{pixels})"
        echo(textwrap.fill(heading, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
        for text in filter(None, (sample["fault"], sample["class"], *sample["captions"])):
            lines = textwrap.wrap(
                text, width, initial_indent="    - ", subsequent_indent="      ", max_lines=3, placeholder=" …"
            )
            echo("\n".join(lines))
    echo(f"{counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')} at {url}")
    if sheet is not None:
        echo(f"contact sheet: {sheet}")


def contact_sheet(samples: list[dict[str, Any]], images: list[Image.Image | None]) -> Image.Image:
    """Draw the samples' images in rows of four, with their captions below."""
    columns = max(1, min(4, len(samples)))
    width, height = TILE + MARGIN, TILE + CAPTION_LINES * LINE_HEIGHT + MARGIN
    page = Image.new("RGB", (columns * width + MARGIN, -(-len(samples) // columns) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        x, y = MARGIN + number % columns * width, MARGIN + number // columns * height
        top, num_lines = y + TILE + 4, CAPTION_LINES
        if image is not None:
            method = Image.Resampling.NEAREST if 2 * max(image.size) < TILE else Image.Resampling.BICUBIC
            image = ImageOps.contain(image, (TILE, TILE), method)
            page.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
        elif sample["fault"]:
            draw.multiline_text((x + 8, y + 8), textwrap.fill(sample["fault"], LINE_CHARACTERS), "firebrick", font)
        else:
            top, num_lines = y, CAPTION_LINES + TILE // LINE_HEIGHT
        texts = [*filter(None, [sample["class"]]), *(f"- {caption}" for caption in sample["captions"])]
        lines = [sample["key"], *(line for text in texts for line in textwrap.wrap(text, LINE_CHARACTERS))]
        if len(lines) > num_lines:
            lines = [*lines[: num_lines - 1], f"{lines[num_lines - 1][: LINE_CHARACTERS - 2]} …"]
        for position, line in enumerate(lines):
            draw.text((x, top + position * LINE_HEIGHT), line, "black" if position else "gray", font)
    return page
