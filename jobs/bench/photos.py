"""Shards to measure on: photos repeated under other keys, or pictures drawn with the spectrum of photos."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from pipeline.config.errors import DataError
from pipeline.data.building import importers
from pipeline.data.building.files import Problems, Sample
from pipeline.data.storage import Storage

SHARDS = 16  # where there are samples enough
PER_SHARD = 1000
CAPTIONS = "captions.jsonl"

DRAWN = 48  # different pictures, when none are given
WIDTH, HEIGHT, QUALITY = 640, 480, 90
SLOPE = 1.4  # amplitudes fall as frequency^-1.4: somewhat flatter than in photos, for sensor noise and sharp edges
DETAIL = 52.0  # standard deviation of the values; with SLOPE, JPEGs of about 90 kB, as photos of this size have
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "child",
    "street",
    "red",
    "small",
    "large",
    "ball",
    "running",
    "standing",
    "beside",
    "behind",
    "water",
    "green",
    "field",
    "with",
    "two",
    "people",
    "white",
    "shirt",
    "playing",
    "holding",
    "looking",
    "camera",
    "mountain",
    "old",
    "building",
    "wooden",
    "bench",
    "sunny",
]


def write_photos(storage: Storage, folders: Iterable[Path], url: str, samples: int, at_least: int) -> None:
    """`samples` samples of the folders' photos, or of drawn ones, in at least `at_least` shards at `url`."""
    photos = [sample for folder in folders for sample in _read(folder)] or list(draw_samples(DRAWN))
    per_shard = max(1, min(PER_SHARD, samples // max(SHARDS, at_least)))
    importers.write_shards(storage, _repeated(photos, samples), url, per_shard)


def _read(folder: Path) -> Iterator[Sample]:
    """The pairs of a folder with a captions.jsonl, or its images with their .txt files."""
    captions = folder / CAPTIONS
    source = captions if captions.exists() else folder
    found = 0
    for sample in importers.read_samples(source, importers.find_kind(source), Problems()):
        if "captions" in json.loads(sample.get("json", b"{}")):  # texts alone have no json
            found += 1
            yield sample
    if not found:
        raise DataError(f"{folder}: no photo with a caption. Expected {CAPTIONS}, or a .txt beside each image")


def _repeated(photos: list[Sample], samples: int) -> Iterator[Sample]:
    for number, photo in enumerate(itertools.islice(itertools.cycle(photos), samples)):
        yield {**photo, "__key__": f"{number:07d}"}


def draw_samples(count: int, seed: int = 0) -> Iterator[Sample]:
    """Pictures of coloured noise whose detail falls with frequency as a photo's does, with captions of common words."""
    random = np.random.default_rng(seed)
    for number in range(count):
        captions = [" ".join(random.choice(WORDS, size=random.integers(8, 16))) for _ in range(5)]
        record = {"image_id": number, "captions": captions}
        yield {"__key__": f"{number}", "jpg": _drawn(random), "json": json.dumps(record).encode()}


def _drawn(random: np.random.Generator) -> bytes:
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT, np.fft.rfftfreq(WIDTH)[None] * WIDTH)
    falling = 1 / np.maximum(frequency, 1) ** SLOPE
    light, *tints = (_field(random, falling) for _ in range(3))  # grey detail, and half as much in two colours
    colours = np.stack([light + 0.5 * tints[0], light, light + 0.5 * tints[1]], axis=2)
    pixels = np.clip(128 + DETAIL * colours, 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420")


def _field(random: np.random.Generator, falling: np.ndarray) -> np.ndarray:
    """(HEIGHT, WIDTH) noise with the given amplitudes, of unit variance."""
    waves = np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) * falling
    field = np.fft.irfft2(waves, s=(HEIGHT, WIDTH))
    return (field - field.mean()) / field.std()
