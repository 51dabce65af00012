"""`mome shards show`: some samples as they lie, as text and as a contact sheet of their pictures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jobs.console import echo
from jobs.output import check_output, write_output
from jobs.shards.report import manifest_facts, print_json
from pipeline.config.schema import DataConfig
from pipeline.data.contents.images import EXTENSIONS, decode
from pipeline.data.contents.members import record_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.manifest import Manifest, ShardRecord, load_index, load_manifest, shard_folder
from pipeline.data.storage import Storage, join
from pipeline.pages.page import signature

MAX_PIXELS = DataConfig().max_pixels
TILE, CAPTION_LINES, LINE_CHARACTERS, LINE_HEIGHT = 224, 6, 38, 15  # of the contact sheet, in pixels and characters


def show_samples(url: str, samples: int, sheet: Path | None, as_json: bool) -> None:
    """Print `samples` samples of the shards at `url`, and draw their images on the PNG file `sheet`."""
    storage = Storage()
    if sheet is not None:
        check_output(storage, str(sheet), "--sheet")
    manifest = load_manifest(storage, url)
    shown = list(_spread_samples(storage, url, manifest, samples))
    for sample in shown if not as_json else []:
        _print_sample(sample)
    if sheet is not None:
        write_output(storage, str(sheet), _as_png(contact_sheet(shown), f"samples of {manifest.digest}"), "--sheet")
    if as_json:
        described = [sample.described() for sample in shown]
        print_json({"samples": described, "sheet": str(sheet) if sheet else None, **manifest_facts(manifest, url)})
    else:
        echo(f"{manifest.num_samples} samples in {len(manifest.shards)} shards at {url}")
        if sheet is not None:
            echo(f"contact sheet: {sheet}")


@dataclass(frozen=True)
class Shown:
    """One sample as it lies in its shard."""

    shard: str
    key: str
    members: Mapping[str, bytes]

    @property
    def record(self) -> Mapping[str, Any]:
        """The sample's json; empty where training would not read it."""
        try:
            with judging("members"):
                return record_of(self.members)
        except BadSample:
            return {}

    @property
    def captions(self) -> list[str]:
        """What the members say of the sample: its captions, question or statement in the json, else the text."""
        described = self.record
        if isinstance(said := described.get("question") or described.get("sentence"), str):
            answers = described.get("answers", described.get("label"))
            return [said, *([str(answers)] if answers is not None else [])]
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


def _as_png(picture: Image.Image, subject: str) -> bytes:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", signature(subject))
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def contact_sheet(shown: list[Shown], columns: int = 4) -> Image.Image:
    """The samples' pictures in rows, captions under them."""
    columns = max(1, min(columns, len(shown)))
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
    folder = shard_folder(url)
    before = 0
    for shard in manifest.shards:
        places = [place - before for place in wanted if before <= place < before + shard.samples]
        before += shard.samples
        if places:
            yield from _read_shard(storage, url, folder, shard, places)


def _read_shard(storage: Storage, url: str, folder: str, shard: ShardRecord, places: list[int]) -> Iterator[Shown]:
    found = load_index(storage, url, shard)
    for place in places:
        start, stop = found.byte_range(place)
        data = storage.read_range(join(folder, shard.name), start, stop)
        members = {name: data[at - start : at - start + size] for name, at, size in found.members(place)}
        yield Shown(shard.name, found.keys[place], members)


def _print_sample(sample: Shown) -> None:
    described = sample.described()
    members = ", ".join(f"{name} {len(data)} B" for name, data in sample.members.items())
    size = described["image_size"]
    shape = f"  {size[0]} x {size[1]}" if isinstance(size, list) else ""
    echo(f"{sample.shard}  {sample.key}  ({members}){shape}")
    if described["fault"]:
        echo(f"    {described['fault']}")
    for caption in sample.captions:
        echo(f"    - {textwrap.shorten(caption, 200)}")
