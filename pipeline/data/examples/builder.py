"""Builds one rank's examples in the data order: read, draw a caption, tokenise, mask, decode and augment.

An example's content is determined by its step and place alone (contract C1). A bad sample is replaced by a good
candidate of the same shuffle window, drawn by a hash, so that the replacement too is the same for every reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial

import cv2
import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import ImageBERTConfig, RunConfig, StageConfig, ViLTConfig
from pipeline.data import in_progress
from pipeline.data.batch import BatchBuffer, BatchSizes, BatchSpec
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import KeepAspectRatio, decode, shape_of
from pipeline.data.contents.members import (
    both_images,
    captions_of,
    check_members,
    class_of,
    image_bytes,
    question_of,
    statement_of,
)
from pipeline.data.contents.regions import check_fit, mask_regions, masked_at_most, regions_of
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.examples.augment import augment, mentions_side
from pipeline.data.examples.masking import mask_patches, mask_whole_words, patch_replacements
from pipeline.data.order import DataOrder, LengthBuckets, OrderSource, SampleRef, rank_slice
from pipeline.data.quarantine import BadRecord, BadSample, judging
from pipeline.data.randomness import CounterRandom, hash64, sample_random
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import Sample, SampleReader
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage

MAX_TRIES = 16  # candidates to replace one bad sample
_CACHED_STEPS = 4  # steps whose order is kept: threads build the examples of one step and of the next
_DECODED_BYTES = 8 * 2**20  # decoded images of one thread that wait to be augmented


def batch_spec(config: RunConfig, stage: StageConfig, groups: frozenset[str], num_examples: int) -> BatchSpec:
    """Return the arrays of some groups of fields, with the maximum sizes of a stage's examples."""
    model, masking, shape = config.model, stage.masking, shape_of(config.model)
    sizes = BatchSizes(text=stage.max_text_length)
    if isinstance(shape, KeepAspectRatio):
        assert isinstance(model, ViLTConfig)
        side, patches = shape.canvas, min(shape.num_patches, model.max_visible_patches or shape.num_patches)
        groups |= {f"{name}_size" for name in ("image", "second_image") if name in groups}
        if "image" in groups and "second_image" not in groups:  # models read all patches of two images
            groups |= {"visible_patches"}
    else:
        side, patches = shape, model.num_patches
    masked = len(mask_patches(patches, masking.image_mask_ratio, CounterRandom(0)))
    sizes = replace(sizes, image_side=side, visible_patches=patches, masked_patches=masked)
    if "regions" in groups:
        assert isinstance(model, ImageBERTConfig), "the schema accepts regions for no other kind of model"
        masked = masked_at_most(model.max_regions, masking.region_mask_ratio)
        sizes = replace(sizes, regions=model.max_regions, region_features=model.region_features, masked_regions=masked)
    return BatchSpec(num_examples, groups, sizes)


@dataclass(frozen=True)
class LoaderSpec:
    """Everything that determines the examples at some places of a stage's batches.

    Picklable: it is sent to loader processes and actors.
    """

    config: RunConfig
    stage: StageConfig
    tokenizer: Tokenizer
    sources: dict[str, Source]
    places: range  # of every global batch
    groups: frozenset[str]  # groups of batch fields that the stage reads
    answers: Choices | None = None  # the answers that the stage chooses among

    @property
    def seed(self) -> int:
        """The seed of the stage's order: stages that read one source see it in different orders."""
        return hash64(self.config.seed, self.stage.name)

    @property
    def batch_spec(self) -> BatchSpec:
        return batch_spec(self.config, self.stage, self.groups, len(self.places))

    def split(self, parts: int) -> list[LoaderSpec]:
        """Return the spec in contiguous parts of equal size to within one place, none of them empty."""
        count = min(parts, len(self.places))
        slices = [rank_slice(len(self.places), part, count) for part in range(count)]
        return [replace(self, places=self.places[part.start : part.stop]) for part in slices]

    def order(self, reader: SampleReader | None = None) -> DataOrder:
        """Return the stage's data order. Without a reader only the digest of a bucketed order can be used."""
        config, stage = self.config, self.stage

        def length(ref: SampleRef) -> int:
            """Return what buckets sort by: the longest caption's characters, or the aspect ratio in thousandths."""
            assert reader is not None, "the lengths of a bucketed order are read from the shards' indexes"
            assert stage.buckets is not None
            index, sample = reader.index(ref)
            if stage.buckets.by == "caption":
                return int(index.caption_length[sample])
            return int(1000 * index.width[sample] / max(1, index.height[sample]))

        return DataOrder(
            {
                name: OrderSource(source.counts, stage.sources[name], f"{config.sources[name].type} {source.digest}")
                for name, source in self.sources.items()
            },
            num_streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
            seed=self.seed,
            batch_size=stage.global_batch_size,
            extra=[  # everything besides the order that determines an example's content
                f"fields {sorted(self.groups)} {asdict(self.batch_spec.sizes)}",
                config.data.augment.model_dump_json(),
                stage.masking.model_dump_json(),
                f"pixels {config.data.max_pixels} side {config.model.image_size} shape {shape_of(config.model)}",
                f"vocabulary {self.tokenizer.digest}" if "text" in self.groups else "no text",
                f"buckets by {stage.buckets.by}" if stage.buckets else "no buckets",
                f"answers {self.answers.digest}" if self.answers else "no answers",
                f"interpolation {config.model.interpolation}",
            ],
            buckets=LengthBuckets(stage.buckets.batches, length) if stage.buckets else None,
        )


@dataclass(frozen=True)
class PendingExample:
    """A sample whose members are good as far as known without decoding it, with the text and labels read from it."""

    ref: SampleRef
    sample: Sample
    text: str = ""  # the drawn caption, the question or the statement
    answers: Mapping[str, float] = field(default_factory=dict)
    label: int = 0


class ExampleBuilder:
    """Builds the examples of a loader spec. Threads may share one; close its `reader`."""

    def __init__(self, spec: LoaderSpec, storage: Storage):
        cv2.setNumThreads(0)  # examples are the unit of parallel work; OpenCV's own threads would only contend
        settings = spec.config.data.cache
        cache = NodeCache(settings.folder, settings.max_bytes) if settings.folder else None
        self._spec, self._groups, self._seed = spec, spec.groups, spec.seed
        self._config, self._stage, self._model = spec.config, spec.stage, spec.config.model
        self._source_type, self._shape = spec.config.source_type_of(spec.stage), shape_of(spec.config.model)
        self._source_numbers = {name: number for number, name in enumerate(sorted(spec.sources))}
        self.reader = SampleReader(storage, spec.sources, spec.config.data.loader, cache)
        self.order = spec.order(self.reader)
        # The order of all places of a step costs little more than that of the few places of one thread's task.
        self._planned = lru_cache(_CACHED_STEPS)(partial(self.order.samples, places=spec.places))

    def build(self, step: int, places: range, buffer: BatchBuffer, first: int) -> list[BadRecord]:
        """Write the examples of `places` into the buffer, whose row 0 is place `first`; return what was replaced.

        A bad sample does not raise. Raises DataError when a shard changed or no replacement is good, and StorageError
        when a shard cannot be read.
        """
        bad: list[BadRecord] = []
        pending: dict[int, PendingExample] = {}
        planned = self._planned(step)
        for place in places:
            ref = planned[place - self._spec.places.start]
            sample = self.reader.read(ref)
            try:
                pending[place - first] = self._parse(ref, sample)
            except BadSample as fault:
                bad.append(self._replace(fault, ref, sample, step, place, buffer, place - first))
        faults = self._write(pending, buffer)
        for row in sorted(faults):
            example = pending[row]
            bad.append(self._replace(faults[row], example.ref, example.sample, step, first + row, buffer, row))
        return bad

    def _replace(
        self, fault: BadSample, ref: SampleRef, sample: Sample, step: int, place: int, buffer: BatchBuffer, row: int
    ) -> BadRecord:
        """Write another example in the place of a bad sample, and return the record of both."""
        for attempt in range(MAX_TRIES):
            other_ref = self.order.replacement(step, place, attempt)
            other = self.reader.read(other_ref)
            try:
                example = self._parse(other_ref, other)
            except BadSample:
                continue  # it is counted at the place that planned it
            if not self._write({row: example}, buffer):
                return BadRecord(
                    source=ref.source,
                    shard=sample.shard,
                    key=sample.key,
                    offset=sample.offset,
                    epoch=ref.epoch,
                    step=step,
                    place=place,
                    stage=fault.stage,
                    reason=fault.reason,
                    replaced_by=other.key,
                )
        raise DataError(
            f"source '{ref.source}': {sample.key} in {sample.shard} is bad ({fault.stage}: {fault.reason}), and so "
            f"were {MAX_TRIES} candidates around it. The shards do not hold what the source's `type` says, or were "
            "built wrongly: check them with `mome shards check`"
        )

    def _parse(self, ref: SampleRef, sample: Sample) -> PendingExample:
        """Read a sample's members, except its images. Raises BadSample."""
        with judging("members"):
            check_members(sample.members, sample.is_duplicate)
            if self._source_type == "questions":
                question = question_of(sample.members)
                return PendingExample(ref, sample, question.text, question.answers)
            if self._source_type == "statements":
                statement = statement_of(sample.members)
                return PendingExample(ref, sample, statement.text, label=int(statement.is_true))
            if self._source_type == "labelled":
                return PendingExample(ref, sample, label=class_of(sample.members, self._stage.num_classes))
            if "text" not in self._groups:
                return PendingExample(ref, sample)
            captions = captions_of(sample.members)
            drawn = sample_random(self._seed, ref.epoch, sample.uid, "caption").integer(len(captions))
            return PendingExample(ref, sample, captions[drawn])

    def _random(self, example: PendingExample, purpose: str) -> CounterRandom:
        return sample_random(self._seed, example.ref.epoch, example.sample.uid, purpose)

    def _write(self, pending: Mapping[int, PendingExample], buffer: BatchBuffer) -> dict[int, BadSample]:
        """Write examples by row; return the fault of each row that could not be written.

        One operation is done for all examples before the next: decoding an image evicts the processor's caches, and
        what follows it takes half as long again when each example is finished in turn. Texts come first: they cost
        little, and a missing one saves the decoding.
        """
        faults: dict[int, BadSample] = {}
        decoded: dict[int, list[np.ndarray]] = {}

        def apply(stage: str, write: Callable[[int, PendingExample], None], rows: Iterable[int]) -> None:
            for row in rows:
                if row not in faults:
                    try:
                        with judging(stage):
                            write(row, pending[row])
                    except BadSample as bad:
                        faults[row] = bad

        def decode_images(row: int, example: PendingExample) -> None:
            members = example.sample.members
            encoded = both_images(members) if "second_image" in self._groups else (image_bytes(members),)
            with in_progress.decoding(f"{example.ref.source}: {example.sample.shard} {example.sample.key}"):
                decoded[row] = [decode(image, self._config.data.max_pixels) for image in encoded]

        if "text" in self._groups:
            texts = [example.text for example in pending.values()]
            encoded = self._spec.tokenizer.encode_batch(texts, self._stage.max_text_length)
            tokens = dict(zip(pending, encoded, strict=True))
            apply("caption", lambda row, example: self._write_text(example, tokens[row], buffer, row), pending)
        if "image" in self._groups:
            for number, row in enumerate(pending, 1):
                apply("image", decode_images, [row])
                waiting = sum(image.nbytes for images in decoded.values() for image in images)
                if waiting > _DECODED_BYTES or number == len(pending):
                    apply(
                        "image",
                        lambda row, example: self._write_images(example, decoded.pop(row), buffer, row),
                        list(decoded),
                    )
        apply("members", lambda row, example: self._write_others(example, buffer, row), pending)
        return faults

    def _write_text(self, example: PendingExample, tokens: Tokens, buffer: BatchBuffer, row: int) -> None:
        if len(tokens) <= 2:
            raise BadSample("caption", f"no token is left of {example.text[:40]!r}")
        tokenizer, masking = self._spec.tokenizer, self._stage.masking
        buffer.write("text", row, np.array(tokens.ids, dtype=np.int64), tokenizer.pad_id)
        buffer.write("text_keep", row, np.ones(len(tokens), dtype=np.bool_))
        if "masked_text" in self._groups:
            random = self._random(example, "words")
            masked = mask_whole_words(tokens, random, masking.mlm_probability, masking.whole_word, tokenizer)
            buffer.write("masked_text", row, masked.ids, tokenizer.pad_id)
            buffer.write("mask_positions", row, masked.positions)
            buffer.write("mask_labels", row, masked.labels)

    def _write_images(self, example: PendingExample, images: list[np.ndarray], buffer: BatchBuffer, row: int) -> None:
        settings, model = self._config.data.augment, self._model
        says_side = settings.skip_flip_for_left_right and any(map(mentions_side, (example.text, *example.answers)))
        purposes = {"image": "augment", "second_image": "augment second"}
        for image, (name, purpose) in zip(images, purposes.items(), strict=False):
            random = self._random(example, purpose)
            augmented = augment(image, settings, self._shape, random, not says_side, model.interpolation)
            if isinstance(self._shape, KeepAspectRatio):
                buffer[f"{name}_size"][row] = augmented.shape[:2]
            canvas, (height, width) = buffer[name][row], augmented.shape[:2]
            canvas[:height, :width] = augmented
            canvas[height:] = canvas[:height, width:] = 0
        if "visible_patches" in buffer:
            limit, count = buffer["visible_patches"].shape[1], self._num_patches(buffer, row)
            visible = np.arange(count)
            if count > limit:
                visible = np.sort(self._random(example, "patches read").permutation(count)[:limit])
            buffer.write("visible_patches", row, visible)

    def _num_patches(self, buffer: BatchBuffer, row: int) -> int:
        if "image_size" not in buffer:
            return self._model.num_patches
        return int(buffer["image_size"][row].prod()) // self._model.patch_size**2

    def _write_others(self, example: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """Write everything but the text and the images. Raises BadSample without regions that fit the model."""
        sample, groups, masking = example.sample, self._groups, self._stage.masking
        buffer["uid"][row] = sample.uid
        shows_image = "image" in groups or "regions" in groups
        # The two images of a statement have no common id.
        buffer["image_id"][row] = (sample.image_id or sample.uid) if shows_image else sample.uid
        buffer["source"][row] = self._source_numbers[example.ref.source]
        if "label" in groups:
            buffer["label"][row] = example.label
        if "answers" in groups:  # a question without a listed answer has only wrong ones
            assert self._spec.answers is not None
            listed = self._spec.answers.numbered(example.answers)
            buffer.write("answers", row, np.array(list(listed), dtype=np.int64))
            buffer.write("answer_scores", row, np.array(list(listed.values()), dtype=np.float32))

        if "masked_patches" in groups:  # the same fraction of every image's patches, or of its visible ones
            random, count = self._random(example, "patches"), self._num_patches(buffer, row)
            if "visible_patches" in buffer:
                visible = buffer["visible_patches"][row]
                visible = visible[visible >= 0]
                positions = visible[mask_patches(len(visible), masking.image_mask_ratio, random)]
            else:
                positions = mask_patches(count, masking.image_mask_ratio, random, masking.patch_shape == "blocks")
            buffer.write("patch_positions", row, positions)
            if "patch_replacements" in groups:
                random = self._random(example, "stand-ins")
                shown = patch_replacements(positions, count, masking.mask_token_prob, masking.random_patch_prob, random)
                buffer.write("patch_replacements", row, shown)

        if "regions" in groups:
            model = self._model
            assert isinstance(model, ImageBERTConfig)
            regions = regions_of(sample.members)
            check_fit(regions, model.region_features, model.region_classes if "region_class" in groups else None)
            regions = regions.most_confident(model.max_regions)
            buffer.write("region_keep", row, np.ones(len(regions), dtype=np.bool_))
            buffer.write("region_features", row, regions.features)
            buffer.write("region_location", row, regions.locations())
            if "region_class" in groups and regions.classes is not None:
                buffer.write("region_class", row, regions.classes)
            if "masked_regions" in groups:
                random = self._random(example, "regions")
                positions, is_zeroed = mask_regions(len(regions), masking.region_mask_ratio, random)
                buffer.write("region_positions", row, positions)
                buffer["region_hidden"][row] = False
                buffer["region_hidden"][row, positions[is_zeroed]] = True
