"""One rank's rows from the plan: read, choose a caption, tokenise, mask, decode and augment, each where it belongs.

What a row holds is decided by its step and place alone (contract C1). A bad sample's place is taken by a good
candidate of the same window, drawn by a hash, so that a replacement too is the same for every reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial

import cv2
import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import ImageBERTConfig, RunConfig, SourceType, StageConfig, ViLTConfig
from pipeline.data import in_progress
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import OwnShape, Shape, decode, put_on_canvas, shape_of
from pipeline.data.contents.members import captions_of, check_members, class_of, image_bytes
from pipeline.data.contents.questions import both_images, question_of, statement_of
from pipeline.data.contents.regions import check_fit, mask_regions, masked_at_most, regions_of
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.examples.augment import augment, mentions_side
from pipeline.data.examples.batch_buffer import BatchBuffer, BatchFields, BatchSpec, RegionSizes
from pipeline.data.examples.masking import mask_patches, mask_whole_words, stand_ins
from pipeline.data.order import DataOrder, LengthBuckets, OrderSource, SampleRef, rank_slice
from pipeline.data.quarantine import BadRecord, BadSample, judged, judging
from pipeline.data.randomness import CounterRandom, hash64, sample_random
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import Sample, SampleReader
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage

MAX_TRIES = 16  # candidates to replace one bad sample
_STEPS_PLANNED = 4  # whose slots are kept: threads make the rows of one step and of the next
_DECODED_BYTES = 8 * 2**20  # of pictures that wait to be augmented, of each thread
IGNORED = -100  # the label of a padded masked place


@dataclass(frozen=True)
class LoaderSpec:
    """Everything that decides the rows of some places of a stage's batches. Picklable: a loader process gets one."""

    config: RunConfig
    stage: StageConfig
    tokenizer: Tokenizer
    sources: dict[str, Source]
    places: range  # of every global batch
    answers: Choices | None = None  # that the stage chooses among

    @property
    def wants(self) -> BatchFields:
        return BatchFields.of(self.config, self.stage)

    @property
    def source_type(self) -> SourceType:
        return self.config.source_type_of(self.stage)

    @property
    def seed(self) -> int:
        """Stages that read one source see it in different orders."""
        return hash64(self.config.seed, self.stage.name)

    @property
    def layout(self) -> BatchSpec:
        stage, shape = self.stage, self.shape
        if isinstance(shape, OwnShape):
            side, patches = shape.canvas, self.max_visible_patches
            read = patches if self.wants.image else 0
        else:
            side, patches, read = shape, self.config.model.num_patches, 0
        masked = len(mask_patches(patches, stage.masking.image_mask_ratio, CounterRandom(0)))
        regions = _region_sizes(self.config, stage) if self.wants.regions else None
        return BatchSpec.of(self.wants, len(self.places), side, stage.max_text_length, masked, regions, read)

    @property
    def shape(self) -> Shape:
        return shape_of(self.config.model)

    @property
    def max_visible_patches(self) -> int:
        """The most patches that a model reads of a picture in its own shape."""
        model = self.config.model
        assert isinstance(model, ViLTConfig)
        assert isinstance(self.shape, OwnShape)
        return min(self.shape.num_patches, model.max_visible_patches or self.shape.num_patches)

    def split(self, parts: int) -> list[LoaderSpec]:
        """The task in contiguous parts, each of whole streams as far as may be; at most one part a place."""
        count = min(parts, len(self.places))
        slices = [rank_slice(len(self.places), part, count) for part in range(count)]
        return [replace(self, places=self.places[part.start : part.stop]) for part in slices]

    def order(self, reader: SampleReader | None = None) -> DataOrder:
        """The stage's order. Without a reader the order of buckets is not known, only their digest."""
        config, stage = self.config, self.stage
        sources = {
            name: OrderSource(source.counts, stage.sources[name], f"{config.sources[name].type} {source.digest}")
            for name, source in self.sources.items()
        }
        buckets = None
        if stage.buckets is not None:
            buckets = LengthBuckets(stage.buckets.batches, _lengths(reader, stage.buckets.by))
        return DataOrder(
            sources,
            num_streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
            seed=self.seed,
            batch_size=stage.global_batch_size,
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
            f"text {stage.max_text_length} vocabulary {self.tokenizer.digest}" if wants.text else "no text",
            f"buckets by {stage.buckets.by}" if stage.buckets else "no buckets",
            f"answers {self.answers.digest}" if self.answers else "no answers",
            f"regions {_region_sizes(config, stage)}" if wants.regions else "no regions",
            f"shape {self.shape} {self.max_visible_patches}" if isinstance(self.shape, OwnShape) else "square",
            *([] if config.model.interpolation == "bicubic" else [f"interpolation {config.model.interpolation}"]),
        ]


@dataclass(frozen=True)
class PendingExample:
    """A sample that is good as far as can be told without decoding it, and the text that is read with it."""

    slot: SampleRef
    sample: Sample
    text: str = ""  # the caption drawn for it, its question or its statement
    answers: Mapping[str, float] = field(default_factory=dict)
    label: int = 0

    @property
    def mentions_side(self) -> bool:
        """Whether a mirrored picture would make its text or its answers false."""
        return any(mentions_side(each) for each in (self.text, *self.answers))


class ExampleBuilder:
    """Makes the rows of a task. Threads may share one; `close` ends what reads ahead."""

    def __init__(self, task: LoaderSpec, storage: Storage):
        cv2.setNumThreads(0)  # rows are the unit of parallel work; OpenCV's own threads would only contend
        settings = task.config.data.cache
        cache = NodeCache(settings.folder, settings.max_bytes) if settings.folder else None
        self._task, self._wants, self._seed = task, task.wants, task.seed
        self._numbers = {name: number for number, name in enumerate(sorted(task.sources))}
        self._reader = SampleReader(storage, task.sources, task.config.data.loader, cache)
        self.order = task.order(self._reader)
        # Asked for all places of a step at once: that costs little more than the few of one thread's turn.
        self._slots = lru_cache(_STEPS_PLANNED)(partial(self.order.samples, places=task.places))

    def begin(self, step: int) -> None:
        """Starts reading ahead of `step`."""
        self._reader.start_prefetch(lambda later: self.order.samples(later, self._task.places), step)

    def reached(self, step: int) -> None:
        """All rows of `step` are made: what only they needed need not be kept."""
        self._reader.finish_step(step)

    def close(self) -> None:
        self._reader.close()

    def make(self, step: int, places: range, buffer: BatchBuffer, first: int) -> list[BadRecord]:
        """Writes the rows of `places` into the buffer, whose row 0 is place `first`; returns what had to be replaced.

        Raises DataError or StorageError; a bad sample raises nothing.
        """
        bad: list[BadRecord] = []
        drafts: dict[int, PendingExample] = {}
        planned = self._slots(step)
        for place in places:
            slot = planned[place - self._task.places.start]
            sample = self._reader.read(slot)
            try:
                drafts[place] = self._draft(slot, sample)
            except BadSample as error:
                bad.append(self._replace(step, place, buffer, place - first, _record(error, sample, slot, step, place)))
        faults = self._write({place - first: draft for place, draft in drafts.items()}, buffer)
        for row, fault in sorted(faults.items()):
            place = first + row
            record = _record(fault, drafts[place].sample, drafts[place].slot, step, place)
            bad.append(self._replace(step, place, buffer, row, record))
        return bad

    def _replace(self, step: int, place: int, buffer: BatchBuffer, row: int, bad: BadRecord) -> BadRecord:
        for attempt in range(MAX_TRIES):
            slot = self.order.replacement(step, place, attempt)
            sample = self._reader.read(slot)
            try:
                draft = self._draft(slot, sample)
            except BadSample:
                continue  # counted in the place that planned it
            if not self._write({row: draft}, buffer):
                return bad.replaced_with(sample.key)
        raise DataError(
            f"source '{bad.source}': {bad.key} in {bad.shard} is bad ({bad.stage}: {bad.reason}), and so were "
            f"{MAX_TRIES} candidates around it. The shards do not hold what `use` says, or were built wrongly: "
            "look at them with mome shards check"
        )

    def _draft(self, slot: SampleRef, sample: Sample) -> PendingExample:
        """Raises BadSample."""
        with judging("members"):
            return self._judged_draft(slot, sample)

    def _judged_draft(self, slot: SampleRef, sample: Sample) -> PendingExample:
        check_members(sample.members, sample.is_duplicate)
        source_type = self._task.source_type
        if source_type == "questions":
            question = question_of(sample.members)
            return PendingExample(slot, sample, question.text, question.answers)
        if source_type == "statements":
            statement = statement_of(sample.members)
            return PendingExample(slot, sample, statement.text, label=int(statement.is_true))
        if source_type == "labelled":
            return PendingExample(slot, sample, label=class_of(sample.members, self._task.stage.num_classes))
        if not self._wants.text:
            return PendingExample(slot, sample)
        captions = captions_of(sample.members)
        return PendingExample(slot, sample, captions[self._random(slot, sample, "caption").integer(len(captions))])

    def _encode(self, drafts: Sequence[PendingExample]) -> Sequence[Tokens]:
        """One call for all texts: the tokenizer's own loop is not Python's."""
        return self._task.tokenizer.encode_batch([draft.text for draft in drafts], self._task.stage.max_text_length)

    def _write(self, drafts: Mapping[int, PendingExample], buffer: BatchBuffer) -> dict[int, BadSample]:
        """Writes rows by their number; returns those that could not be, with what was wrong.

        One thing is done for all rows before the next: decoding a picture empties the processor's caches, and what
        follows it takes half as long again when it comes back to each row in turn. Texts come first: they cost little,
        and a missing one spares the decoding.
        """
        bad: dict[int, BadSample] = {}

        def judge(stage: str, write: Callable[[int, PendingExample], None], rows: Iterable[int] = drafts) -> None:
            for row in rows:
                if row not in bad:
                    try:
                        write(row, drafts[row])
                    except Exception as error:
                        bad[row] = judged(stage, error)

        if self._wants.text:
            tokens = dict(zip(drafts, self._encode(list(drafts.values())), strict=True))
            judge("caption", lambda row, draft: self._write_text(draft, tokens[row], buffer, row))
        if self._wants.image:
            waiting: dict[int, list[np.ndarray]] = {}

            def decode_one(row: int, draft: PendingExample) -> None:
                waiting[row] = self._decode(draft)
                if _bytes_of(waiting) > _DECODED_BYTES:
                    augment_all()

            def augment_one(row: int, draft: PendingExample) -> None:
                self._write_pictures(draft, waiting.pop(row), buffer, row)

            def augment_all() -> None:
                judge("image", augment_one, list(waiting))

            judge("image", decode_one)
            augment_all()
        judge("members", lambda row, draft: self._write_rest(draft, buffer, row))
        return bad

    def _write_rest(self, draft: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """All but the text and the pictures. Raises BadSample."""
        sample, slot = draft.sample, draft.slot
        if self._wants.regions:
            self._write_regions(draft, buffer, row)
        if self._wants.answers:
            self._write_answers(draft, buffer, row)
        if self._wants.label:
            buffer["label"][row] = draft.label
        if self._wants.masked_image:
            self._write_masked_patches(draft, buffer, row)
        buffer["uid"][row] = sample.uid
        # A statement's two pictures have no one name.
        is_shown = self._wants.image or self._wants.regions
        buffer["image_id"][row] = (sample.image_id or sample.uid) if is_shown else sample.uid
        buffer["source"][row] = self._numbers[slot.source]

    def _decode(self, draft: PendingExample) -> list[np.ndarray]:
        """Raises BadSample."""
        members = draft.sample.members
        encoded = both_images(members) if self._wants.second_image else (image_bytes(members),)
        with in_progress.decoding(f"{draft.slot.source}: {draft.sample.shard} {draft.sample.key}"):
            return [decode(each, self._task.config.data.max_pixels) for each in encoded]

    def _write_pictures(self, draft: PendingExample, decoded: list[np.ndarray], buffer: BatchBuffer, row: int) -> None:
        data, shape = self._task.config.data, self._task.shape
        allow_flip = not (data.augment.skip_flip_for_left_right and draft.mentions_side)
        for name, purpose, picture in zip(
            ("image", "second_image"), ("augment", "augment second"), decoded, strict=False
        ):
            random = self._random(draft.slot, draft.sample, purpose)
            seen = augment(picture, data.augment, shape, random, allow_flip, self._task.config.model.interpolation)
            if isinstance(shape, OwnShape):
                buffer[f"{name}_size"][row] = seen.shape[:2]
            put_on_canvas(seen, buffer[name][row])
        if "visible_patches" in buffer:
            self._write_patches_read(draft, buffer, row)

    def _write_patches_read(self, draft: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """All patches of a picture in its own shape; where they are more than the model reads, some at random."""
        most, count = self._task.max_visible_patches, self._num_patches(buffer, row)
        read = np.arange(count)
        if count > most:
            read = np.sort(self._random(draft.slot, draft.sample, "patches read").permutation(count)[:most])
        buffer.write("visible_patches", row, read, -1)

    def _write_masked_patches(self, draft: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """Of a picture in its own shape only patches that are read are masked, their share the same in each picture."""
        masking, count = self._task.stage.masking, self._num_patches(buffer, row)
        random = self._random(draft.slot, draft.sample, "patches")
        if "visible_patches" in buffer:
            read = buffer["visible_patches"][row]
            read = read[read >= 0]
            positions = read[mask_patches(len(read), masking.image_mask_ratio, random)]
        else:
            positions = mask_patches(count, masking.image_mask_ratio, random, masking.patch_shape == "blocks")
        buffer.write("patch_positions", row, positions, -1)
        if self._wants.stand_ins:
            random = self._random(draft.slot, draft.sample, "stand-ins")
            shown = stand_ins(positions, count, masking.mask_token_prob, masking.random_patch_prob, random)
            buffer.write("patch_replacements", row, shown, -1)

    def _num_patches(self, buffer: BatchBuffer, row: int) -> int:
        """Of the row's picture."""
        model = self._task.config.model
        if "image_size" not in buffer:
            return model.num_patches
        return int(buffer["image_size"][row].prod()) // model.patch_size**2

    def _write_regions(self, draft: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """Raises BadSample when there are no regions, or none that this model reads."""
        model, wants = self._task.config.model, self._wants
        assert isinstance(model, ImageBERTConfig)
        found = regions_of(draft.sample.members)
        check_fit(found, model.region_features, model.region_classes if wants.region_class else None)
        found = found.most_confident(model.max_regions)
        buffer["num_regions"][row] = len(found)
        buffer.write("mrfr", row, found.features, 0.0)
        buffer.write("region_location", row, found.locations(), 0.0)
        if found.classes is not None and wants.region_class:
            buffer.write("moc", row, found.classes, 0)
        if wants.masked_regions:
            random = self._random(draft.slot, draft.sample, "regions")
            positions, is_zeroed = mask_regions(len(found), self._task.stage.masking.region_mask_ratio, random)
            buffer.write("region_positions", row, positions, -1)
            buffer["region_hidden"][row] = False
            buffer["region_hidden"][row, positions[is_zeroed]] = True

    def _write_answers(self, draft: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """The listed ones among the answers; a question may have none, and teaches then what it is not."""
        assert self._task.answers is not None
        listed = self._task.answers.numbered(draft.answers)
        buffer.write("answers", row, np.array(list(listed), dtype=np.int64), -1)
        buffer.write("answer_scores", row, np.array(list(listed.values()), dtype=np.float32), 0.0)

    def _write_text(self, draft: PendingExample, tokens: Tokens, buffer: BatchBuffer, row: int) -> None:
        if len(tokens) <= 2:
            raise BadSample("caption", f"no token is left of {draft.text[:40]!r}")
        tokenizer, masking = self._task.tokenizer, self._task.stage.masking
        buffer["text_length"][row] = len(tokens)
        buffer.write("text", row, np.array(tokens.ids, dtype=np.int64), tokenizer.pad_id)
        if self._wants.masked_text:
            random = self._random(draft.slot, draft.sample, "words")
            masked = mask_whole_words(tokens, random, masking.mlm_probability, masking.whole_word, tokenizer)
            buffer["num_masked"][row] = len(masked.positions)
            buffer.write("masked_text", row, masked.ids, tokenizer.pad_id)
            buffer.write("mask_positions", row, masked.positions, 0)
            buffer.write("mask_labels", row, masked.labels, IGNORED)

    def _random(self, slot: SampleRef, sample: Sample, purpose: str) -> CounterRandom:
        return sample_random(self._seed, slot.epoch, sample.uid, purpose)


def _bytes_of(decoded: Mapping[int, Sequence[np.ndarray]]) -> int:
    return sum(picture.nbytes for pictures in decoded.values() for picture in pictures)


def _region_sizes(config: RunConfig, stage: StageConfig) -> RegionSizes:
    assert isinstance(config.model, ImageBERTConfig), "the schema gives regions to no other kind"
    most = config.model.max_regions
    return RegionSizes(most, config.model.region_features, masked_at_most(most, stage.masking.region_mask_ratio))


def _lengths(reader: SampleReader | None, by: str) -> Callable[[SampleRef], int]:
    """What buckets sort by: the longest caption's characters, or the picture's aspect ratio in thousandths."""

    def length(slot: SampleRef) -> int:
        assert reader is not None, "the order of buckets is read from the shards' indexes"
        index, sample = reader.index(slot)
        if by == "caption":
            return int(index.caption_length[sample])
        return int(1000 * index.width[sample] / max(1, index.height[sample]))

    return length


def _record(error: BadSample, sample: Sample, slot: SampleRef, step: int, place: int) -> BadRecord:
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
