"""Tiny drawn data sets for fine-tuning: questions about coloured shapes, statements about two images, and classes.

Each is a folder of tars with the files that `mome shards build` writes next to them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.building.scenes import COLOURS as RGB
from pipeline.data.building.scenes import Description, Thing, draw_image
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.data.storage import Storage

SIDE = 32
COLOURS = ("red", "green", "blue", "yellow")


def write_set(folder: Path, source_type: str, count: int, seed: int = 0) -> str:
    """Write `count` samples of a source type in shards of 20, and return their folder."""
    randoms = [CounterRandom(hash64("drawn", source_type, seed, number)) for number in range(count)]
    samples = ({"__key__": f"drawn{n:05d}"} | _sample(source_type, random) for n, random in enumerate(randoms))
    url, storage = str(folder / f"{source_type}-{seed}"), Storage()
    write_shards(storage, samples, url, samples_per_shard=20, overwrite=True)
    choices = {"questions": ("answers.json", (*COLOURS, "yes", "no")), "labelled": ("classes.json", COLOURS)}
    if source_type in choices:
        name, names = choices[source_type]
        storage.write(f"{url}/{name}", json.dumps(names).encode())
    return url


def colour_of(image: torch.Tensor) -> torch.Tensor:
    """Return the index (B,) int64 in COLOURS of each image's most frequent painted colour; image (B, H, W, 3)."""
    paint = torch.tensor([RGB[name] for name in COLOURS], dtype=torch.float32)
    near = torch.cdist(image.float().flatten(1, 2), paint.expand(len(image), -1, -1)) < 40
    return near.sum(dim=1).argmax(dim=1)


def run_config(folder: Path, source_type: str, objective: str, steps: int, **stage: Any) -> RunConfig:
    """Return a run that fine-tunes a tiny VLMo from random weights; draw its samples if the folder has none."""
    train, test = f"{folder}/{source_type}-0", f"{folder}/{source_type}-1"
    if not Path(train).exists():
        train, test = write_set(folder, source_type, 200), write_set(folder, source_type, 60, seed=1)
    model = {
        "width": 48, "layers": 3, "heads": 4, "vision_language_layers": 1, "image_size": SIDE, "patch_size": 8,
        "max_text_length": 16, "positions": "absolute", "layer_scale": None, "drop_path": 0.0, "init_std": 0.1,
    }  # fmt: skip
    stage = {
        "name": "finetune", "sources": {"train": 1.0}, "objectives": {objective: {}}, "steps": steps,
        "global_batch_size": 32, "max_text_length": 16,
        "optimizer": {"lr": 2e-3, "warmup_steps": 5, "max_grad_norm": 1.0},
    } | stage  # fmt: skip
    sources = {"train": {"shards": train, "type": source_type}, "test": {"shards": test, "type": source_type}}
    values = {
        "name": f"tiny-{source_type}", "output": str(folder / "runs"), "seed": 3, "model": model,
        "tokenizer": {"size": 200}, "sources": sources, "stages": [stage], "engine": {"precision": "float32"},
        "data": {"streams": 4, "augment": {"crop_scale": [0.9, 1.0], "num_ops": 0}},
        "checkpoint": {"every": 1000}, "tracking": {"metrics_every": 10}, "evaluation": {"source": "test"},
    }  # fmt: skip
    return validate(values, "tiny")


def _image(colour: str, random: CounterRandom) -> bytes:
    """Return an image of two shapes of a colour."""
    left, right = (Thing("large", colour, ("circle", "square")[random.integer(2)]) for _ in range(2))
    return simplejpeg.encode_jpeg(draw_image(Description((left, right), True), SIDE, random), 95, "RGB", "444")


def _sample(source_type: str, random: CounterRandom) -> dict[str, Any]:
    """Return a question about a colour, a statement about the first of two images, or a classified image."""
    if source_type == "statements":
        first, second = ("red", "blue") if random.uniform() < 0.5 else ("blue", "red")
        is_true, images = random.uniform() < 0.5, [_image(colour, random) for colour in (first, second)]
        sentence = f"the first picture is {first if is_true else second}"
        record: dict[str, Any] = {"sentence": sentence, "label": is_true, "id": f"drawn-{random.integer(1000)}-0-0"}
        return {"0.jpg": images[0], "1.jpg": images[1], "json": json.dumps(record).encode()}
    colour = COLOURS[random.integer(len(COLOURS))]
    if source_type == "labelled":
        return {"jpg": _image(colour, random), "cls": str(COLOURS.index(colour)).encode()}
    record = {"question": "what colour are the shapes?", "question_id": random.integer(10**6)}
    record |= {"answers": {colour: 1.0, f"dark {colour}": 0.3}}
    return {"jpg": _image(colour, random), "json": json.dumps(record).encode()}


def image_of_sides() -> bytes:
    """Return an image that is black on the left and white on the right."""
    pixels = np.repeat(np.uint8([0, 255]), SIDE // 2)[None, :, None]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.broadcast_to(pixels, (SIDE, SIDE, 3))), 95, "RGB", "444")


def write_image(path: Path, colour: str) -> Path:
    """Write an image of two shapes of a colour, which is in none of the data sets."""
    path.write_bytes(_image(colour, CounterRandom(hash64("another picture", colour))))
    return path
