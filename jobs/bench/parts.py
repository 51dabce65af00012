"""What each part of preparing a row costs alone: one thread, the same samples, our own functions, no loader.

Parts run one after the other over a few dozen samples at a time, as a loader without any overhead would call them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline.data.contents.images import decode, random_resized_crop
from pipeline.data.contents.members import captions_of, image_bytes
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.examples.augment import rand_augment
from pipeline.data.examples.masking import Masked, mask_whole_words
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import Storage

if TYPE_CHECKING:
    from jobs.bench.contender import Job

PARTS = ("read", "decode", "crop", "augment", "tokenise", "mask", "collate")
CORE = ("decode", "crop", "augment", "tokenise")  # what no loader can do without


class _Stopwatch:
    """CPU milliseconds of this thread by part."""

    def __init__(self) -> None:
        self.milliseconds = dict.fromkeys((*PARTS, "jpeg"), 0.0)

    def __call__(self, part: str, function: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = function()
        self.milliseconds[part] += 1000 * (time.thread_time() - started)
        return result


def measure_parts(job: Job) -> dict[str, Any]:
    """{"parts": milliseconds per sample by part, "decode_limit": simplejpeg's own images per second}."""
    storage, watch = Storage(), _Stopwatch()
    tokenizer = Tokenizer.load(storage, job.vocabulary)
    samples = _endless(storage, job.shards)
    _measure_batch(job, _Stopwatch(), samples, tokenizer)
    batches = -(-job.samples // job.batch)
    for _ in range(batches):
        _measure_batch(job, watch, samples, tokenizer)
    counted = batches * job.batch
    parts = {part: watch.milliseconds[part] / counted for part in PARTS}
    return {"parts": parts, "decode_limit": 1000 * counted / watch.milliseconds["jpeg"]}


def _endless(storage: Storage, url: str) -> Iterator[Sample]:
    while True:
        yield from iter_samples(storage, url)


def _measure_batch(job: Job, watch: _Stopwatch, samples: Iterator[Sample], tokenizer: Tokenizer) -> None:
    config, stage = job.config, job.config.stages[0]
    size, augmenting = config.model.image_size, config.data.augment
    read: list[Sample] = watch("read", lambda: list(itertools.islice(samples, job.batch)))
    data = [image_bytes(sample.members) for sample in read]
    captions = [captions_of(sample.members)[0] for sample in read]
    randoms = [CounterRandom(hash64("bench", sample.uid)) for sample in read]
    watch("jpeg", lambda: [simplejpeg.decode_jpeg(each, "RGB") for each in data if each[:2] == b"\xff\xd8"])
    pictures = watch("decode", lambda: [decode(each, config.data.max_pixels) for each in data])
    crops = watch(
        "crop",
        lambda: [
            random_resized_crop(picture, size, augmenting.crop_scale, each)
            for picture, each in zip(pictures, randoms, strict=True)
        ],
    )
    rows = watch(
        "augment",
        lambda: [
            rand_augment(_flipped(crop, each), augmenting.num_ops, augmenting.magnitude, each)
            for crop, each in zip(crops, randoms, strict=True)
        ],
    )
    tokens = watch("tokenise", lambda: tokenizer.encode_batch(captions, stage.max_text_length))
    masks = watch(
        "mask",
        lambda: [
            mask_whole_words(each, random, stage.masking.mlm_probability, stage.masking.whole_word, tokenizer)
            for each, random in zip(tokens, randoms, strict=True)
        ],
    )
    watch("collate", lambda: _collate(rows, tokens, masks))


def _flipped(image: np.ndarray, random: CounterRandom) -> np.ndarray:
    return cv2.flip(image, 1) if random.uniform() < 0.5 else image


def _collate(rows: Sequence[np.ndarray], tokens: Sequence[Tokens], masks: Sequence[Masked]) -> list[torch.Tensor]:
    """The rows' copies in one tensor each; texts padded to the longest."""
    image = np.empty((len(rows), *rows[0].shape), dtype=np.uint8)
    for place, row in enumerate(rows):
        image[place] = row
    texts = [np.array(each.ids, dtype=np.int64) for each in tokens]
    columns = (texts, [m.ids for m in masks], [m.positions for m in masks], [m.labels for m in masks])
    return [torch.from_numpy(image), *(_padded(column) for column in columns)]


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
