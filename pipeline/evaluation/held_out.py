"""The held-out pairs: read in the manifest's order, whole pictures without augmentation, every caption of each.

Shapes: N images, H x W the model's image size, or the tallest and widest picture where it reads each in its own
shape, M captions of all images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.images import OwnShape, decode, on_one_canvas, resize, shape_of
from pipeline.data.contents.members import captions_of, image_bytes, image_id_of
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import Sample, samples_of_source
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage


@dataclass(frozen=True)
class HeldOut:
    """Pairs as evaluation reads them. Captions of one image stand together, in the images' order."""

    images: Tensor  # (N, H, W, 3) uint8
    captions: tuple[tuple[str, ...], ...]  # of each image
    tokens: tuple[Tokens, ...]  # (M) of every caption
    caption_of: Tensor  # (M,) int64: the image of each caption
    image_id: Tensor  # (N,) int64: equal where two pictures show the same
    keys: tuple[str, ...]  # (N) the samples' keys in their shards
    skipped: dict[str, int]  # samples left out, by reason
    digest: str  # of the manifest they were read from
    image_size: Tensor | None = None  # (N, 2) int64: rows and columns of each canvas that are picture; None: all

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, number: int) -> Tensor:
        """(H, W, 3) without the canvas around it, for the eye."""
        height, width = self.images.shape[1:3] if self.image_size is None else self.image_size[number].tolist()
        return self.images[number, :height, :width]

    def rows(self) -> list[list[int]]:
        """(M) token ids, [CLS] … [SEP], without padding."""
        return [tokens.ids for tokens in self.tokens]

    def texts(self) -> list[str]:
        """(M) the captions in the order of `tokens`."""
        return [caption for captions in self.captions for caption in captions]

    @staticmethod
    def of_no_pairs(skipped: dict[str, int], digest: str) -> HeldOut:
        """What stands here for a source that holds something else: no picture, no caption."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return HeldOut(torch.zeros(0, 0, 0, 3, dtype=torch.uint8), (), (), nothing, nothing, (), skipped, digest)

    def numbers(self) -> list[int]:
        """(M) which of its image's captions each one is, from 0."""
        return [number for captions in self.captions for number in range(len(captions))]


def load_pairs(
    config: RunConfig, storage: Storage, source: str, limit: int | None, tokenizer: Tokenizer, max_text: int
) -> HeldOut:
    """At most `limit` pairs of a source of the run. A bad sample is left out and counted, never replaced.

    Raises ConfigError when the source is unknown or holds no pairs; DataError when no sample can be used, or more are
    bad than `data.max_bad_rate` allows.
    """
    url = _url_of(config, source)
    images: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    tokens: list[Tokens] = []
    ids: list[int] = []
    keys: list[str] = []
    skipped: Counter[str] = Counter()
    for sample in samples_of_source(storage, url):
        if limit is not None and len(keys) >= limit:
            break
        try:
            texts, encoded = _captions(sample, tokenizer, max_text)
            picture = decode(image_bytes(sample.members), config.data.max_pixels)
        except BadSample as bad:
            skipped[str(bad)] += 1
            continue
        images.append(resize(picture, shape_of(config.model)))
        captions.append(texts)
        tokens.extend(encoded)
        ids.append(image_id_of(sample.members))
        keys.append(sample.key)
    check_skipped(source, len(keys), skipped, config.data.max_bad_rate)
    canvases, sizes = on_one_canvas(images)
    return HeldOut(
        images=torch.from_numpy(canvases),
        captions=tuple(captions),
        tokens=tuple(tokens),
        caption_of=torch.arange(len(keys)).repeat_interleave(torch.tensor([len(texts) for texts in captions])),
        image_id=torch.tensor(ids, dtype=torch.int64),
        keys=tuple(keys),
        skipped=dict(skipped),
        digest=load_manifest(storage, url).digest,
        image_size=torch.from_numpy(sizes) if isinstance(shape_of(config.model), OwnShape) else None,
    )


def _captions(sample: Sample, tokenizer: Tokenizer, max_text: int) -> tuple[tuple[str, ...], list[Tokens]]:
    """A pair's captions and their tokens. Raises BadSample as training does, also where a caption has no token."""
    texts = tuple(captions_of(sample.members))
    tokens = tokenizer.encode_batch(texts, max_text)
    for text, encoded in zip(texts, tokens, strict=True):
        if len(encoded) <= 2:
            raise BadSample("caption", f"no token is left of {text[:40]!r}")
    return texts, tokens


def _url_of(config: RunConfig, source: str) -> str:
    known = [name for name, each in config.sources.items() if each.use == "pairs"]
    if source not in known:
        problem = "holds no pairs" if source in config.sources else "is no source of this run"
        raise ConfigError(f"evaluation source '{source}' {problem}; sources with pairs: {', '.join(known) or 'none'}")
    return config.sources[source].shards


def check_skipped(source: str, used: int, skipped: Counter[str], max_bad_rate: float) -> None:
    """Raises DataError when no sample was used, or more were left out than the rate allows."""
    bad = sum(skipped.values())
    if used and bad <= max(1, max_bad_rate * (used + bad)):
        return
    reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3)) or "it is empty"
    raise DataError(
        f"evaluation source '{source}': {bad} of {used + bad} samples are bad: {reasons}. "
        "Mend or rebuild its shards, or raise data.max_bad_rate"
    )
