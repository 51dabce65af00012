"""The checks that training makes, ahead of it: every shard walked to its end, every sample decoded.

A bad sample is one that training would quarantine; a broken shard is one that it would refuse. The walk, the captions
and the pictures are judged by the functions that the loader uses, so that both find the same.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import SourceType
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import Members, captions_of, check_members, class_of, image_bytes
from pipeline.data.contents.questions import both_images, question_of, statement_of
from pipeline.data.contents.regions import regions_of
from pipeline.data.parallel import Progress
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
from pipeline.data.storage import NotFound, Storage, join

SHARD = "shard"  # the stage of what makes a shard broken


@dataclass(frozen=True)
class ShardFinding:
    """One bad sample, or one reason why a shard is broken; fields as in `quarantine.BadRecord`."""

    shard: str
    key: str  # '' for a shard as a whole
    offset: int  # of the sample's first byte in the shard
    stage: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what is particular to this sample, to count by."""
        return f"{self.stage}: {re.sub(r'[0-9]+', 'N', re.split(r'[:;(]', self.reason)[0]).strip()}"

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(frozen=True)
class ShardReport:
    """What was found in one shard."""

    shard: str
    samples: int  # walked
    bad: tuple[ShardFinding, ...] = ()
    broken: ShardFinding | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)  # entries that are no sample's, by what they are


@dataclass(frozen=True)
class _Question:
    """What a checking process is asked about each shard."""

    storage: Storage
    url: str
    source_type: SourceType
    max_pixels: int
    classes: int | None  # that the list beside the shards names


def check_shards(
    storage: Storage, url: str, source_type: SourceType, max_pixels: int, workers: int, progress: Progress | None = None
) -> Iterator[ShardReport]:
    """A report on every shard of a folder or pattern, in the order of their names, by `workers` processes.

    Without a manifest the tars are checked for themselves; with one, against what it says. Raises DataError when
    there is no shard at all, StorageError when the store does not answer.
    """
    folder = shard_folder(url)
    found = storage.list_info(folder)
    listed = load_manifest(storage, url).shards if MANIFEST in found else ()
    records = {record.name: record for record in listed}
    tars = shard_names(url, found) if any(name.endswith(".tar") for name in found) or not records else []
    names = sorted({*tars, *records})
    call = partial(
        _check_shard,
        _Question(storage, url, source_type, max_pixels, _num_classes(storage, folder, source_type, found)),
    )
    reports = _in_processes(call, [(name, records.get(name)) for name in names], min(workers, len(names)))
    for done, report in enumerate(reports, 1):
        yield report
        if progress:
            progress(done, len(names), report.shard)


def _num_classes(storage: Storage, folder: str, source_type: SourceType, found: Collection[str]) -> int | None:
    """The classes that a list beside the shards names, which a stage that trains on them must have; None without."""
    if source_type != "labelled" or CLASSES not in found:
        return None
    return len(Choices.from_bytes(storage.read(join(folder, CLASSES)), join(folder, CLASSES)))


def sample_defect(
    sample: TarSample, source_type: SourceType, max_pixels: int, classes: int | None = None
) -> BadSample | None:
    """Why training would quarantine a sample; None when it would read it. Judged in the loader's own order."""
    members = sample.contents
    try:
        with judging("members"):
            check_members(members, sample.is_duplicate)
            _read_annotations(members, source_type, classes)
            encoded = _pictures(members, source_type)
        with judging("image"):
            for each in encoded:
                decode(each, max_pixels)
    except BadSample as error:
        return error
    return None


def _read_annotations(members: Members, source_type: SourceType, classes: int | None) -> None:
    """Raises BadSample when what the use reads beside pictures is missing."""
    if source_type in ("pairs", "text", "regions"):
        captions_of(members)
    elif source_type == "questions":
        question_of(members)
    elif source_type == "statements":
        statement_of(members)
    elif source_type == "labelled":
        class_of(members, classes)
    if source_type == "regions":
        regions_of(members)


def _pictures(members: Members, source_type: SourceType) -> tuple[bytes, ...]:
    """The encoded pictures that the use reads. Raises BadSample when one is missing."""
    if source_type in ("text", "regions"):
        return ()
    return both_images(members) if source_type == "statements" else (image_bytes(members),)


def _check_shard(question: _Question, shard: tuple[str, ShardRecord | None]) -> ShardReport:
    name, record = shard
    location = join(shard_folder(question.url), name)
    builder, bad = IndexBuilder(), []
    try:
        info = question.storage.info(location)
        with open_tar(question.storage, location, info) as tar:
            for sample in tar.samples():
                builder.add(sample)
                if fault := sample_defect(sample, question.source_type, question.max_pixels, question.classes):
                    bad.append(ShardFinding(name, sample.key, sample.offset, fault.stage, fault.reason))
        index = builder.finish(tar, info.etag)
        if record is not None:
            _compare(question, record, location, index)
    except (DataError, NotFound) as error:
        reason = "the shard is missing" if isinstance(error, NotFound) else str(error).removeprefix(f"{location}: ")
        return ShardReport(name, len(builder), tuple(bad), ShardFinding(name, "", 0, SHARD, reason))
    return ShardReport(name, len(index), tuple(bad), skipped=dict(tar.skipped))


def _compare(question: _Question, record: ShardRecord, location: str, index: ShardIndex) -> None:
    """Raises DataError when a whole tar is not the one that the manifest and its sidecar describe."""
    check_size(location, record, index.bytes)
    if not record.is_trusted and index.digest != record.digest:
        raise DataError(f"{location}: the shard was replaced: its content is not the one that was indexed")
    if len(index) != record.samples:
        raise DataError(f"{location}: it holds {len(index)} samples, and its manifest says {record.samples}")
    if record.is_trusted:
        return
    stored = load_index(question.storage, question.url, record)
    arrays = ("first", "extension", "offset", "size", "crc", "image_id", "duplicate")
    if stored.keys != index.keys or not all(np.array_equal(getattr(stored, a), getattr(index, a)) for a in arrays):
        raise DataError(f"{location}: its {SIDECAR} does not describe it. Delete that and run mome shards index")


def _in_processes(
    call: Callable[[tuple[str, ShardRecord | None]], ShardReport],
    shards: list[tuple[str, ShardRecord | None]],
    workers: int,
) -> Iterator[ShardReport]:
    if workers <= 1:
        yield from map(call, shards)
        return
    # Spawned: a forked process would inherit the store's connections and locks.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        reports: list[Future[ShardReport]] = [pool.submit(call, shard) for shard in shards]
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
