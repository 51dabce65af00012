"""Synthetic pairs: two or three coloured shapes in a relation, and captions from a small grammar. Every caption is true
of its scene and states its whole *description*, so that scenes with different descriptions share no caption. All
randomness is hashed from the source's seed and the scene's number.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import SourceConfig, SyntheticConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.building.inputs import Sample
from pipeline.data.randomness import CounterRandom, hash64, permutation
from pipeline.data.shards.manifest import MANIFEST
from pipeline.data.storage import Storage, join

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("large", "small")
COLOURS = {  # RGB, far from one another and from the light backgrounds
    "red": (214, 32, 36), "green": (36, 148, 60), "blue": (38, 70, 214), "yellow": (244, 206, 28),
    "purple": (142, 48, 176), "orange": (245, 128, 24), "black": (28, 28, 30), "cyan": (44, 196, 214),
}  # fmt: skip
THREE_OBJECTS = 0.3  # fraction of the scenes
SAMPLES_PER_SHARD = 200  # small shards, so that streams have something to shuffle
MAX_REDRAWS = 10_000
RECORD = "scenes.json"  # next to the shards: the configuration that they were drawn from
DRAWING = 1  # increment when the same configuration would give other images or captions

RADIUS = {"large": 0.17, "small": 0.085}  # of the image's side
AT = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}
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


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


class Description(NamedTuple):
    """The first thing is left of (horizontal) or above (vertical) the second; an optional third is at `side`."""

    things: tuple[Thing, ...]
    horizontal: bool
    side: str | None = None


def build_synthetic(storage: Storage, sources: Mapping[str, SourceConfig]) -> None:
    """Draw every synthetic source that has no manifest yet. Raises DataError for a folder with anything else."""
    for name, source in sources.items():
        if source.synthetic is None:
            continue
        names = storage.list(source.shards)
        if MANIFEST in names and RECORD not in names:
            continue  # shards that were not drawn here
        configs = [source.synthetic]  # this source, the one that it excludes, the one that this excludes, and so on
        while (excluded_name := configs[-1].exclude) is not None:
            other = sources.get(excluded_name)
            if other is None or other.synthetic is None:
                known = ", ".join(name for name, source in sources.items() if source.synthetic)
                raise ConfigError(f"exclude: {excluded_name!r} is not a synthetic source; expected one of: {known}")
            if len(configs) > len(sources):
                raise ConfigError(f"exclude: {excluded_name!r} excludes itself through other sources")
            configs.append(other.synthetic)
        # Everything that determines the bytes of a source.
        drawn = [config.model_dump(exclude={"exclude"}) for config in configs]
        record = {"drawing": DRAWING, "type": source.type, "scenes": drawn[0], "excluding": drawn[1:]}
        if MANIFEST in names:
            stored = json.loads(storage.read(join(source.shards, RECORD)))
            if stored["type"] == "pairs":  # pairs serve as every source type
                record["type"] = "pairs"
            if stored != record:
                fault = f"{source.shards} has scenes drawn from another configuration ({stored})"
                raise DataError(f"source {name!r}: {fault}; expected {record}. Remove the folder, or set another one")
            continue
        foreign = next((name for name in names if name.endswith(".tar")), None)
        if foreign and RECORD not in names:  # the scenes of an interrupted run are drawn again
            remedy = "Index its tars with `mome shards index`, or set an empty folder"
            raise DataError(f"{source.shards} has {foreign} but no manifest, so no scenes are drawn there. {remedy}")
        excluded: frozenset[Description] = frozenset()
        for config in reversed(configs[1:]):
            excluded = frozenset(draw_descriptions(config, excluded))
        storage.write(join(source.shards, RECORD), json.dumps(record).encode())
        samples = scene_samples(source.synthetic, source.type, excluded)
        write_shards(storage, samples, source.shards, SAMPLES_PER_SHARD, overwrite=True)


def scene_samples(
    config: SyntheticConfig, source_type: str, excluded: frozenset[Description] = frozenset()
) -> Iterator[Sample]:
    """Yield the samples of a source of this type: one for each caption of `text`, else one for each image."""
    for number, description in enumerate(draw_descriptions(config, excluded)):
        key, random = f"scene{number:07d}", CounterRandom(hash64("scene picture", str(config.seed), number))
        if source_type == "text":
            for line, caption in enumerate(write_captions(description, config.captions, random)):
                yield {"__key__": f"{key}-{line}", "txt": caption.encode()}
            continue
        image = draw_image(description, config.image_size, random)
        sample = {"__key__": key, "jpg": simplejpeg.encode_jpeg(image, 95, "RGB", "444")}
        if source_type == "pairs":
            captions = write_captions(description, config.captions, random)
            first, second, *others = map(str, description.things)
            third = f"; {others[0]} {AT[description.side]}" if description.side else ""
            identity = f"{first} {'left of' if description.horizontal else 'above'} {second}{third}"
            record = {"captions": captions, "image_id": hash64("scene", identity) >> 1}
            sample["json"] = json.dumps(record).encode()
        yield sample


def draw_descriptions(config: SyntheticConfig, excluded: frozenset[Description] = frozenset()) -> Iterator[Description]:
    """Yield the description of each scene. Raises ConfigError when no further allowed scene is found."""
    drawn: set[Description] = set()
    for number in range(config.scenes):
        random = CounterRandom(hash64("scene", str(config.seed), number))
        for _ in range(MAX_REDRAWS):
            things: list[Thing] = []
            count = 3 if random.uniform() < THREE_OBJECTS else 2
            while len(things) < count:
                thing = Thing(*(values[random.integer(len(values))] for values in (SIZES, tuple(COLOURS), SHAPES)))
                if thing not in things:  # words could not distinguish two equal shapes
                    things.append(thing)
            horizontal = random.uniform() < 0.5
            side = (("top", "bottom") if horizontal else ("left", "right"))[random.integer(2)]
            description = Description(tuple(things), horizontal, side if count == 3 else None)
            if description not in excluded and description not in drawn:
                break
        else:
            raise ConfigError(f"scenes: could not find {config.scenes} distinct scenes; set fewer")
        if config.distinct:
            drawn.add(description)
        yield description


def write_captions(description: Description, count: int, random: CounterRandom) -> list[str]:
    """Return `count` different wordings of the description, or all that the grammar has if there are fewer."""
    first, second, *others = description.things
    if description.horizontal:
        before, after, start, end = ("to the left of", "left of"), ("to the right of", "right of"), "left", "right"
    else:
        before, after, start, end = ("above", "over"), ("below", "under"), "top", "bottom"
    start, end = AT[start], AT[end]
    pairs = [*(f"{first} {word} {second}" for word in before), *(f"{second} {word} {first}" for word in after)]
    if description.side is not None:
        third, at, opposite = others[0], AT[description.side], AT[OPPOSITE[description.side]]
        wordings = [
            *(f"{pair}, and {third} {at}" for pair in pairs),
            *(f"{third} {at} and {pair} {opposite}" for pair in pairs),
            *(f"three shapes: {pair}, with {third} {at}" for pair in pairs),
        ]
    else:
        wordings = [
            *(f"{opening}{pair}" for opening in ("", "there is ", "a picture of ") for pair in pairs),
            f"{start} {first}, {end} {second}",
            f"{second} {end} and {first} {start}",
            f"two shapes: {first} {start} and {second} {end}",
            f"two shapes: {second} {end} and {first} {start}",
        ]
    return [wordings[i] for i in permutation(random.integer(), len(wordings))[:count]]


def draw_image(description: Description, size: int, random: CounterRandom) -> np.ndarray:
    """Return the scene as (size, size, 3) uint8. All shapes have about equal area, so that only their size differs."""

    def jitter(width: float) -> float:  # uniform in -width … width
        return width * (2.0 * random.uniform() - 1.0)

    large = size * SUPERSAMPLED
    corners = np.array([[200 + 55 * random.uniform() for _ in range(3)] for _ in range(4)], np.float32)
    canvas = cv2.resize(corners.reshape(2, 2, 3), (large, large), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    # Centres in 0 … 1 of a horizontal pair, and a third shape above or below it; transposed for a vertical pair.
    along, across = [(0.25, 0.5), (0.75, 0.5)], 0.16
    if description.side is not None:
        y, third_y = (0.7, 0.26) if description.side in ("top", "left") else (0.3, 0.74)
        along, across = [(0.25, y), (0.75, y), (0.5, third_y)], 0.04
    places = [(x + jitter(0.03), y + jitter(across)) for x, y in along]
    for thing, place in zip(description.things, places, strict=True):
        centre = np.array(place if description.horizontal else place[::-1]) * large
        radius = RADIUS[thing.size] * (0.92 + 0.16 * random.uniform()) * large
        colour = tuple(int(np.clip(c + jitter(12), 0, 255)) for c in COLOURS[thing.colour])
        middle = round(centre[0]), round(centre[1])
        if thing.shape == "circle":
            cv2.circle(canvas, middle, round(radius), colour, -1, cv2.LINE_AA)
        elif thing.shape == "ring":
            cv2.circle(canvas, middle, round(radius * 0.82), colour, round(radius * 0.42), cv2.LINE_AA)
        else:
            outline = np.array(OUTLINES[thing.shape]) * radius + centre
            cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], colour, cv2.LINE_AA)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
