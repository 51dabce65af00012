"""Held-out samples in manifest order, whole and without augmentation: pairs, and annotated (labelled) samples.

Memory is bounded for sources of any size: pairs keep captions, token ids and a bounded cache of decoded images, and
annotated samples one batch at a time. Ranks share the reading. Bad samples are counted and left out, never replaced.

Shapes: N images, M captions of all images, B samples of a batch, H x W the model's image size, or the tallest and
widest image where the model keeps each image's own shape.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, StageConfig, TransformerConfig
from pipeline.data.contents import members as contents
from pipeline.data.contents.images import KeepAspectRatio, decode, on_one_canvas, resize_for, shape_of
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.prefetch import PrefetchCache
from pipeline.data.reading.samples import Sample, SampleReader, iter_samples, sample_refs
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, gathered, rank_batches
from pipeline.models.forward import ForwardInput, Head

DECODED_BYTES = 256 * 2**20  # cache of decoded images: all of a small source, the most recent of a large one
T = TypeVar("T")


class StoredImages:
    """A source's images as the model reads them, decoded on access, and indexed like a tensor (N, H, W, 3)."""

    def __init__(self, config: RunConfig, storage: Storage, source: Source):
        self.positions: np.ndarray = np.zeros(0, dtype=np.int64)  # (N,) of the images' samples in the source
        self._model, self._max_pixels = config.model, config.data.max_pixels
        self._source = source
        self._reader = SampleReader(storage, {source.url: source}, config.data.loader)
        self._threads = ThreadPoolExecutor(config.data.loader.threads_per_worker, "held-out")
        self._decoded: PrefetchCache[np.ndarray] = PrefetchCache(DECODED_BYTES)
        shape = shape_of(config.model)
        self._image_bytes = 3 * (shape.longest if isinstance(shape, KeepAspectRatio) else shape) ** 2  # at most

    def load(self, position: int, sample: Sample | None = None) -> np.ndarray:
        """Return the image (H, W, 3) of a sample, which is read unless given. Raises BadSample as training does."""

        def resized() -> np.ndarray:
            members = (sample or self._reader.read(sample_refs(self._source, [position])[0])).members
            return resize_for(decode(contents.image_bytes(members), self._max_pixels), self._model)

        return self._decoded.get(position, self._image_bytes, resized)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Tensor:
        positions = self.positions[index.numpy() if isinstance(index, Tensor) else index]
        if positions.ndim == 0:
            return torch.from_numpy(self.load(int(positions)).copy())  # it may be read-only
        distinct, inverse = np.unique(positions, return_inverse=True)
        images = list(self._threads.map(self.load, distinct.tolist()))
        return torch.from_numpy(on_one_canvas(images)[0])[torch.from_numpy(inverse)]


Images = Tensor | StoredImages  # (N, H, W, 3) uint8


@dataclass(frozen=True)
class EvalPairs:
    """Held-out pairs. The captions of an image follow each other, in the order of the images."""

    skipped: dict[str, int]  # unusable samples by reason
    digest: str  # of the manifest
    images: Images = field(default_factory=lambda: torch.zeros(0, 0, 0, 3, dtype=torch.uint8))
    captions: tuple[tuple[str, ...], ...] = ()  # of each image
    tokens: tuple[Tokens, ...] = ()  # (M)
    caption_of: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (M,): image of each caption
    image_id: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (N,): equal for copies
    keys: tuple[str, ...] = ()  # (N) keys of the samples in their shards
    image_size: Tensor | None = None  # (N, 2) int64: rows and columns of each canvas that hold the image; None: all
    close: Callable[[], None] = lambda: None  # end the threads that read the images

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Tensor:
        """Return an image (H, W, 3) without the canvas around it."""
        image = self.images[index]
        height, width = image.shape[:2] if self.image_size is None else self.image_size[index].tolist()
        return image[:height, :width]


def load_pairs(
    config: RunConfig,
    storage: Storage,
    source: str,
    limit: int | None,
    tokenizer: Tokenizer,
    max_text_length: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> EvalPairs:
    """Load the pairs among a source's first `limit` samples; one rank decodes each image, so that bad ones are known.

    Raises ConfigError when the source is unknown or has no pairs, DataError as `check_skipped`.
    """
    known = [name for name, section in config.sources.items() if section.type == "pairs"]
    if source not in known:
        problem = "has no pairs" if source in config.sources else "is not a source of this run"
        raise ConfigError(f"evaluation source '{source}' {problem}; sources with pairs: {', '.join(known) or 'none'}")
    url = config.sources[source].shards
    opened = Source(url, load_manifest(storage, url))
    total = int(opened.counts.sum())
    stored = StoredImages(config, storage, opened)
    start, stop = ranks.shares(total if limit is None else min(limit, total))[ranks.rank]

    pairs, skipped = list[tuple[Any, ...]](), Counter[str]()
    with gathered(ranks) as parts:
        for position, sample in enumerate(iter_samples(storage, opened, start, stop), start):
            try:
                with judging("members"):
                    texts = tuple(contents.captions_of(sample.members))
                    encoded = _encode(texts, tokenizer, max_text_length)
                    size = stored.load(position, sample).shape[:2]
                pairs.append((position, sample.key, texts, encoded, sample.image_id, size))
            except BadSample as bad:
                skipped[str(bad)] += 1
        parts.append((pairs, skipped))
    pairs, skipped = list(itertools.chain(*(own for own, _ in parts))), sum((n for _, n in parts), Counter[str]())
    check_skipped(source, len(pairs), skipped, config.data.max_bad_rate)
    positions, keys, captions, tokens, image_ids, sizes = zip(*pairs, strict=True)
    stored.positions = np.array(positions, dtype=np.int64)
    caption_of = torch.arange(len(pairs)).repeat_interleave(torch.tensor(list(map(len, captions))))
    image_size = torch.tensor(sizes) if isinstance(shape_of(config.model), KeepAspectRatio) else None
    return EvalPairs(
        dict(skipped), opened.digest, stored, captions, tuple(itertools.chain(*tokens)), caption_of,
        torch.tensor(image_ids, dtype=torch.int64), keys, image_size, stored.close,
    )  # fmt: skip


def _encode(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[Tokens]:
    """Return the tokens of each text. Raises BadSample as training does."""
    encoded = tokenizer.encode_batch(texts, max_length)
    for text, tokens in zip(texts, encoded, strict=True):
        if len(tokens.ids) <= 2:
            raise BadSample("caption", f"no token is left of {text[:40]!r}")
    return encoded


def check_skipped(source: str, used: int, skipped: Counter[str], max_bad_rate: float) -> None:
    """Raise DataError when no sample was usable, or more were left out than the rate allows."""
    bad = skipped.total()
    if not used or bad > max(1, max_bad_rate * (used + bad)):
        reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3)) or "it is empty"
        raise DataError(
            f"evaluation source '{source}': {bad} of {used + bad} samples are bad: {reasons}. "
            "Repair or rebuild its shards, or raise data.max_bad_rate"
        )


@dataclass(eq=False)
class LabelledEvalSet:
    """A source of questions, statements or labelled images.

    An example has the sample's one or two images (H, W, 3), token ids [CLS] … [SEP] or none, and the annotation: a
    question, a statement or the class of a labelled image.
    """

    config: RunConfig
    storage: Storage
    source: str
    stage: StageConfig
    tokenizer: Tokenizer
    limit: int | None = None
    ranks: Ranks = SINGLE_PROCESS

    def __post_init__(self) -> None:
        self.config, section = self.config.for_stage(self.stage), self.config.sources[self.source]
        self._opened = Source(section.shards, load_manifest(self.storage, section.shards))
        self.type, self.digest = section.type, self._opened.digest
        self.skipped: Counter[str] = Counter()  # unusable samples of the last call of `map_batches`, by reason

    def map_batches(self, head: Head, compute: Callable[[ForwardInput, list[Any]], Iterable[T]]) -> list[T]:
        """Return the results of `compute` for all batches, in order, on every rank.

        `compute` is called with the forward input for a head and the annotations of its first examples, equally often
        on every rank; an input without a sample has one blank example and no annotation. Raises as `check_skipped`.
        """
        config, shape, total = self.config, shape_of(self.config.model), int(self._opened.counts.sum())
        count = total if self.limit is None else min(self.limit, total)
        side = shape.shorter if isinstance(shape, KeepAspectRatio) else shape
        blank_images = (np.zeros((side, side, 3), dtype=np.uint8),) * (2 if self.type == "statements" else 1)
        blank_text = [] if self.type == "labelled" else self.tokenizer.encode("a", self.stage.max_text_length).ids

        skipped, num_samples, results = Counter[str](), 0, list[T]()
        with gathered(self.ranks) as parts:
            turns = list(rank_batches(count, config.evaluation.batch_size, self.ranks))
            own = [rows for rows, is_own in turns if is_own]
            samples = iter_samples(self.storage, self._opened, *((own[0].start, own[-1].stop) if own else (0, 0)))
            for rows, is_own in turns:
                batch = []
                for sample in itertools.islice(samples, rows.stop - rows.start if is_own else 0):
                    try:
                        with judging("members"):
                            batch.append(self._decode(sample))
                    except BadSample as bad:
                        skipped[str(bad)] += 1
                num_samples += len(batch)
                images, token_ids, _ = zip(*(batch or [(blank_images, blank_text, None)]), strict=True)
                texts = [ids for ids in token_ids if ids]
                inputs = collate_inputs(images, texts, self.tokenizer.pad_id, config.model, head)
                results += compute(inputs, [annotation for _, _, annotation in batch])
            parts.append((results, num_samples, skipped))
        self.skipped = sum((reasons for _, _, reasons in parts), Counter[str]())
        check_skipped(self.source, sum(count for _, count, _ in parts), self.skipped, config.data.max_bad_rate)
        return [result for own, _, _ in parts for result in own]

    def _decode(self, sample: Sample) -> tuple[tuple[np.ndarray, ...], list[int], Any]:
        """Return images, token ids and annotation. Raises BadSample for the same samples as training does."""
        members, stage = sample.members, self.stage
        contents.check_members(members, sample.is_duplicate)
        prefixes = contents.BOTH if self.type == "statements" else (("",),)
        encoded = [contents.image_bytes(members, prefix) for prefix in prefixes]
        classes = stage.num_classes if "classification" in stage.objectives else None
        annotation = contents.annotation_of(members, self.type, classes)
        texts = [] if self.type == "labelled" else [annotation.text]
        token_ids = [i for tokens in _encode(texts, self.tokenizer, stage.max_text_length) for i in tokens.ids]
        images = tuple(resize_for(decode(data, self.config.data.max_pixels), self.config.model) for data in encoded)
        return images, token_ids, annotation.label if self.type == "labelled" else annotation


def pad_token_ids(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids (B, L) int64, padded to the longest row, and (B, L) bool, False at padding."""
    text = pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=pad)
    return text, torch.arange(text.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]


def collate_inputs(
    images: Sequence[tuple[np.ndarray, ...]],
    token_ids: Sequence[Sequence[int]],
    pad: int,
    model: TransformerConfig,
    head: Head,
) -> ForwardInput:
    """Collate B examples of zero, one or two resized images, and of token ids if any, into one forward input."""
    text, keep = pad_token_ids(token_ids, pad) if token_ids else (None, None)
    keeps_shape = isinstance(shape_of(model), KeepAspectRatio)
    inputs: dict[str, Any] = {}
    for name, of_examples in zip(("image", "second_image"), zip(*images, strict=True), strict=False):
        canvases, sizes = on_one_canvas(of_examples)
        inputs[name] = torch.from_numpy(canvases)
        if keeps_shape:
            inputs[f"{name}_size"] = torch.from_numpy(sizes)
    return ForwardInput(heads=(head,), text=text, text_keep=keep, **inputs)
