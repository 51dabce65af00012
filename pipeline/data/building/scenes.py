"""Synthetic pairs: two or three coloured shapes in a relation, and captions from a small grammar.

A scene is defined by its *description*: the first shape (left or top), the second, their axis, and optionally a third.
Every caption of a scene is true of it and states the whole description, so that scenes with different descriptions
share no caption. All randomness is hashed from the source's seed and the scene's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import SourceConfig, SyntheticConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.data.shards.manifest import MANIFEST
from pipeline.data.storage import Storage, join

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("large", "small")
COLOURS = {  # RGB, far from one another and from the light backgrounds
    "red": (214, 32, 36),
    "green": (36, 148, 60),
    "blue": (38, 70, 214),
    "yellow": (244, 206, 28),
    "purple": (142, 48, 176),
    "orange": (245, 128, 24),
    "black": (28, 28, 30),
    "cyan": (44, 196, 214),
}
THREE_OBJECTS = 0.3  # fraction of the scenes
SAMPLES_PER_SHARD = 200  # small shards, so that streams have something to shuffle
MAX_REDRAWS = 10_000
RECORD = "scenes.json"  # next to the shards: the configuration that they were drawn from
DRAWING = 1  # increment when the same configuration would give other images or captions

RADIUS = {"large": 0.17, "small": 0.085}  # of the image's side
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
SUPERSAMPLED = 4  # factor of the drawing size before averaging, for smooth edges
OUTLINES = {  # corners around the centre, y downwards, for radius 1
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "diamond": [(0.0, -1.28), (0.95, 0.0), (0.0, 1.28), (-0.95, 0.0)],
    "triangle": [(0.0, -1.12), (1.15, 0.9), (-1.15, 0.9)],
    "cross": [
        (-0.36, -1.1), (0.36, -1.1), (0.36, -0.36), (1.1, -0.36), (1.1, 0.36), (0.36, 0.36),
        (0.36, 1.1), (-0.36, 1.1), (-0.36, 0.36), (-1.1, 0.36), (-1.1, -0.36), (-0.36, -0.36),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Description:
    """`first` is left of (horizontal) or above (vertical) `second`; the optional `third` is at `side`."""

    first: Thing
    second: Thing
    horizontal: bool
    third: Thing | None = None
    side: str | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first, self.second) if self.third is None else (self.first, self.second, self.third)

    def __str__(self) -> str:
        axis = "left of" if self.horizontal else "above"
        third = f"; {self.third.words} {_at(self.side)}" if self.third and self.side else ""
        return f"{self.first.words} {axis} {self.second.words}{third}"


@dataclass(frozen=True)
class Scene:
    key: str
    description: Description
    image: np.ndarray  # (size, size, 3) uint8
    captions: list[str]

    @property
    def image_id(self) -> int:
        """Scenes of one description share an id: the captions of one are true of the other."""
        return hash64("scene", str(self.description)) >> 1


def build_synthetic(storage: Storage, sources: Mapping[str, SourceConfig]) -> None:
    """Draw every synthetic source that has no manifest yet. The manifest is written last.

    Raises DataError when a folder has scenes of another configuration, or tars that are not scenes.
    """
    for name, source in sources.items():
        if source.synthetic is None:
            continue
        record_url = join(source.shards, RECORD)
        is_complete = storage.exists(join(source.shards, MANIFEST))
        if is_complete and not storage.exists(record_url):
            continue  # shards that were not drawn here
        excluded_configs = _exclusions(source.synthetic, sources)
        # Everything that determines the bytes of a source.
        drawn = [config.model_dump(exclude={"exclude"}) for config in (source.synthetic, *excluded_configs)]
        record = {"drawing": DRAWING, "type": source.type, "scenes": drawn[0], "excluding": drawn[1:]}
        if is_complete:
            stored = json.loads(storage.read(record_url))
            if stored["type"] == "pairs":  # pairs serve as every source type
                record["type"] = "pairs"
            if stored != record:
                raise DataError(  # scenes of another configuration would be trained on unnoticed
                    f"source {name!r}: {source.shards} has scenes drawn from another configuration ({stored}); "
                    f"expected {record}. Remove the folder, or set another one"
                )
            continue
        names = storage.list(source.shards)
        foreign = next((name for name in names if name.endswith(".tar")), None)
        if foreign and RECORD not in names:  # the scenes of an interrupted run are drawn again
            raise DataError(
                f"{source.shards} has {foreign} but no manifest, so no scenes are drawn there. "
                "Index its tars with `mome shards index`, or set an empty folder"
            )
        excluded: frozenset[Description] = frozenset()
        for config in reversed(excluded_configs):  # an excluded source may itself exclude another
            excluded = frozenset(draw_descriptions(config, excluded))
        storage.write(record_url, json.dumps(record).encode())
        scenes = draw_scenes(source.synthetic, excluded, with_images=source.type != "text")
        write_shards(storage, _samples(scenes, source.type), source.shards, SAMPLES_PER_SHARD)


def _exclusions(config: SyntheticConfig, sources: Mapping[str, SourceConfig]) -> list[SyntheticConfig]:
    """Return the source that `config` excludes, the one that this excludes, and so on."""
    chain: list[SyntheticConfig] = []
    while config.exclude is not None:
        other = sources.get(config.exclude)
        if other is None or other.synthetic is None:
            known = ", ".join(name for name, source in sources.items() if source.synthetic) or "none"
            raise ConfigError(f"exclude: {config.exclude!r} is not a synthetic source; expected one of: {known}")
        if len(chain) > len(sources):
            raise ConfigError(f"exclude: {config.exclude!r} excludes itself through other sources")
        config = other.synthetic
        chain.append(config)
    return chain


def _samples(scenes: Iterable[Scene], source_type: str) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        if source_type == "text":
            for number, caption in enumerate(scene.captions):
                yield {"__key__": f"{scene.key}-{number}", "txt": caption.encode()}
            continue
        sample = {"__key__": scene.key, "jpg": simplejpeg.encode_jpeg(scene.image, 95, "RGB", "444")}
        if source_type == "pairs":
            sample["json"] = json.dumps({"captions": scene.captions, "image_id": scene.image_id}).encode()
        yield sample


def draw_scenes(
    config: SyntheticConfig, excluded: frozenset[Description] = frozenset(), with_images: bool = True
) -> Iterator[Scene]:
    """Yield the scenes of a configuration, except the `excluded` descriptions; blank images without `with_images`."""
    blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    for number, description in enumerate(draw_descriptions(config, excluded)):
        random = CounterRandom(hash64("scene picture", str(config.seed), number))
        image = draw_image(description, config.image_size, random) if with_images else blank
        captions = write_captions(description, config.captions, random)
        yield Scene(f"scene{number:07d}", description, image, captions)


def draw_descriptions(config: SyntheticConfig, excluded: frozenset[Description] = frozenset()) -> Iterator[Description]:
    """Yield the description of each scene. Raises ConfigError when no further allowed scene is found."""
    drawn: set[Description] = set()
    for number in range(config.scenes):
        random = CounterRandom(hash64("scene", str(config.seed), number))
        for _ in range(MAX_REDRAWS):
            things: list[Thing] = []
            count = 3 if random.uniform() < THREE_OBJECTS else 2
            while len(things) < count:
                thing = Thing(_pick(SIZES, random), _pick(tuple(COLOURS), random), _pick(SHAPES, random))
                if thing not in things:  # words could not distinguish two equal shapes
                    things.append(thing)
            horizontal = random.uniform() < 0.5
            side = _pick(("top", "bottom") if horizontal else ("left", "right"), random)
            third = (things[2], side) if count == 3 else (None, None)
            description = Description(things[0], things[1], horizontal, *third)
            if description not in excluded and description not in drawn:
                break
        else:
            raise ConfigError(f"scenes: could not find {config.scenes} distinct scenes; set fewer")
        if config.distinct:
            drawn.add(description)
        yield description


def write_captions(description: Description, count: int, random: CounterRandom) -> list[str]:
    """Return `count` different wordings of the description, or all that the grammar has if there are fewer."""
    first, second = description.first.words, description.second.words
    if description.horizontal:
        before, after = ("to the left of", "left of"), ("to the right of", "right of")
        start, end = "on the left", "on the right"
    else:
        before, after = ("above", "over"), ("below", "under")
        start, end = "at the top", "at the bottom"
    pairs = [*(f"{first} {word} {second}" for word in before), *(f"{second} {word} {first}" for word in after)]
    if description.third is not None and description.side is not None:
        third, at, opposite = description.third.words, _at(description.side), _at(OPPOSITE[description.side])
        wordings = [
            *(f"{pair}, and {third} {at}" for pair in pairs),
            *(f"{third} {at} and {pair} {opposite}" for pair in pairs),
            *(f"three shapes: {pair}, with {third} {at}" for pair in pairs),
        ]
    else:
        wordings = [
            *pairs,
            *(f"there is {pair}" for pair in pairs),
            *(f"a picture of {pair}" for pair in pairs),
            f"{start} {first}, {end} {second}",
            f"{second} {end} and {first} {start}",
            f"two shapes: {first} {start} and {second} {end}",
            f"two shapes: {second} {end} and {first} {start}",
        ]
    return [wordings[i] for i in random.permutation(len(wordings))[:count]]


def _at(side: str) -> str:
    return f"at the {side}" if side in ("top", "bottom") else f"on the {side}"


def draw_image(description: Description, size: int, random: CounterRandom) -> np.ndarray:
    """Return the scene as (size, size, 3) uint8: jittered positions on a light background with a colour gradient.

    All shapes have about equal area, so that only 'large' and 'small' differ in size.
    """
    large = size * SUPERSAMPLED
    corners = np.array([[200 + 55 * random.uniform() for _ in range(3)] for _ in range(4)], np.float32)
    canvas = cv2.resize(corners.reshape(2, 2, 3), (large, large), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    # Centres in 0 … 1 of a horizontal pair, and a third shape above or below it; transposed for a vertical pair.
    along, across = [(0.25, 0.5), (0.75, 0.5)], 0.16
    if description.third is not None:
        y, third_y = (0.7, 0.26) if description.side in ("top", "left") else (0.3, 0.74)
        along, across = [(0.25, y), (0.75, y), (0.5, third_y)], 0.04
    places = [(x + _spread(random, 0.03), y + _spread(random, across)) for x, y in along]
    for thing, place in zip(description.things, places, strict=True):
        centre = np.array(place if description.horizontal else place[::-1]) * large
        radius = RADIUS[thing.size] * (0.92 + 0.16 * random.uniform()) * large
        colour = tuple(int(np.clip(c + _spread(random, 12), 0, 255)) for c in COLOURS[thing.colour])
        middle = (round(centre[0]), round(centre[1]))
        if thing.shape == "circle":
            cv2.circle(canvas, middle, round(radius), colour, -1, cv2.LINE_AA)
        elif thing.shape == "ring":
            cv2.circle(canvas, middle, round(radius * 0.82), colour, round(radius * 0.42), cv2.LINE_AA)
        else:
            outline = np.array(OUTLINES[thing.shape]) * radius + centre
            cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], colour, cv2.LINE_AA)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def _pick(choices: tuple[str, ...], random: CounterRandom) -> str:
    return choices[random.integer(len(choices))]


def _spread(random: CounterRandom, width: float) -> float:
    """Draw uniformly from -width … width."""
    return width * (2.0 * random.uniform() - 1.0)
