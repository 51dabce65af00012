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
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import SourceType
from pipeline.data.contents import members
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.images import decode
from pipeline.data.contents.regions import regions_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.index import SIDECAR, ShardRecord, index_tar
from pipeline.data.shards.manifest import (
    MANIFEST,
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
    check = partial(_check_shard, storage, url, source_type, max_pixels, classes)
    with ExitStack() as stack:
        if min(workers, len(names)) <= 1:
            reports: Iterator[ShardReport] = map(check, names, map(records.get, names))
        else:
            # Spawned, because a forked process would inherit the store's connections and locks.
            pool = ProcessPoolExecutor(min(workers, len(names)), multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            reports = pool.map(check, names, map(records.get, names))
        for done, name in enumerate(names, 1):
            try:
                report = next(reports)
            except BrokenProcessPool as error:
                raise DataError(
                    f"{name}: a checking process died at this shard or near it. Check the shards around it one by "
                    "one with --workers 1, or give the processes more memory"
                ) from error
            yield report
            if progress:
                progress(done, len(names), name)


def _check_shard(
    storage: Storage,
    url: str,
    source_type: SourceType,
    max_pixels: int,
    classes: int | None,  # number of classes in the list stored with the shards
    name: str,
    record: ShardRecord | None,
) -> ShardReport:
    """Walk one shard, judge its samples, and compare it with its record in the manifest and its sidecar."""
    location = join(shard_folder(url), name)
    samples, bad = 0, []

    def judge(sample: TarSample) -> None:
        nonlocal samples
        samples += 1
        if defect := sample_defect(sample, source_type, max_pixels, classes):
            bad.append(ShardFinding(name, sample.key, sample.members[0][1], defect.stage, defect.reason))

    try:
        info = storage.info(location)
        with open_tar(storage, location, info) as tar:
            index = index_tar(tar, info.etag, judge)
        if record is not None:
            check_size(location, record, index.bytes)
            if not record.is_trusted and index.digest != record.digest:
                raise DataError("the shard was replaced: its content is not the one that was indexed")
            if samples != record.samples:
                raise DataError(f"it has {samples} samples, and its manifest says {record.samples}")
        if record is not None and not record.is_trusted:
            stored = load_index(storage, url, record)
            arrays = ("first", "extension", "offset", "size", "crc", "image_id", "duplicate")
            if stored.keys != index.keys or not all(
                np.array_equal(getattr(stored, a), getattr(index, a)) for a in arrays
            ):
                raise DataError(f"its {SIDECAR} does not describe it. Delete that and run mome shards index")
    except (DataError, NotFound) as error:
        reason = "the shard is missing" if isinstance(error, NotFound) else str(error).removeprefix(f"{location}: ")
        return ShardReport(name, samples, tuple(bad), ShardFinding(name, "", 0, SHARD, reason))
    return ShardReport(name, samples, tuple(bad), skipped=dict(tar.skipped))


def sample_defect(
    sample: TarSample, source_type: SourceType, max_pixels: int, classes: int | None = None
) -> BadSample | None:
    """Return why training would quarantine a sample, judged in the loader's order; None if it would be read."""
    contents = sample.contents
    readers: dict[SourceType, Callable[..., object]] = {
        "pairs": members.captions_of,
        "text": members.captions_of,
        "regions": members.captions_of,
        "questions": members.question_of,
        "statements": members.statement_of,
        "labelled": partial(members.class_of, classes=classes),
    }
    try:
        with judging("members"):
            members.check_members(contents, sample.is_duplicate)
            if reader := readers.get(source_type):
                reader(contents)
            if source_type == "regions":
                regions_of(contents)
            images: tuple[bytes, ...] = ()
            if source_type == "statements":
                images = members.both_images(contents)
            elif source_type not in ("text", "regions"):
                images = (members.image_bytes(contents),)
        with judging("image"):
            for image in images:
                decode(image, max_pixels)
    except BadSample as error:
        return error
    return None
