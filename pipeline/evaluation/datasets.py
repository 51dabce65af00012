"""The held-out pairs: read in the manifest's order, whole pictures without augmentation, every caption of each.

What is held is small: captions, tokens, ids. Pictures are decoded when they are asked for, and the last of them stay
decoded within a bound; so a source of any size can be evaluated. Ranks share the reading.

Shapes: N images, H x W the model's image size, or the tallest and widest of some pictures where the model reads each in
its own shape, M captions of all images.
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

DECODED_BYTES = 256 * 2**20  # of pictures that stay decoded: all of a small source, and of a large one the last


@dataclass(frozen=True)
class EvalPairs:
    """Pairs as evaluation reads them. Captions of one image stand together, in the images' order."""

    images: Images  # N of them, (H, W, 3) uint8
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
        picture = self.images[number]
        height, width = picture.shape[:2] if self.image_size is None else self.image_size[number].tolist()
        return picture[:height, :width]

    def close(self) -> None:
        """No picture is asked for any more."""
        if isinstance(self.images, StoredImages):
            self.images.close()

    def rows(self) -> list[list[int]]:
        """(M) token ids, [CLS] … [SEP], without padding."""
        return [tokens.ids for tokens in self.tokens]

    def texts(self) -> list[str]:
        """(M) the captions in the order of `tokens`."""
        return [caption for captions in self.captions for caption in captions]

    @staticmethod
    def of_no_pairs(skipped: dict[str, int], digest: str) -> EvalPairs:
        """What stands here for a source that holds something else: no picture, no caption."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return EvalPairs(torch.zeros(0, 0, 0, 3, dtype=torch.uint8), (), (), nothing, nothing, (), skipped, digest)

    def numbers(self) -> list[int]:
        """(M) which of its image's captions each one is, from 0."""
        return [number for captions in self.captions for number in range(len(captions))]


class StoredImages:
    """A source's pictures as the model reads them, decoded when they are asked for.

    Indexed like a tensor (N, H, W, 3): by a number, a slice, or a 1-d tensor of numbers.
    """

    def __init__(self, config: RunConfig, storage: Storage, source: Source):
        self._model, self._shape = config.model, shape_of(config.model)
        self._max_pixels = config.data.max_pixels
        self._slots = sample_refs(source)
        self._reader = SampleReader(storage, {source.url: source}, config.data.loader)
        self._threads = ThreadPoolExecutor(config.data.loader.threads_per_worker, "held-out")
        self._decoded: PrefetchCache[np.ndarray] = PrefetchCache(DECODED_BYTES)
        side = self._shape.canvas if isinstance(self._shape, KeepAspectRatio) else self._shape
        self._bytes = 3 * side**2  # of a picture, at most
        self._places: np.ndarray = np.zeros(0, dtype=np.int64)  # of each picture's sample in the source

    def choose(self, places: Sequence[int]) -> None:
        """From now on the pictures are those of the samples at these places of the source, in this order."""
        self._places = np.asarray(places, dtype=np.int64)

    def decode(self, sample: Sample, place: int) -> np.ndarray:
        """The picture of a sample that was read already, (H, W, 3). Raises BadSample as training does."""
        return self._decoded.get(place, self._bytes, partial(self._resized, sample))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Any) -> Tensor:
        places = self._places[numbers.numpy() if isinstance(numbers, Tensor) else numbers]
        if places.ndim == 0:
            return torch.from_numpy(self._at(int(places)))
        different, where = np.unique(places, return_inverse=True)
        pictures = list(self._threads.map(self._at, different.tolist()))
        return torch.from_numpy(on_one_canvas(pictures)[0])[torch.from_numpy(where)]

    def _at(self, place: int) -> np.ndarray:
        def read() -> np.ndarray:
            return self._resized(self._reader.read(self._slots(place, place + 1)[0]))

        return self._decoded.get(place, self._bytes, read)

    def _resized(self, sample: Sample) -> np.ndarray:
        return resize_for(decode(image_bytes(sample.members), self._max_pixels), self._model)


@dataclass(frozen=True)
class _Pair:
    """What is held of a sample."""

    place: int  # in the source
    key: str
    captions: tuple[str, ...]
    tokens: list[Tokens]
    image_id: int
    size: tuple[int, int]  # of the picture


def load_pairs(
    config: RunConfig,
    storage: Storage,
    source: str,
    limit: int | None,
    tokenizer: Tokenizer,
    max_text_length: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> EvalPairs:
    """The pairs among a source's first `limit` samples. A bad sample is left out and counted, never replaced.

    Every picture is decoded once here, each by one rank, so that what is bad is known before anything is measured.
    Raises ConfigError when the source is unknown or holds no pairs; DataError when no sample can be used, or more are
    bad than `data.max_bad_rate` allows.
    """
    opened = Source(_url_of(config, source), load_manifest(storage, _url_of(config, source)))
    count = int(opened.counts.sum()) if limit is None else min(limit, int(opened.counts.sum()))
    pictures = StoredImages(config, storage, opened)
    span = ranks.shares(count)[ranks.rank]
    parts = run_on_all_ranks(ranks, lambda: _read(opened, storage, span, pictures, tokenizer, max_text_length))
    pairs: list[_Pair] = [pair for share, _ in parts for pair in share]
    skipped = sum((each for _, each in parts), Counter[str]())
    check_skipped(source, len(pairs), skipped, config.data.max_bad_rate)
    pictures.choose([pair.place for pair in pairs])
    per_image = torch.tensor([len(pair.captions) for pair in pairs])
    sizes = torch.tensor([pair.size for pair in pairs], dtype=torch.int64)
    return EvalPairs(
        images=pictures,
        captions=tuple(pair.captions for pair in pairs),
        tokens=tuple(each for pair in pairs for each in pair.tokens),
        caption_of=torch.arange(len(pairs)).repeat_interleave(per_image),
        image_id=torch.tensor([pair.image_id for pair in pairs], dtype=torch.int64),
        keys=tuple(pair.key for pair in pairs),
        skipped=dict(skipped),
        digest=opened.digest,
        image_size=sizes if isinstance(shape_of(config.model), KeepAspectRatio) else None,
    )


def _read(
    source: Source,
    storage: Storage,
    span: tuple[int, int],
    pictures: StoredImages,
    tokenizer: Tokenizer,
    max_text_length: int,
) -> tuple[list[_Pair], Counter[str]]:
    """The pairs at some places of the source, and how many others, by reason."""
    pairs: list[_Pair] = []
    skipped: Counter[str] = Counter()
    for place, sample in enumerate(iter_samples(storage, source, *span), span[0]):
        try:
            with judging("members"):
                captions, tokens = _captions(sample, tokenizer, max_text_length)
                height, width = pictures.decode(sample, place).shape[:2]
        except BadSample as bad:
            skipped[str(bad)] += 1
            continue
        pairs.append(_Pair(place, sample.key, captions, tokens, sample.image_id, (height, width)))
    return pairs, skipped


def _captions(sample: Sample, tokenizer: Tokenizer, max_text_length: int) -> tuple[tuple[str, ...], list[Tokens]]:
    """A pair's captions and their tokens. Raises BadSample as training does, also where a caption has no token."""
    texts = tuple(captions_of(sample.members))
    tokens = tokenizer.encode_batch(texts, max_text_length)
    for text, encoded in zip(texts, tokens, strict=True):
        if len(encoded) <= 2:
            raise BadSample("caption", f"no token is left of {text[:40]!r}")
    return texts, tokens


def _url_of(config: RunConfig, source: str) -> str:
    known = [name for name, each in config.sources.items() if each.type == "pairs"]
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


Annotation = Question | Statement | int  # what a sample of questions, statements or labelled pictures says
T = TypeVar("T")


@dataclass(frozen=True)
class Annotated:
    """One sample, decoded."""

    pictures: tuple[np.ndarray, ...]  # one or two, (H, W, 3) uint8
    tokens: list[int]  # [CLS] … [SEP]; empty for a labelled picture
    annotation: Annotation


class LabelledEvalSet:
    """A source of the run, read as its use says. A bad sample is left out and counted, never replaced.

    `shared` raises DataError when no sample can be used, or more are bad than `data.max_bad_rate` allows.
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
        self.source_type: SourceType = config.sources[source].type
        self.digest = self._opened.digest
        self.samples = 0  # read so far
        self.skipped: Counter[str] = Counter()  # samples left out so far, by reason

    def shared(self, read: Callable[[], T]) -> list[T]:
        """What `read`, which goes once through `batches`, found on each of the ranks: on every one."""
        self.samples, self.skipped = 0, Counter()
        parts = run_on_all_ranks(self._ranks, lambda: (read(), self.samples, self.skipped))
        self.samples = sum(samples for _, samples, _ in parts)
        self.skipped = sum((skipped for _, _, skipped in parts), Counter[str]())
        check_skipped(self._source, self.samples, self.skipped, self._config.data.max_bad_rate)
        return [found for found, _, _ in parts]

    def batches(self, device: torch.device, *heads: Head) -> Iterator[tuple[ForwardInput, list[Any]]]:
        """Passes on a device, with the heads that are wanted, and what their first samples say: this rank's share.

        Every rank gets equally many passes; some may be of no sample.
        """
        turns = list(rank_batches(self._count, self._config.evaluation.batch_size, self._ranks))
        own = [rows for rows, is_own in turns if is_own]
        span = (own[0].start, own[-1].stop) if own else (0, 0)
        samples = iter_samples(self._storage, self._opened, *span)
        for rows, is_own in turns:
            batch = list(self._read(itertools.islice(samples, rows.stop - rows.start))) if is_own else []
            self.samples += len(batch)
            wanted = self._pass(batch or [self._nothing()], heads)
            yield move_inputs(wanted, device), [each.annotation for each in batch]

    def _pass(self, batch: Sequence[Annotated], heads: tuple[Head, ...]) -> ForwardInput:
        rows = [each.tokens for each in batch if each.tokens]
        return collate_inputs([e.pictures for e in batch], rows, self._tokenizer.pad_id, self._config.model, *heads)

    def _nothing(self) -> Annotated:
        """What is read where there is no sample and other ranks read one."""
        shape = shape_of(self._config.model)
        side = shape.shorter if isinstance(shape, KeepAspectRatio) else shape
        picture = np.zeros((side, side, 3), dtype=np.uint8)
        tokens = [] if self.source_type == "labelled" else self._tokenizer.encode("a", self._stage.max_text_length).ids
        return Annotated((picture, picture) if self.source_type == "statements" else (picture,), tokens, 0)

    def _read(self, samples: Iterable[Sample]) -> Iterator[Annotated]:
        for sample in samples:
            try:
                with judging("members"):
                    decoded = self._decoded(sample)
            except BadSample as bad:
                self.skipped[str(bad)] += 1
                continue
            yield decoded

    def _decoded(self, sample: Sample) -> Annotated:
        """Raises BadSample as training does."""
        members = sample.members
        check_members(members, sample.is_duplicate)
        encoded: tuple[bytes, ...] = (
            both_images(members) if self.source_type == "statements" else (image_bytes(members),)
        )
        annotation: Annotation
        if self.source_type == "labelled":
            trains = "classification" in self._stage.objectives
            annotation = class_of(members, self._stage.num_classes if trains else None)
        else:
            annotation = question_of(members) if self.source_type == "questions" else statement_of(members)
        tokens = [] if isinstance(annotation, int) else self._tokens(annotation.text)
        return Annotated(tuple(self._picture(each) for each in encoded), tokens, annotation)

    def _tokens(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, self._stage.max_text_length)
        if len(tokens) <= 2:
            raise BadSample("caption", f"no token is left of {text[:40]!r}")
        return tokens.ids

    def _picture(self, data: bytes) -> np.ndarray:
        return resize_for(decode(data, self._config.data.max_pixels), self._config.model)


def collate_inputs(
    pictures: Sequence[tuple[np.ndarray, ...]],
    rows: Sequence[Sequence[int]],
    pad: int,
    model: TransformerConfig,
    *heads: Head,
) -> ForwardInput:
    """One pass over B rows of no, one or two pictures (resized already) and token ids, if any."""
    text, keep = pad_token_ids(rows, pad) if rows else (None, None)
    images = [_stacked([row[place] for row in pictures], model) for place in range(len(pictures[0]) if pictures else 0)]
    images += [(None, None)] * (2 - len(images))
    (image, size), (second, second_size) = images
    return ForwardInput(
        heads=heads,
        image=image,
        image_size=size,
        second_image=second,
        second_image_size=second_size,
        text=text,
        text_keep=keep,
    )


def move_inputs(one: ForwardInput, device: torch.device) -> ForwardInput:
    """The same pass with its tensors there."""
    members = {name: value for name, value in vars(one).items() if isinstance(value, Tensor)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in members.items()}
    return replace(one, **moved)


def _stacked(pictures: Sequence[np.ndarray], model: TransformerConfig) -> tuple[Tensor | None, Tensor | None]:
    """Pictures as (B, H, W, 3), and (B, 2) their own sizes where the model reads them in their own shapes."""
    if isinstance(shape_of(model), int):
        return torch.from_numpy(np.stack(pictures)), None
    canvases, sizes = on_one_canvas(pictures)
    return torch.from_numpy(canvases), torch.from_numpy(sizes)
