"""One rank's rows from the plan: read, choose a caption, tokenise, mask, decode and augment, each where it belongs.

What a row holds is decided by its step and place alone (contract C1). A bad sample's place is taken by a good
candidate of the same window, drawn by a hash, so that a replacement too is the same for every reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import cv2
import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.augment import augment, mentions_side
from pipeline.data.cache import NodeCache
from pipeline.data.images import decode
from pipeline.data.masking import mask_patches, mask_whole_words
from pipeline.data.members import captions_of, check_members, image_bytes
from pipeline.data.plan import Buckets, Plan, PlanSource, Slot, rank_slice
from pipeline.data.quarantine import BadRecord, BadSample
from pipeline.data.randomness import CounterRandom, hash64, sample_random
from pipeline.data.row_buffer import RowBuffer, RowLayout, Wants
from pipeline.data.samples import Sample, SampleReader
from pipeline.data.sources import Source
from pipeline.data.storage import Storage
from pipeline.data.text import Tokenizer, Tokens

MAX_TRIES = 16  # candidates to replace one bad sample
IGNORED = -100  # the label of a padded masked place


@dataclass(frozen=True)
class RowTask:
    """Everything that decides the rows of some places of a stage's batches. Picklable: a loader process gets one."""

    config: RunConfig
    stage: StageConfig
    tokenizer: Tokenizer
    sources: dict[str, Source]
    places: range  # of every global batch

    @property
    def wants(self) -> Wants:
        return Wants.of(self.config, self.stage)

    @property
    def seed(self) -> int:
        """Stages that read one source see it in different orders."""
        return hash64(self.config.seed, self.stage.name)

    @property
    def layout(self) -> RowLayout:
        model, stage = self.config.model, self.stage
        patches = len(mask_patches(model.num_patches, stage.masking.patches, CounterRandom(0)))
        return RowLayout.of(self.wants, len(self.places), model.image_size, stage.max_text, patches)

    def split(self, parts: int) -> list[RowTask]:
        """The task in contiguous parts, each of whole lanes as far as may be; at most one part a place."""
        count = min(parts, len(self.places))
        slices = [rank_slice(len(self.places), part, count) for part in range(count)]
        return [replace(self, places=self.places[part.start : part.stop]) for part in slices]

    def plan(self, reader: SampleReader | None = None) -> Plan:
        """The stage's order. Without a reader the order of buckets is not known, only their digest."""
        config, stage = self.config, self.stage
        sources = {
            name: PlanSource(source.counts, stage.sources[name], f"{config.sources[name].use} {source.digest}")
            for name, source in self.sources.items()
        }
        buckets = None
        if stage.buckets is not None:
            buckets = Buckets(stage.buckets.batches, _lengths(reader, stage.buckets.by))
        return Plan(
            sources,
            lanes=config.data.lanes,
            window=config.data.window,
            seed=self.seed,
            batch=stage.batch,
            extra=self._recipe(),
            buckets=buckets,
        )

    def _recipe(self) -> list[str]:
        """Everything besides the order that decides what a row contains."""
        config, stage, wants = self.config, self.stage, self.wants
        return [
            json.dumps(asdict(wants), sort_keys=True),
            config.data.augment.model_dump_json(),
            stage.masking.model_dump_json(),
            f"pixels {config.data.max_pixels} side {config.model.image_size} patches {config.model.num_patches}",
            f"text {stage.max_text} vocabulary {self.tokenizer.digest}" if wants.text else "no text",
            f"buckets by {stage.buckets.by}" if stage.buckets else "no buckets",
        ]


@dataclass(frozen=True)
class _Draft:
    """A sample that is good as far as can be told without decoding it, and the caption drawn for it."""

    slot: Slot
    sample: Sample
    caption: str


class RowMaker:
    """Makes the rows of a task. Threads may share one; `close` ends what reads ahead."""

    def __init__(self, task: RowTask, storage: Storage):
        cv2.setNumThreads(0)  # rows are the unit of parallel work; OpenCV's own threads would only contend
        settings = task.config.data.cache
        cache = NodeCache(settings.folder, settings.max_bytes) if settings.folder else None
        self._task, self._wants, self._seed = task, task.wants, task.seed
        self._numbers = {name: number for number, name in enumerate(sorted(task.sources))}
        self._reader = SampleReader(storage, task.sources, task.config.data.loader, cache)
        self.plan = task.plan(self._reader)

    def begin(self, step: int) -> None:
        """Starts reading ahead of `step`."""
        self._reader.follow(lambda later: self.plan.slots(later, self._task.places), step)

    def reached(self, step: int) -> None:
        """All rows of `step` are made: what only they needed need not be kept."""
        self._reader.reached(step)

    def close(self) -> None:
        self._reader.close()

    def make(self, step: int, places: range, buffer: RowBuffer, first: int) -> list[BadRecord]:
        """Writes the rows of `places` into the buffer, whose row 0 is place `first`; returns what had to be replaced.

        Raises DataError or StorageError; a bad sample raises nothing.
        """
        bad: list[BadRecord] = []
        drafts: dict[int, _Draft] = {}
        for place, slot in zip(places, self.plan.slots(step, places), strict=True):
            sample = self._reader.read(slot)
            try:
                drafts[place] = self._draft(slot, sample)
            except BadSample as error:
                bad.append(self._replace(step, place, buffer, place - first, _record(error, sample, slot, step, place)))
        for (place, draft), tokens in zip(drafts.items(), self._encode(list(drafts.values())), strict=True):
            try:
                self._write(draft, tokens, buffer, place - first)
            except BadSample as error:
                record = _record(error, draft.sample, draft.slot, step, place)
                bad.append(self._replace(step, place, buffer, place - first, record))
        return bad

    def _replace(self, step: int, place: int, buffer: RowBuffer, row: int, bad: BadRecord) -> BadRecord:
        for attempt in range(MAX_TRIES):
            slot = self.plan.replacement(step, place, attempt)
            sample = self._reader.read(slot)
            try:
                draft = self._draft(slot, sample)
                self._write(draft, self._encode([draft])[0], buffer, row)
            except BadSample:
                continue  # counted in the place that planned it
            return bad.replaced_with(sample.key)
        raise DataError(
            f"source '{bad.source}': {bad.key} in {bad.shard} is bad ({bad.stage}: {bad.reason}), and so were "
            f"{MAX_TRIES} candidates around it. The shards do not hold what `use` says, or were built wrongly: "
            "look at them with mome shards check"
        )

    def _draft(self, slot: Slot, sample: Sample) -> _Draft:
        """Raises BadSample."""
        check_members(sample.members, sample.is_duplicate)
        if not self._wants.text:
            return _Draft(slot, sample, "")
        captions = captions_of(sample.members)
        return _Draft(slot, sample, captions[self._random(slot, sample, "caption").integer(len(captions))])

    def _encode(self, drafts: Sequence[_Draft]) -> Sequence[Tokens | None]:
        """One call for all texts: the tokenizer's own loop is not Python's."""
        if not self._wants.text:
            return [None] * len(drafts)
        return self._task.tokenizer.encode_batch([draft.caption for draft in drafts], self._task.stage.max_text)

    def _write(self, draft: _Draft, tokens: Tokens | None, buffer: RowBuffer, row: int) -> None:
        """Raises BadSample. Texts come first: they cost little, and a missing one spares the decoding."""
        sample, slot = draft.sample, draft.slot
        if tokens is not None:
            self._write_text(draft, tokens, buffer, row)
        if self._wants.image:
            data = self._task.config.data
            picture = decode(image_bytes(sample.members), data.max_pixels)
            allow_flip = not (data.augment.flip_spares_sides and mentions_side(draft.caption))
            random, size = self._random(slot, sample, "augment"), self._task.config.model.image_size
            buffer["image"][row] = augment(picture, data.augment, size, random, allow_flip)
        if self._wants.masked_image:
            fraction, count = self._task.stage.masking.patches, self._task.config.model.num_patches
            buffer["patch_positions"][row] = mask_patches(count, fraction, self._random(slot, sample, "patches"))
        buffer["uid"][row] = sample.uid
        buffer["image_id"][row] = sample.image_id if self._wants.image else sample.uid
        buffer["source"][row] = self._numbers[slot.source]

    def _write_text(self, draft: _Draft, tokens: Tokens, buffer: RowBuffer, row: int) -> None:
        if len(tokens) <= 2:
            raise BadSample("caption", f"no token is left of {draft.caption[:40]!r}")
        tokenizer, masking = self._task.tokenizer, self._task.stage.masking
        buffer["text_length"][row] = len(tokens)
        buffer.write("text", row, np.array(tokens.ids, dtype=np.int64), tokenizer.pad_id)
        if self._wants.masked_text:
            random = self._random(draft.slot, draft.sample, "words")
            masked = mask_whole_words(tokens, random, masking.probability, masking.whole_word, tokenizer)
            buffer["num_masked"][row] = len(masked.positions)
            buffer.write("masked_text", row, masked.ids, tokenizer.pad_id)
            buffer.write("mask_positions", row, masked.positions, 0)
            buffer.write("mask_labels", row, masked.labels, IGNORED)

    def _random(self, slot: Slot, sample: Sample, purpose: str) -> CounterRandom:
        return sample_random(self._seed, slot.epoch, sample.uid, purpose)


def _lengths(reader: SampleReader | None, by: str) -> Callable[[Slot], int]:
    """What buckets sort by: the longest caption's characters, or the picture's aspect ratio in thousandths."""

    def length(slot: Slot) -> int:
        assert reader is not None, "the order of buckets is read from the shards' indexes"
        index, sample = reader.index(slot)
        if by == "caption":
            return int(index.caption_length[sample])
        return int(1000 * index.width[sample] / max(1, index.height[sample]))

    return length


def _record(error: BadSample, sample: Sample, slot: Slot, step: int, place: int) -> BadRecord:
    return BadRecord(
        source=slot.source,
        shard=sample.shard,
        key=sample.key,
        offset=sample.offset,
        epoch=slot.epoch,
        step=step,
        place=place,
        stage=error.stage,
        reason=error.reason,
    )
