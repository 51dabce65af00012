"""Held-out questions, statements and labelled pictures: read once, in the manifest's order, batch by batch.

Pictures are whole and without augmentation, in the shape that the model reads. Nothing but one batch is held: VQA's
validation pictures alone would be 100 GiB. Ranks share the batches.

Shapes: B samples of a batch, H x W pixels, L tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config.model import TransformerConfig
from pipeline.config.schema import RunConfig, StageConfig, Use
from pipeline.data.contents.images import OwnShape, decode, on_one_canvas, resize_for, shape_of
from pipeline.data.contents.members import check_members, class_of, image_bytes
from pipeline.data.contents.questions import Question, Statement, both_images, question_of, statement_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage
from pipeline.evaluation.held_out import check_skipped
from pipeline.evaluation.ranks import ALONE, Ranks, batches_of, together
from pipeline.evaluation.retrieval import padded
from pipeline.models.forward import ForwardInput, Head

Annotation = Question | Statement | int  # what a sample of questions, statements or labelled pictures says
T = TypeVar("T")


@dataclass(frozen=True)
class Annotated:
    """One sample, decoded."""

    pictures: tuple[np.ndarray, ...]  # one or two, (H, W, 3) uint8
    tokens: list[int]  # [CLS] … [SEP]; empty for a labelled picture
    annotation: Annotation


class AnnotatedSource:
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
        ranks: Ranks = ALONE,
    ):
        self._config, self._storage, self._source = config.for_stage(stage), storage, source
        self._stage, self._tokenizer, self._ranks = stage, tokenizer, ranks
        url = config.sources[source].shards
        self._opened = Source(url, load_manifest(storage, url))
        count = int(self._opened.counts.sum())
        self._count = count if limit is None else min(limit, count)
        self.use: Use = config.sources[source].use
        self.digest = self._opened.digest
        self.samples = 0  # read so far
        self.skipped: Counter[str] = Counter()  # samples left out so far, by reason

    def shared(self, read: Callable[[], T]) -> list[T]:
        """What `read`, which goes once through `batches`, found on each of the ranks: on every one."""
        self.samples, self.skipped = 0, Counter()
        parts = together(self._ranks, lambda: (read(), self.samples, self.skipped))
        self.samples = sum(samples for _, samples, _ in parts)
        self.skipped = sum((skipped for _, _, skipped in parts), Counter[str]())
        check_skipped(self._source, self.samples, self.skipped, self._config.data.max_bad_rate)
        return [found for found, _, _ in parts]

    def batches(self, device: torch.device, *heads: Head) -> Iterator[tuple[ForwardInput, list[Any]]]:
        """Passes on a device, with the heads that are wanted, and what their first samples say: this rank's share.

        Every rank gets equally many passes; some may be of no sample.
        """
        turns = list(batches_of(self._count, self._config.evaluation.batch, self._ranks))
        own = [rows for rows, is_own in turns if is_own]
        span = (own[0].start, own[-1].stop) if own else (0, 0)
        samples = iter_samples(self._storage, self._opened, *span)
        for rows, is_own in turns:
            batch = list(self._read(itertools.islice(samples, rows.stop - rows.start))) if is_own else []
            self.samples += len(batch)
            wanted = self._pass(batch or [self._nothing()], heads)
            yield on_device(wanted, device), [each.annotation for each in batch]

    def _pass(self, batch: Sequence[Annotated], heads: tuple[Head, ...]) -> ForwardInput:
        rows = [each.tokens for each in batch if each.tokens]
        return pass_over([e.pictures for e in batch], rows, self._tokenizer.pad_id, self._config.model, *heads)

    def _nothing(self) -> Annotated:
        """What is read where there is no sample and other ranks read one."""
        shape = shape_of(self._config.model)
        side = shape.shorter if isinstance(shape, OwnShape) else shape
        picture = np.zeros((side, side, 3), dtype=np.uint8)
        tokens = [] if self.use == "labelled" else self._tokenizer.encode("a", self._stage.max_text).ids
        return Annotated((picture, picture) if self.use == "statements" else (picture,), tokens, 0)

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
        encoded: tuple[bytes, ...] = both_images(members) if self.use == "statements" else (image_bytes(members),)
        annotation: Annotation
        if self.use == "labelled":
            trains = "classification" in self._stage.objectives
            annotation = class_of(members, self._stage.classes if trains else None)
        else:
            annotation = question_of(members) if self.use == "questions" else statement_of(members)
        tokens = [] if isinstance(annotation, int) else self._tokens(annotation.text)
        return Annotated(tuple(self._picture(each) for each in encoded), tokens, annotation)

    def _tokens(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, self._stage.max_text)
        if len(tokens) <= 2:
            raise BadSample("caption", f"no token is left of {text[:40]!r}")
        return tokens.ids

    def _picture(self, data: bytes) -> np.ndarray:
        return resize_for(decode(data, self._config.data.max_pixels), self._config.model)


def pass_over(
    pictures: Sequence[tuple[np.ndarray, ...]],
    rows: Sequence[Sequence[int]],
    pad: int,
    model: TransformerConfig,
    *heads: Head,
) -> ForwardInput:
    """One pass over B rows of no, one or two pictures (resized already) and token ids, if any."""
    text, keep = padded(rows, pad) if rows else (None, None)
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


def on_device(one: ForwardInput, device: torch.device) -> ForwardInput:
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
