"""`mome shards show`: print some samples, and save their images as a contact sheet."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jobs.console import echo
from jobs.output import check_output, write_output
from jobs.shards.report import manifest_facts
from pipeline.config.schema import DataConfig
from pipeline.data.contents.images import EXTENSIONS, decode
from pipeline.data.contents.members import record_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.manifest import load_index, load_manifest, shard_folder
from pipeline.data.storage import Storage, join
from pipeline.pages.page import signature

TILE, CAPTION_LINES, LINE_CHARACTERS, LINE_HEIGHT = 224, 6, 38, 15  # of the contact sheet, in pixels and characters


def show_samples(url: str, samples: int, sheet: Path | None, as_json: bool) -> None:
    """Print `samples` samples of the shards at `url`, and draw their images on the PNG file `sheet`."""
    storage = Storage()
    if sheet is not None:
        check_output(storage, str(sheet), "--sheet")
    manifest = load_manifest(storage, url)
    count = min(samples, manifest.num_samples)
    positions = [i * manifest.num_samples // count for i in range(count)]  # at equal distances over all shards
    shown = []
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
            shown.append(ShownSample(shard.name, index.keys[number], members))
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


@dataclass(frozen=True)
class ShownSample:
    """One sample of a shard."""

    shard: str
    key: str
    members: Mapping[str, bytes]

    @property
    def captions(self) -> list[str]:
        """The captions, question or statement of the json, else the text."""
        try:
            with judging("members"):
                record: Mapping[str, Any] = record_of(self.members)
        except BadSample:  # training would not read it
            record = {}
        if isinstance(sentence := record.get("question") or record.get("sentence"), str):
            answers = record.get("answers", record.get("label"))
            return [sentence, *([str(answers)] if answers is not None else [])]
        captions = record.get("captions") or record.get("caption")
        if isinstance(captions, str):
            return [captions]
        if isinstance(captions, list):
            return [str(caption) for caption in captions]
        text = self.members.get("txt")
        return [text.decode("utf-8", errors="replace")] if text is not None else []

    @cached_property
    def image(self) -> Image.Image | str | None:
        """The image, the reason why it cannot be decoded, or None for a sample without one."""
        encoded = next((data for name, data in self.members.items() if name.split(".")[-1] in EXTENSIONS), None)
        if encoded is None:
            return None
        try:
            return Image.fromarray(decode(encoded, DataConfig().max_pixels))
        except BadSample as error:
            return error.reason


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
