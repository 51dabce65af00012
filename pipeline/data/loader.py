"""From the plan to batches: threads read, decode, augment, tokenise and mask the rows of one rank.

What a batch holds is decided by its step alone (contract C1); threads only decide when it is ready. Batches are
prepared ahead, in order, and bad samples are counted when their batch is delivered, never for one prepared in vain.

Shapes: B rows, S image side, L tokens, K masked tokens or patches a row.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.augment import augment, mentions_side
from pipeline.data.batch import Batch
from pipeline.data.images import decode
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.masking import Masked, mask_patches, mask_whole_words
from pipeline.data.members import captions_of, image_bytes, image_id_of
from pipeline.data.plan import Plan, Slot, rank_slice
from pipeline.data.quarantine import BadRecord, BadSample, Quarantine
from pipeline.data.randomness import CounterRandom, hash64, sample_random
from pipeline.data.samples import Sample, SampleReader
from pipeline.data.storage import Storage
from pipeline.data.text import Tokenizer

MAX_TRIES = 16  # candidates to replace one bad sample
IGNORED = -100  # the label of a padded masked place


@dataclass(frozen=True)
class Wants:
    """What the rows of a stage hold, decided by its sources' use and its objectives."""

    image: bool
    text: bool
    masked_text: bool
    masked_image: bool

    @staticmethod
    def of(config: RunConfig, stage: StageConfig) -> Wants:
        use, objectives = config.use_of(stage), stage.objectives
        both = "contrastive" in objectives or "matching" in objectives
        masked_text, masked_image = "masked_language" in objectives, "masked_image" in objectives
        fused = masked_text and use == "pairs"  # masked words of a pair are read beside its picture
        return Wants(
            image=both or fused or masked_image,
            text=both or masked_text,
            masked_text=masked_text,
            masked_image=masked_image,
        )


@dataclass(frozen=True)
class Row:
    """One row before it is padded; its pixels already lie in the batch."""

    place: int
    source: str
    uid: int
    image_id: int
    text: np.ndarray | None = None  # (L,) int64
    masked: Masked | None = None
    patches: np.ndarray | None = None  # (K,) int64
    bad: BadRecord | None = None  # the sample that was planned here, when another took its place


@dataclass
class _Pending:
    """A batch in preparation: runs of rows on their way, and the pixels they write to."""

    step: int
    image: Tensor | None  # (B, S, S, 3) uint8
    runs: list[Future[list[Row]]]


class Loader:
    """One rank's batches of one stage. Steps count from the stage's start.

    Raises ConfigError, DataError or StorageError when a source cannot be used. Close it, or use it in `with`.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        storage: Storage,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
    ):
        cv2.setNumThreads(0)  # rows are the unit of parallel work; OpenCV's own threads would only contend
        self._config, self._stage, self._tokenizer = config, stage, tokenizer
        self._seed = hash64(config.seed, stage.name)  # stages that read one source see it in different orders
        self._wants = Wants.of(config, stage)
        self._places = rank_slice(stage.batch, rank, world_size)
        self._world_size = world_size
        sources = {name: _source(config, storage, name) for name in stage.sources}
        self._sizes = {name: manifest.num_samples for name, (_, manifest) in sources.items()}
        self.plan = Plan(
            {name: (sources[name][1], weight, config.sources[name].use) for name, weight in stage.sources.items()},
            lanes=config.data.lanes,
            window=config.data.window,
            seed=self._seed,
            batch=stage.batch,
            extra=_row_recipe(config, stage, tokenizer, self._wants),
        )
        self._reader = SampleReader(storage, sources)
        self._quarantine = Quarantine(config.data.max_bad_rate)
        self._read_before: dict[str, float] = dict.fromkeys(self._sizes, 0.0)
        self._pools: set[ThreadPoolExecutor] = set()
        self.wait_seconds = 0.0  # that the consumer of `batches` has waited for data

    @property
    def digest(self) -> str:
        """Names the order and content of every batch; a run only resumes with the digest it began with."""
        return self.plan.digest

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … without end. What went wrong with a batch is raised in its turn."""
        seen = self._quarantine.seen
        epochs = self.plan.epochs(start_step)
        self._read_before = {n: epochs[n] / self._world_size - seen[n] / self._sizes[n] for n in epochs}
        loader = self._config.data.loader
        pool = ThreadPoolExecutor(loader.threads, thread_name_prefix="loader")
        self._pools.add(pool)
        pending: deque[_Pending] = deque()
        step = start_step
        try:
            while pool in self._pools:
                while len(pending) <= loader.prefetch_batches:
                    pending.append(self._begin(pool, step))
                    step += 1
                yield self._finish(pending.popleft())
        finally:
            self._end(pool)

    def counts(self) -> dict[str, int | float]:
        """For the tracker: bad samples, samples and epochs of each source; the sums over ranks are the whole run's."""
        counts: dict[str, int | float] = {}
        for name, size in self._sizes.items():
            seen = self._quarantine.seen[name]
            counts[f"bad/{name}"] = self._quarantine.bad[name]
            counts[f"samples/{name}"] = seen
            counts[f"epochs/{name}"] = self._read_before[name] + seen / size
        return counts

    def quarantined(self) -> list[dict[str, str | int]]:
        """The bad samples delivered as replacements since the last call, as records for a JSONL log."""
        return [record.as_json() for record in self._quarantine.drain()]

    def close(self) -> None:
        """Ends every thread. Iterators in use end at their next batch."""
        for pool in list(self._pools):
            self._end(pool)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self, pool: ThreadPoolExecutor) -> None:
        self._pools.discard(pool)
        pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, step: int) -> _Pending:
        size = self._config.model.image_size
        image = torch.empty((len(self._places), size, size, 3), dtype=torch.uint8) if self._wants.image else None
        # A few rows a task: one by one, handing them over would cost a twentieth of preparing them.
        length = max(1, len(self._places) // (4 * self._config.data.loader.threads))
        runs = [self._places[first : first + length] for first in range(0, len(self._places), length)]
        return _Pending(step, image, [pool.submit(self._prepare_run, step, run, image) for run in runs])

    def _finish(self, pending: _Pending) -> Batch:
        started = time.perf_counter()
        try:
            rows = [row for run in pending.runs for row in run.result()]
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._quarantine.deliver((row.source for row in rows), (row.bad for row in rows if row.bad is not None))
        if pending.step == self._stage.steps - 1:
            self._quarantine.finish()
        return self._collate(pending.step, rows, pending.image)

    def _prepare_run(self, step: int, places: range, image: Tensor | None) -> list[Row]:
        first = self._places.start
        pixels = [None if image is None else image[place - first].numpy() for place in places]
        return [self._prepare(step, place, out) for place, out in zip(places, pixels, strict=True)]

    def _prepare(self, step: int, place: int, pixels: np.ndarray | None) -> Row:
        """The row of one place; when its sample is bad, the first good candidate's of the same window."""
        slot = self.plan.slot(step, place)
        sample = self._reader.read(slot)
        try:
            return self._row(sample, slot, place, pixels)
        except BadSample as error:
            bad = BadRecord(
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
        return self._replace(step, place, pixels, bad)

    def _replace(self, step: int, place: int, pixels: np.ndarray | None, bad: BadRecord) -> Row:
        for attempt in range(MAX_TRIES):
            slot = self.plan.replacement(step, place, attempt)
            sample = self._reader.read(slot)
            try:
                return self._row(sample, slot, place, pixels, bad)
            except BadSample:
                continue  # counted in the place that planned it
        raise DataError(
            f"source '{bad.source}': {bad.key} in {bad.shard} is bad ({bad.stage}: {bad.reason}), and so were "
            f"{MAX_TRIES} candidates around it. The shards do not hold what `use` says, or were built wrongly: "
            "look at them with mome shards show"
        )

    def _row(
        self, sample: Sample, slot: Slot, place: int, pixels: np.ndarray | None, bad: BadRecord | None = None
    ) -> Row:
        """Raises BadSample. Texts come first: they cost little, and a missing one spares the decoding."""

        def random(purpose: str) -> CounterRandom:
            return sample_random(self._seed, slot.epoch, sample.uid, purpose)

        config, stage = self._config, self._stage
        caption, text, masked, patches = "", None, None, None
        if self._wants.text:
            captions = captions_of(sample.members)
            caption = captions[random("caption").integer(len(captions))]
            tokens = self._tokenizer.encode(caption, stage.max_text)
            if len(tokens) <= 2:
                raise BadSample("caption", f"no token is left of {caption[:40]!r}")
            text = np.array(tokens.ids, dtype=np.int64)
            if self._wants.masked_text:
                masking = stage.masking
                masked = mask_whole_words(
                    tokens, random("words"), masking.probability, masking.whole_word, self._tokenizer
                )
        if pixels is not None:
            picture = decode(image_bytes(sample.members), config.data.max_pixels)
            allow_flip = not (config.data.augment.flip_spares_sides and mentions_side(caption))
            pixels[:] = augment(picture, config.data.augment, config.model.image_size, random("augment"), allow_flip)
        if self._wants.masked_image:
            patches = mask_patches(config.model.num_patches, stage.masking.patches, random("patches"))
        return Row(
            place=place,
            source=slot.source,
            uid=sample.uid,
            image_id=image_id_of(sample.members) if self._wants.image else sample.uid,
            text=text,
            masked=masked,
            patches=patches,
            bad=None if bad is None else bad.replaced_with(sample.key),
        )

    def _collate(self, step: int, rows: list[Row], image: Tensor | None) -> Batch:
        batch = Batch(
            step=step,
            place=torch.tensor([row.place for row in rows], dtype=torch.int64),
            uid=torch.tensor([row.uid for row in rows], dtype=torch.int64),
            image_id=torch.tensor([row.image_id for row in rows], dtype=torch.int64),
            image=image,
        )
        members: dict[str, Tensor] = {}
        if self._wants.text:
            texts = [row.text for row in rows if row.text is not None]
            lengths = torch.tensor([len(text) for text in texts])
            members["text"] = padded(texts, self._tokenizer.pad_id)
            members["text_keep"] = torch.arange(members["text"].shape[1]) < lengths[:, None]
        if self._wants.masked_text:
            masks = [row.masked for row in rows if row.masked is not None]
            members["masked_text"] = padded([mask.ids for mask in masks], self._tokenizer.pad_id)
            members["mask_positions"] = padded([mask.positions for mask in masks], 0)
            members["mask_labels"] = padded([mask.labels for mask in masks], IGNORED)
        if self._wants.masked_image:
            patches = [row.patches for row in rows if row.patches is not None]
            members["patch_positions"] = torch.from_numpy(np.stack(patches))
        return replace(batch, **members)  # type: ignore[arg-type]  # no name in `members` is `step`


def _source(config: RunConfig, storage: Storage, name: str) -> tuple[str, Manifest]:
    if name not in config.sources:
        raise ConfigError(f"stage source '{name}' is not among the run's sources: {', '.join(config.sources)}")
    url = config.sources[name].shards
    return url, load_manifest(storage, url)


def _row_recipe(config: RunConfig, stage: StageConfig, tokenizer: Tokenizer, wants: Wants) -> list[str]:
    """Everything besides the order that decides what a row contains."""
    return [
        json.dumps(asdict(wants), sort_keys=True),
        config.data.augment.model_dump_json(),
        stage.masking.model_dump_json(),
        f"pixels {config.data.max_pixels} side {config.model.image_size} patches {config.model.num_patches}",
        f"text {stage.max_text} vocabulary {tokenizer.digest}" if wants.text else "no text",
    ]


def padded(rows: list[np.ndarray], value: int) -> Tensor:
    """Rows (L,) of different lengths as one (B, longest) int64 tensor, filled up with `value`."""
    tensor = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for filled, row in zip(tensor.numpy(), rows, strict=True):
        filled[: len(row)] = row
    return tensor


def fingerprint(
    config: RunConfig,
    stage: StageConfig,
    storage: Storage,
    tokenizer: Tokenizer,
    steps: range,
    world_size: int = 1,
    threads: int = 1,
) -> str:
    """SHA-256 (hex) of the global batches of some steps of a stage: every row's uid, pixels, text and masks.

    Rows are hashed without their padding, so that the result is the same for every `world_size` and `threads`.
    """
    loading = config.data.loader.model_copy(update={"threads": threads})
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loading})})
    loaders = [Loader(config, stage, storage, tokenizer, rank, world_size) for rank in range(world_size)]
    digest = hashlib.sha256()
    try:
        streams = [loader.batches(steps.start) for loader in loaders]
        for _ in steps:
            for stream in streams:
                hash_rows(digest, next(stream))
    finally:
        for loader in loaders:
            loader.close()
    return digest.hexdigest()


def hash_rows(digest: hashlib._Hash, batch: Batch) -> None:
    """Feeds every row of the batch, without its padding, to a hash."""
    for row in range(len(batch)):
        digest.update(np.array([batch.step, batch.place[row], batch.uid[row], batch.image_id[row]]).tobytes())
        for name, tensor in _real_members(batch, row).items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())


def _real_members(batch: Batch, row: int) -> dict[str, Tensor]:
    found = {}
    for name in ("image", "patch_positions"):
        if (tensor := getattr(batch, name)) is not None:
            found[name] = tensor[row]
    for name in ("text", "masked_text"):
        if (tensor := getattr(batch, name)) is not None and batch.text_keep is not None:
            found[name] = tensor[row][batch.text_keep[row]]
    if batch.mask_positions is not None and batch.mask_labels is not None:
        is_real = batch.mask_labels[row] != IGNORED
        found["mask_positions"] = batch.mask_positions[row][is_real]
        found["mask_labels"] = batch.mask_labels[row][is_real]
    return found
