"""Validation of shards before training: every shard is walked to its end, and every sample is decoded.

A bad sample is one that training would quarantine; a broken shard is one that it would refuse. The walk, the captions
and the images are judged by the functions of the loader, so that both find the same.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import SourceType
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import captions_of, check_members, class_of, image_bytes
from pipeline.data.contents.questions import both_images, question_of, statement_of
from pipeline.data.contents.regions import regions_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.index import SIDECAR, IndexBuilder, ShardIndex
from pipeline.data.shards.manifest import (
    MANIFEST,
    ShardRecord,
    check_size,
    load_index,
    load_manifest,
    shard_folder,
    shard_names,
)
from pipeline.data.shards.tar import TarSample, open_tar
from pipeline.data.storage import NotFound, Progress, Storage, join

SHARD = "shard"  # the stage of a finding that breaks the whole shard


@dataclass(frozen=True)
class ShardFinding:
    """Bad sample, or the reason why a shard is broken; fields as in `quarantine.BadRecord`."""

    shard: str
    key: str  # '' for a whole shard
    offset: int  # of the sample's first byte in the shard
    stage: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without the details of this sample, for counting."""
        return f"{self.stage}: {re.sub(r'[0-9]+', 'N', re.split(r'[:;(]', self.reason)[0]).strip()}"


@dataclass(frozen=True)
class ShardReport:
    """Findings of one shard."""

    shard: str
    samples: int  # walked
    bad: tuple[ShardFinding, ...] = ()
    broken: ShardFinding | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)  # entries that belong to no sample, by kind


@dataclass(frozen=True)
class _Task:
    """Arguments of a checking process."""

    storage: Storage
    url: str
    source_type: SourceType
    max_pixels: int
    classes: int | None  # number of classes in the list stored with the shards

    def __call__(self, shard: tuple[str, ShardRecord | None]) -> ShardReport:
        name, record = shard
        location = join(shard_folder(self.url), name)
        builder, bad = IndexBuilder(), []
        try:
            info = self.storage.info(location)
            with open_tar(self.storage, location, info) as tar:
                for sample in tar.samples():
                    builder.add(sample)
                    if defect := sample_defect(sample, self.source_type, self.max_pixels, self.classes):
                        offset = sample.members[0][1]
                        bad.append(ShardFinding(name, sample.key, offset, defect.stage, defect.reason))
            index = builder.finish(tar, info.etag)
            if record is not None:
                self._compare(record, location, index)
        except (DataError, NotFound) as error:
            reason = "the shard is missing" if isinstance(error, NotFound) else str(error).removeprefix(f"{location}: ")
            return ShardReport(name, len(builder), tuple(bad), ShardFinding(name, "", 0, SHARD, reason))
        return ShardReport(name, len(index), tuple(bad), skipped=dict(tar.skipped))

    def _compare(self, record: ShardRecord, location: str, index: ShardIndex) -> None:
        """Raise DataError unless a complete tar is the one that the manifest and its sidecar describe."""
        check_size(location, record, index.bytes)
        if not record.is_trusted and index.digest != record.digest:
            raise DataError(f"{location}: the shard was replaced: its content is not the one that was indexed")
        if len(index) != record.samples:
            raise DataError(f"{location}: it has {len(index)} samples, and its manifest says {record.samples}")
        if record.is_trusted:
            return
        stored = load_index(self.storage, self.url, record)
        arrays = ("first", "extension", "offset", "size", "crc", "image_id", "duplicate")
        if stored.keys != index.keys or not all(np.array_equal(getattr(stored, a), getattr(index, a)) for a in arrays):
            raise DataError(f"{location}: its {SIDECAR} does not describe it. Delete that and run mome shards index")


def check_shards(
    storage: Storage, url: str, source_type: SourceType, max_pixels: int, workers: int, progress: Progress | None = None
) -> Iterator[ShardReport]:
    """Yield a report on every shard of a folder or pattern, in the order of names, using `workers` processes.

    Shards are compared with the manifest, if there is one. Raises DataError if there is no shard, and StorageError if
    the store does not answer.
    """
    folder = shard_folder(url)
    objects = storage.list_info(folder)
    records = {record.name: record for record in load_manifest(storage, url).shards} if MANIFEST in objects else {}
    tars = shard_names(url, objects) if any(name.endswith(".tar") for name in objects) or not records else []
    names = sorted({*tars, *records})
    classes = None  # without a list, the classes are whatever the shards have
    if source_type == "labelled" and CLASSES in objects:
        classes = len(Choices.from_bytes(storage.read(join(folder, CLASSES)), join(folder, CLASSES)))
    task = _Task(storage, url, source_type, max_pixels, classes)
    shards = [(name, records.get(name)) for name in names]
    for done, report in enumerate(_in_processes(task, shards, min(workers, len(names))), 1):
        yield report
        if progress:
            progress(done, len(names), report.shard)


def sample_defect(
    sample: TarSample, source_type: SourceType, max_pixels: int, classes: int | None = None
) -> BadSample | None:
    """Return why training would quarantine a sample, judged in the loader's order; None if it would be read."""
    members = sample.contents
    readers: dict[SourceType, Callable[..., object]] = {
        "pairs": captions_of,
        "text": captions_of,
        "regions": captions_of,
        "questions": question_of,
        "statements": statement_of,
        "labelled": partial(class_of, classes=classes),
    }
    try:
        with judging("members"):
            check_members(members, sample.is_duplicate)
            if reader := readers.get(source_type):
                reader(members)
            if source_type == "regions":
                regions_of(members)
            images: tuple[bytes, ...] = ()
            if source_type not in ("text", "regions"):
                images = both_images(members) if source_type == "statements" else (image_bytes(members),)
        with judging("image"):
            for image in images:
                decode(image, max_pixels)
    except BadSample as error:
        return error
    return None


def _in_processes(
    task: Callable[[tuple[str, ShardRecord | None]], ShardReport],
    shards: list[tuple[str, ShardRecord | None]],
    workers: int,
) -> Iterator[ShardReport]:
    if workers <= 1:
        yield from map(task, shards)
        return
    # Spawned, because a forked process would inherit the store's connections and locks.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        reports = [pool.submit(task, shard) for shard in shards]
        for (name, _), report in zip(shards, reports, strict=True):
            try:
                yield report.result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"{name}: a checking process died at this shard or near it. Check the shards around it one by "
                    "one with --workers 1, or give the processes more memory"
                ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
