"""Held-out samples in manifest order, whole and without augmentation: pairs, and annotated (labelled) samples.

Memory is bounded for sources of any size: pairs keep captions, token ids and a bounded cache of decoded images, and
annotated samples one batch at a time. Ranks share the reading.

Shapes: N images, M captions of all images, B samples of a batch, L tokens, H x W the model's image size, or the tallest
and widest image where the model keeps each image's own shape.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.contents.images import KeepAspectRatio, decode, on_one_canvas, resize_for, shape_of
from pipeline.data.contents.members import captions_of, check_members, class_of, image_bytes
from pipeline.data.contents.questions import Question, Statement, both_images, question_of, statement_of
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.prefetch import PrefetchCache
from pipeline.data.reading.samples import Sample, SampleReader, iter_samples, sample_refs
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, rank_batches, run_on_all_ranks
from pipeline.evaluation.retrieval import Images, pad_token_ids
from pipeline.models.forward import ForwardInput, Head

DECODED_BYTES = 256 * 2**20  # cache of decoded images: all of a small source, the most recent of a large one
Annotation = Question | Statement | int  # of a question, a statement or a labelled image
T = TypeVar("T")


@dataclass(frozen=True)
class EvalPairs:
    """Held-out pairs. The captions of an image follow each other, in the order of the images."""

    images: Images  # (N, H, W, 3) uint8
    captions: tuple[tuple[str, ...], ...]  # of each image
    tokens: tuple[Tokens, ...]  # (M)
    caption_of: Tensor  # (M,) int64: the image of each caption
    image_id: Tensor  # (N,) int64: equal for copies of the same image
    keys: tuple[str, ...]  # (N) keys of the samples in their shards
    skipped: dict[str, int]  # unusable samples by reason
    digest: str  # of the manifest
    image_size: Tensor | None = None  # (N, 2) int64: rows and columns of each canvas that hold the image; None: all

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Tensor:
        """Return an image (H, W, 3) without the canvas around it."""
        image = self.images[index]
        height, width = image.shape[:2] if self.image_size is None else self.image_size[index].tolist()
        return image[:height, :width]

    def close(self) -> None:
        if isinstance(self.images, StoredImages):
            self.images.close()

    def token_ids(self) -> list[list[int]]:
        """Return the token ids of all M captions, [CLS] … [SEP], without padding."""
        return [tokens.ids for tokens in self.tokens]

    def texts(self) -> list[str]:
        """Return all M captions."""
        return [caption for captions in self.captions for caption in captions]

    def caption_numbers(self) -> list[int]:
        """Return for all M captions the number among the captions of their image, from 0."""
        return [number for captions in self.captions for number in range(len(captions))]

    @staticmethod
    def empty(skipped: dict[str, int], digest: str) -> EvalPairs:
        """Return no pairs, for the results of a source without pairs."""
        none = torch.zeros(0, dtype=torch.int64)
        return EvalPairs(torch.zeros(0, 0, 0, 3, dtype=torch.uint8), (), (), none, none, (), skipped, digest)


class StoredImages:
    """A source's images as the model reads them, decoded on access.

    Indexed like a tensor (N, H, W, 3): by a number, a slice, or a 1-d tensor of numbers.
    """

    def __init__(self, config: RunConfig, storage: Storage, source: Source):
        self._model, self._max_pixels = config.model, config.data.max_pixels
        self._refs = sample_refs(source)
        self._reader = SampleReader(storage, {source.url: source}, config.data.loader)
        self._threads = ThreadPoolExecutor(config.data.loader.threads_per_worker, "held-out")
        self._decoded: PrefetchCache[np.ndarray] = PrefetchCache(DECODED_BYTES)
        shape = shape_of(config.model)
        self._image_bytes = 3 * (shape.canvas if isinstance(shape, KeepAspectRatio) else shape) ** 2  # at most
        self._positions: np.ndarray = np.zeros(0, dtype=np.int64)  # of each image's sample in the source

    def select(self, positions: Sequence[int]) -> None:
        """Make the images those of the samples at these positions of the source, in this order."""
        self._positions = np.asarray(positions, dtype=np.int64)

    def decode(self, sample: Sample, position: int) -> np.ndarray:
        """Return the image (H, W, 3) of a sample that was read already. Raises BadSample as training does."""
        return self._decoded.get(position, self._image_bytes, partial(self._resized, sample))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Tensor:
        positions = self._positions[index.numpy() if isinstance(index, Tensor) else index]
        if positions.ndim == 0:
            return torch.from_numpy(self._load(int(positions)))
        distinct, inverse = np.unique(positions, return_inverse=True)
        images = list(self._threads.map(self._load, distinct.tolist()))
        return torch.from_numpy(on_one_canvas(images)[0])[torch.from_numpy(inverse)]

    def _load(self, position: int) -> np.ndarray:
        def read() -> np.ndarray:
            return self._resized(self._reader.read(self._refs(position, position + 1)[0]))

        return self._decoded.get(position, self._image_bytes, read)

    def _resized(self, sample: Sample) -> np.ndarray:
        return resize_for(decode(image_bytes(sample.members), self._max_pixels), self._model)


@dataclass(frozen=True)
class _Pair:
    """One image with its captions, without pixels."""

    position: int  # in the source
    key: str
    captions: tuple[str, ...]
    tokens: list[Tokens]
    image_id: int
    size: tuple[int, int]


def load_pairs(
    config: RunConfig,
    storage: Storage,
    source: str,
    limit: int | None,
    tokenizer: Tokenizer,
    max_text_length: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> EvalPairs:
    """Load the pairs among a source's first `limit` samples. Bad samples are counted and left out, never replaced.

    Each image is decoded once here, by one rank, so that all bad samples are known before anything is measured. Raises
    ConfigError when the source is unknown or has no pairs, DataError when no sample is usable, or more are bad than
    `data.max_bad_rate` allows.
    """
    known = [name for name, section in config.sources.items() if section.type == "pairs"]
    if source not in known:
        problem = "has no pairs" if source in config.sources else "is not a source of this run"
        raise ConfigError(f"evaluation source '{source}' {problem}; sources with pairs: {', '.join(known) or 'none'}")
    url = config.sources[source].shards
    opened = Source(url, load_manifest(storage, url))
    total = int(opened.counts.sum())
    images = StoredImages(config, storage, opened)
    start, stop = ranks.shares(total if limit is None else min(limit, total))[ranks.rank]

    def read() -> tuple[list[_Pair], Counter[str]]:
        pairs: list[_Pair] = []
        skipped: Counter[str] = Counter()
        for position, sample in enumerate(iter_samples(storage, opened, start, stop), start):
            try:
                with judging("members"):
                    texts = tuple(captions_of(sample.members))
                    tokens = tokenizer.encode_batch(texts, max_text_length)
                    for text, encoded in zip(texts, tokens, strict=True):
                        if len(encoded) <= 2:
                            raise BadSample("caption", f"no token is left of {text[:40]!r}")
                    height, width = images.decode(sample, position).shape[:2]
            except BadSample as bad:
                skipped[str(bad)] += 1
                continue
            pairs.append(_Pair(position, sample.key, texts, tokens, sample.image_id, (height, width)))
        return pairs, skipped

    parts = run_on_all_ranks(ranks, read)
    pairs: list[_Pair] = [pair for own, _ in parts for pair in own]
    skipped = sum((counts for _, counts in parts), Counter[str]())
    check_skipped(source, len(pairs), skipped, config.data.max_bad_rate)
    images.select([pair.position for pair in pairs])
    per_image = torch.tensor([len(pair.captions) for pair in pairs])
    sizes = torch.tensor([pair.size for pair in pairs], dtype=torch.int64)
    return EvalPairs(
        images=images,
        captions=tuple(pair.captions for pair in pairs),
        tokens=tuple(tokens for pair in pairs for tokens in pair.tokens),
        caption_of=torch.arange(len(pairs)).repeat_interleave(per_image),
        image_id=torch.tensor([pair.image_id for pair in pairs], dtype=torch.int64),
        keys=tuple(pair.key for pair in pairs),
        skipped=dict(skipped),
        digest=opened.digest,
        image_size=sizes if isinstance(shape_of(config.model), KeepAspectRatio) else None,
    )


def check_skipped(source: str, used: int, skipped: Counter[str], max_bad_rate: float) -> None:
    """Raise DataError when no sample was usable, or more were left out than the rate allows."""
    bad = sum(skipped.values())
    if used and bad <= max(1, max_bad_rate * (used + bad)):
        return
    reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3)) or "it is empty"
    raise DataError(
        f"evaluation source '{source}': {bad} of {used + bad} samples are bad: {reasons}. "
        "Repair or rebuild its shards, or raise data.max_bad_rate"
    )


@dataclass(frozen=True)
class LabelledExample:
    """A decoded question, statement or labelled image."""

    images: tuple[np.ndarray, ...]  # one or two, (H, W, 3) uint8
    token_ids: list[int]  # [CLS] … [SEP]; empty for a labelled image
    annotation: Annotation


class LabelledEvalSet:
    """A source of questions, statements or labelled images. Bad samples are counted and left out, never replaced.

    `map_ranks` raises DataError when no sample is usable, or more are bad than `data.max_bad_rate` allows.
    """

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        source: str,
        stage: StageConfig,
        tokenizer: Tokenizer,
        limit: int | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ):
        self._config, self._storage, self._source = config.for_stage(stage), storage, source
        self._stage, self._tokenizer, self._ranks = stage, tokenizer, ranks
        url = config.sources[source].shards
        self._opened = Source(url, load_manifest(storage, url))
        count = int(self._opened.counts.sum())
        self._count = count if limit is None else min(limit, count)
        self.type: SourceType = config.sources[source].type
        self.digest = self._opened.digest
        self.samples = 0  # read so far
        self.skipped: Counter[str] = Counter()  # unusable samples so far, by reason

    def map_ranks(self, read: Callable[[], T]) -> list[T]:
        """Call `read`, which iterates `batches` once, on every rank, and return all ranks' results on each."""
        self.samples, self.skipped = 0, Counter()
        parts = run_on_all_ranks(self._ranks, lambda: (read(), self.samples, self.skipped))
        self.samples = sum(samples for _, samples, _ in parts)
        self.skipped = sum((skipped for _, _, skipped in parts), Counter[str]())
        check_skipped(self._source, self.samples, self.skipped, self._config.data.max_bad_rate)
        return [result for result, _, _ in parts]

    def batches(self, device: torch.device, *heads: Head) -> Iterator[tuple[ForwardInput, list[Any]]]:
        """Yield this rank's forward inputs on `device` with the annotations of their first examples.

        Every rank gets equally many inputs; an input without a sample has one blank example and no annotation.
        """
        turns = list(rank_batches(self._count, self._config.evaluation.batch_size, self._ranks))
        own = [rows for rows, is_own in turns if is_own]
        samples = iter_samples(self._storage, self._opened, *((own[0].start, own[-1].stop) if own else (0, 0)))
        for rows, is_own in turns:
            batch = list(self._decode(itertools.islice(samples, rows.stop - rows.start))) if is_own else []
            self.samples += len(batch)
            examples = batch or [self._blank()]
            token_ids = [example.token_ids for example in examples if example.token_ids]
            images = [example.images for example in examples]
            forward_input = collate_inputs(images, token_ids, self._tokenizer.pad_id, self._config.model, *heads)
            yield move_inputs(forward_input, device), [example.annotation for example in batch]

    def _blank(self) -> LabelledExample:
        """Return the example for a forward without a sample, where other ranks have one."""
        shape = shape_of(self._config.model)
        side = shape.shorter if isinstance(shape, KeepAspectRatio) else shape
        image = np.zeros((side, side, 3), dtype=np.uint8)
        token_ids = [] if self.type == "labelled" else self._tokenizer.encode("a", self._stage.max_text_length).ids
        return LabelledExample((image, image) if self.type == "statements" else (image,), token_ids, 0)

    def _decode(self, samples: Iterable[Sample]) -> Iterator[LabelledExample]:
        for sample in samples:
            try:
                with judging("members"):
                    example = self._decode_sample(sample)
            except BadSample as bad:
                self.skipped[str(bad)] += 1
                continue
            yield example

    def _decode_sample(self, sample: Sample) -> LabelledExample:
        """Raise BadSample for the same samples as training does."""
        members = sample.members
        check_members(members, sample.is_duplicate)
        encoded: tuple[bytes, ...] = both_images(members) if self.type == "statements" else (image_bytes(members),)
        annotation: Annotation
        token_ids: list[int] = []
        if self.type == "labelled":
            trains = "classification" in self._stage.objectives
            annotation = class_of(members, self._stage.num_classes if trains else None)
        else:
            annotation = question_of(members) if self.type == "questions" else statement_of(members)
            token_ids = self._tokenizer.encode(annotation.text, self._stage.max_text_length).ids
            if len(token_ids) <= 2:
                raise BadSample("caption", f"no token is left of {annotation.text[:40]!r}")
        images = tuple(resize_for(decode(data, self._config.data.max_pixels), self._config.model) for data in encoded)
        return LabelledExample(images, token_ids, annotation)


def collate_inputs(
    images: Sequence[tuple[np.ndarray, ...]],
    token_ids: Sequence[Sequence[int]],
    pad: int,
    model: TransformerConfig,
    *heads: Head,
) -> ForwardInput:
    """Collate B examples of zero, one or two resized images, and of token ids if any, into one forward input."""
    text, keep = pad_token_ids(token_ids, pad) if token_ids else (None, None)
    stacked: list[tuple[Tensor | None, Tensor | None]] = []
    for number in range(len(images[0]) if images else 0):
        arrays = [example[number] for example in images]
        if isinstance(shape_of(model), int):
            stacked.append((torch.from_numpy(np.stack(arrays)), None))
        else:
            canvases, sizes = on_one_canvas(arrays)
            stacked.append((torch.from_numpy(canvases), torch.from_numpy(sizes)))
    stacked += [(None, None)] * (2 - len(stacked))
    (image, size), (second, second_size) = stacked
    return ForwardInput(
        heads=heads,
        image=image,
        image_size=size,
        second_image=second,
        second_image_size=second_size,
        text=text,
        text_keep=keep,
    )


def move_inputs(forward_input: ForwardInput, device: torch.device) -> ForwardInput:
    """Return the same input with its tensors on `device`."""
    members = {name: value for name, value in vars(forward_input).items() if isinstance(value, Tensor)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in members.items()}
    return replace(forward_input, **moved)
