"""Builds one rank's examples, each determined by its step and place alone (contract C1). A bad sample is replaced by a
good candidate of the same shuffle window, drawn by a hash, so that the replacement too is the same for every reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial

import cv2
import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import ImageBERTConfig, RunConfig, StageConfig, ViLTConfig
from pipeline.config.urls import local_path
from pipeline.data.batch import BatchBuffer, BatchSizes, BatchSpec
from pipeline.data.contents import members
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import KeepAspectRatio, decode, shape_of
from pipeline.data.contents.regions import regions_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.augment import SIDES, augment
from pipeline.data.examples.masking import ZEROED, mask_patches, mask_whole_words, patch_replacements
from pipeline.data.order import DataOrder, LengthBuckets, OrderSource, SampleRef, share
from pipeline.data.quarantine import BadRecord, BadSample, decoding, judging
from pipeline.data.randomness import CounterRandom, hash64, permutation
from pipeline.data.reading.cache import FOLDER, NodeCache
from pipeline.data.reading.samples import Sample, SampleReader
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage

MAX_TRIES = 16  # candidates to replace one bad sample
_CACHED_STEPS = 4  # steps whose order is kept: threads build the examples of one step and of the next
_PURPOSES = {"image": "augment", "second_image": "augment second"}  # of the random numbers, by field
_DECODED_BYTES = 8 * 2**20  # decoded images of one thread that wait to be augmented


def batch_spec(config: RunConfig, stage: StageConfig, groups: frozenset[str], num_examples: int) -> BatchSpec:
    """Return the arrays of some groups of fields, with the maximum sizes of a stage's examples."""
    model, masking, shape = config.model, stage.masking, shape_of(config.model)
    if isinstance(shape, KeepAspectRatio):
        assert isinstance(model, ViLTConfig)
        most, side = (shape.shorter // shape.patch) * (shape.longest // shape.patch), shape.longest
        patches = min(most, model.max_visible_patches or most)
        groups |= {f"{name}_size" for name in ("image", "second_image") if name in groups}
        if "image" in groups and "second_image" not in groups:  # models read all patches of two images
            groups |= {"visible_patches"}
    else:
        patches, side = model.grid**2, shape
    masked = len(mask_patches(patches, masking.image_mask_ratio, CounterRandom(0)))
    sizes = BatchSizes(side // model.patch_size * model.patch_size, stage.max_text_length, patches, masked)
    if "regions" in groups:
        assert isinstance(model, ImageBERTConfig), "the schema accepts regions for no other kind of model"
        masked = len(mask_patches(model.max_regions, masking.region_mask_ratio, CounterRandom(0)))
        sizes = replace(sizes, regions=model.max_regions, region_features=model.region_features, masked_regions=masked)
    return BatchSpec(num_examples, groups, sizes)


@dataclass(frozen=True)
class LoaderSpec:
    """Everything that determines the examples at some places of a stage's batches: sent to processes and actors."""

    config: RunConfig
    stage: StageConfig
    tokenizer: Tokenizer
    sources: dict[str, Source]
    places: range  # of every global batch
    groups: frozenset[str]  # groups of batch fields that the stage reads
    answers: Choices | None = None  # the answers that the stage chooses among

    @property
    def batch_spec(self) -> BatchSpec:
        return batch_spec(self.config, self.stage, self.groups, len(self.places))

    def split(self, parts: int) -> list[LoaderSpec]:
        """Return the spec in contiguous parts of equal size to within one place, none of them empty."""
        count = min(parts, len(self.places))
        slices = [slice(*share(len(self.places), part, count)) for part in range(count)]
        return [replace(self, places=self.places[part]) for part in slices]

    def order(self, reader: SampleReader | None = None) -> DataOrder:
        """Return the stage's data order. Without a reader only the digest of a bucketed order can be used."""
        config, stage, buckets = self.config, self.stage, self.stage.buckets
        sources = {
            name: OrderSource(source.counts, stage.sources[name], f"{config.sources[name].type} {source.digest}")
            for name, source in self.sources.items()
        }

        def length(ref: SampleRef) -> int:
            """Return what buckets sort by: the longest caption's characters, or the aspect ratio in thousandths."""
            assert reader is not None, "the lengths of a bucketed order are read from the shards' indexes"
            assert buckets is not None
            view, sample = reader.view(ref)
            if buckets.by == "caption":
                return int(view.index.caption_length[sample])
            return int(1000 * view.index.width[sample] / max(1, view.index.height[sample]))

        return DataOrder(
            sources,
            num_streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
            seed=hash64(config.seed, stage.name),  # stages that read one source see it in different orders
            batch_size=stage.global_batch_size,
            extra=[  # everything besides the order that determines an example's content
                f"fields {sorted(self.groups)} {asdict(self.batch_spec.sizes)}",
                config.data.augment.model_dump_json(),
                stage.masking.model_dump_json(),
                f"pixels {config.data.max_pixels} side {config.model.image_size} shape {shape_of(config.model)}",
                f"vocabulary {self.tokenizer.digest}" if "text" in self.groups else "no text",
                f"buckets by {buckets.by}" if buckets else "no buckets",
                f"answers {hashlib.sha256(self.answers.to_bytes()).hexdigest()}" if self.answers else "no answers",
                f"interpolation {config.model.interpolation}",
            ],
            buckets=LengthBuckets(buckets.batches, length) if buckets else None,
        )


@dataclass(frozen=True)
class PendingExample:
    """A sample whose members are good as far as known without decoding it, with the text and labels read from it."""

    ref: SampleRef
    sample: Sample
    seed: int
    text: str = ""  # the drawn caption, the question or the statement
    answers: Mapping[str, float] = field(default_factory=dict)
    label: int = 0

    def random(self, purpose: str) -> CounterRandom:
        """Return random numbers for a purpose, which differ between epochs."""
        return CounterRandom(hash64(self.seed, self.ref.epoch, self.sample.uid, purpose))


class ExampleBuilder:
    """Builds the examples of a loader spec. Threads may share one; close its `reader`."""

    def __init__(self, spec: LoaderSpec, storage: Storage):
        cv2.setNumThreads(0)  # examples are the unit of parallel work; OpenCV's own threads would only contend
        settings = spec.config.data.cache
        cache = NodeCache(local_path(settings.folder) / FOLDER, settings.max_bytes) if settings.folder else None
        self._spec, self._groups = spec, spec.groups
        self._config, self._stage, self._model = spec.config, spec.stage, spec.config.model
        self._source_type, self._shape = spec.config.source_type_of(spec.stage), shape_of(spec.config.model)
        self._source_numbers = {name: number for number, name in enumerate(sorted(spec.sources))}
        self._answer_numbers = {answer: number for number, answer in enumerate(spec.answers or ())}
        self.reader = SampleReader(storage, spec.sources, spec.config.data.loader, cache)
        self.order = spec.order(self.reader)
        # The order of all places of a step costs little more than that of the few places of one thread's task.
        self._planned = lru_cache(_CACHED_STEPS)(partial(self.order.samples, places=spec.places))

    def build(self, step: int, places: range, buffer: BatchBuffer, first: int) -> list[BadRecord]:
        """Write the examples of `places` into the buffer, whose row 0 is place `first`; return what was replaced.
        Raises DataError when a shard changed or no replacement is good, StorageError when a shard cannot be read.
        """
        bad, pending = list[tuple[int, SampleRef, Sample, BadSample]](), dict[int, PendingExample]()
        planned = self._planned(step)
        for place in places:
            ref = planned[place - self._spec.places.start]
            sample = self.reader.read(ref)
            try:
                pending[place - first] = self._parse(ref, sample)
            except BadSample as fault:
                bad.append((place - first, ref, sample, fault))
        written = sorted(self._write(pending, buffer).items())
        bad += [(row, pending[row].ref, pending[row].sample, defect) for row, defect in written]

        records = []
        for row, ref, sample, defect in bad:
            place = first + row
            for attempt in range(MAX_TRIES):
                other_ref = self.order.samples(step, range(place, place + 1), attempt)[0]
                other = self.reader.read(other_ref)
                try:
                    example = self._parse(other_ref, other)
                except BadSample:
                    continue  # it is counted at the place that planned it
                if not self._write({row: example}, buffer):
                    origin = (ref.source, sample.shard, sample.key, sample.offset, ref.epoch)
                    records.append(BadRecord(*origin, step, place, defect.stage, defect.reason, other.key))
                    break
            else:
                raise DataError(
                    f"source '{ref.source}': {sample.key} in {sample.shard} is bad ({defect.stage}: {defect.reason}), "
                    f"and so were {MAX_TRIES} candidates around it. The shards do not hold what the source's `type` "
                    "says, or were built wrongly: check them with `mome shards check`"
                )
        return records

    def _parse(self, ref: SampleRef, sample: Sample) -> PendingExample:
        """Read a sample's members, except its images. Raises BadSample."""
        example = PendingExample(ref, sample, self.order.seed)
        content, source_type = sample.members, self._source_type
        with judging("members"):
            members.check_members(content, sample.is_duplicate)
            if source_type in ("questions", "statements", "labelled"):
                annotation = members.annotation_of(content, source_type, self._stage.num_classes)
                return replace(example, text=annotation.text, answers=annotation.answers, label=annotation.label)
            if "text" in self._groups:
                captions = members.captions_of(content)
                return replace(example, text=captions[example.random("caption").integer(len(captions))])
        return example

    def _write(self, pending: Mapping[int, PendingExample], buffer: BatchBuffer) -> dict[int, BadSample]:
        """Write examples by row; return the fault of each row that failed. Each operation is done for all before the
        next, because decoding evicts the processor's caches; texts first, because a missing one saves the decoding.
        """
        faults: dict[int, BadSample] = {}
        if "text" in self._groups:
            tokenizer, masking = self._spec.tokenizer, self._stage.masking
            texts = [example.text for example in pending.values()]
            encoded = tokenizer.encode_batch(texts, self._stage.max_text_length)
            for (row, example), tokens in zip(pending.items(), encoded, strict=True):
                if len(tokens.ids) <= 2:
                    faults[row] = BadSample("caption", f"no token is left of {example.text[:40]!r}")
                    continue
                buffer.write("text", row, np.array(tokens.ids, dtype=np.int64), tokenizer.pad_id)
                buffer.write("text_keep", row, np.ones(len(tokens.ids), dtype=np.bool_))
                if "masked_text" in self._groups:
                    random = example.random("words")
                    masked = mask_whole_words(tokens, random, masking.mlm_probability, masking.whole_word, tokenizer)
                    buffer.write("masked_text", row, masked.ids, tokenizer.pad_id)
                    buffer.write("mask_positions", row, masked.positions)
                    buffer.write("mask_labels", row, masked.labels)

        decoded: dict[int, list[np.ndarray]] = {}
        last = next(reversed(pending), None)
        for row, example in pending.items() if "image" in self._groups else ():
            if row not in faults:
                with _collected(faults, row, "image"):
                    content, shard, key = example.sample.members, example.sample.shard, example.sample.key
                    prefixes = members.BOTH if "second_image" in self._groups else (("",),)
                    images = [members.image_bytes(content, prefix) for prefix in prefixes]
                    with decoding(f"{example.ref.source}: {shard} {key}"):
                        decoded[row] = [decode(image, self._config.data.max_pixels) for image in images]
            waiting = sum(image.nbytes for pixels in decoded.values() for image in pixels)
            while decoded and (waiting > _DECODED_BYTES or row == last):
                ready, pixels = decoded.popitem()
                with _collected(faults, ready, "image"):
                    shown, settings = pending[ready], self._config.data.augment
                    names_side = any(map(SIDES.search, (shown.text, *shown.answers)))
                    may_flip = not (settings.skip_flip_for_left_right and names_side)
                    for image, (name, purpose) in zip(pixels, _PURPOSES.items(), strict=False):
                        random, interpolation = shown.random(purpose), self._model.interpolation
                        augmented = augment(image, settings, self._shape, random, may_flip, interpolation)
                        canvas, (height, width) = buffer[name][ready], augmented.shape[:2]
                        if f"{name}_size" in buffer:
                            buffer[f"{name}_size"][ready] = height, width
                        canvas[:height, :width] = augmented
                        canvas[height:] = canvas[:height, width:] = 0

        for row, example in pending.items():
            if row not in faults:
                with _collected(faults, row, "members"):
                    self._write_others(example, buffer, row)
        return faults

    def _write_others(self, example: PendingExample, buffer: BatchBuffer, row: int) -> None:
        """Write everything but the text and the images. Raises BadSample without regions that fit the model."""
        sample, groups, masking, model = example.sample, self._groups, self._stage.masking, self._model
        buffer["uid"][row] = buffer["image_id"][row] = sample.uid
        if sample.image_id and not groups.isdisjoint(("image", "regions")):  # two images have no common id
            buffer["image_id"][row] = sample.image_id
        buffer["source"][row] = self._source_numbers[example.ref.source]
        if "label" in groups:
            buffer["label"][row] = example.label
        if "answers" in groups:  # a question without a listed answer has only wrong ones
            listed = {answer: score for answer, score in example.answers.items() if answer in self._answer_numbers}
            numbers = [self._answer_numbers[answer] for answer in listed]
            buffer.write("answers", row, np.array(numbers, dtype=np.int64))
            buffer.write("answer_scores", row, np.array(list(listed.values()), dtype=np.float32))

        count = model.grid**2
        if "image_size" in buffer:
            count = int(buffer["image_size"][row].prod()) // model.patch_size**2
        visible = np.arange(count)
        if "visible_patches" in buffer:
            if count > (limit := buffer["visible_patches"].shape[1]):
                visible = np.sort(permutation(example.random("patches read").integer(), count)[:limit])
            buffer.write("visible_patches", row, visible)
        if "masked_patches" in groups:  # the same fraction of every image's patches, or of its visible ones
            blocks, random = masking.patch_shape == "blocks", example.random("patches")
            positions = visible[mask_patches(len(visible), masking.image_mask_ratio, random, blocks)]
            buffer.write("patch_positions", row, positions)
            if "patch_replacements" in groups:
                random = example.random("stand-ins")
                shown = patch_replacements(positions, count, masking.mask_token_prob, masking.random_patch_prob, random)
                buffer.write("patch_replacements", row, shown)

        if "regions" in groups:
            assert isinstance(model, ImageBERTConfig)
            num_classes = model.region_classes if "region_class" in groups else None
            regions = regions_of(sample.members, model.region_features, num_classes, model.max_regions)
            count = len(regions.features)
            buffer.write("region_keep", row, np.ones(count, dtype=np.bool_))
            buffer.write("region_features", row, regions.features)
            buffer.write("region_location", row, regions.locations())
            if "region_class" in groups and regions.classes is not None:
                buffer.write("region_class", row, regions.classes)
            if "masked_regions" in groups:
                random = example.random("regions")
                positions = mask_patches(count, masking.region_mask_ratio, random)
                is_zeroed = [random.uniform() < ZEROED for _ in positions]
                buffer.write("region_positions", row, positions)
                buffer["region_hidden"][row] = False
                buffer["region_hidden"][row, positions[is_zeroed]] = True


@contextmanager
def _collected(faults: dict[int, BadSample], row: int, stage: str) -> Iterator[None]:
    """Record an error of the block as the row's fault instead of raising it."""
    try:
        with judging(stage):
            yield
    except BadSample as bad:
        faults[row] = bad
