"""Validation of every sample before training, by the loader's functions, so that check and training find the same."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.config.errors import DataError
from pipeline.config.schema import SourceType
from pipeline.data.contents import members
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.images import decode
from pipeline.data.contents.regions import regions_of
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.index import SIDECAR, ShardRecord, index_tar
from pipeline.data.shards.manifest import MANIFEST, check_size, load_index, load_manifest, parse_pattern, shard_names
from pipeline.data.shards.tar import TarSample, open_tar
from pipeline.data.storage import NotFound, Progress, Storage, join

SHARD = "shard"  # the stage of a finding that breaks the whole shard


class ShardFinding(NamedTuple):
    """Bad sample, or the reason why a shard is broken; fields as in `quarantine.BadRecord`."""

    shard: str
    key: str  # '' for a whole shard
    offset: int  # of the sample's first byte in the shard
    stage: str
    reason: str


class ShardReport(NamedTuple):
    """Findings of one shard."""

    shard: str
    samples: int  # walked
    bad: tuple[ShardFinding, ...] = ()
    broken: ShardFinding | None = None
    skipped: Mapping[str, int] = {}  # entries that belong to no sample, by kind


def check_shards(
    storage: Storage, url: str, source_type: SourceType, max_pixels: int, workers: int, progress: Progress | None = None
) -> Iterator[ShardReport]:
    """Yield a report on every shard, by name, compared with the manifest, if any. Raises DataError for no shard."""
    folder = parse_pattern(url).folder
    objects = storage.list_info(folder)
    records = {record.name: record for record in load_manifest(storage, url).shards} if MANIFEST in objects else {}
    tars = shard_names(url, objects) if any(name.endswith(".tar") for name in objects) or not records else []
    names = sorted({*tars, *records})
    classes = None  # without a list, the classes are whatever the shards have
    if source_type == "labelled" and CLASSES in objects:
        classes = len(Choices.from_bytes(storage.read(join(folder, CLASSES)), join(folder, CLASSES)))
    check = partial(_check_shard, storage, url, partial(sample_defect, source_type, max_pixels, classes))
    with ExitStack() as stack:
        reports: Iterator[ShardReport] = map(check, names, map(records.get, names))
        if min(workers, len(names)) > 1:  # spawned: a forked process would inherit the store's connections and locks
            pool = ProcessPoolExecutor(min(workers, len(names)), multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            reports = pool.map(check, names, map(records.get, names))
        for done, name in enumerate(names, 1):
            try:
                yield next(reports)
            except BrokenProcessPool as error:
                remedy = "Check the shards around it one by one with --workers 1, or give the processes more memory"
                raise DataError(f"{name}: a checking process died at this shard or near it. {remedy}") from error
            if progress:
                progress(done, len(names), name)


def _check_shard(
    storage: Storage, url: str, judge: Callable[[TarSample], BadSample | None], name: str, record: ShardRecord | None
) -> ShardReport:
    """Walk one shard, judge its samples, and compare it with its record in the manifest and its sidecar."""
    location = join(parse_pattern(url).folder, name)
    samples, bad = 0, []

    def visit(sample: TarSample) -> None:
        nonlocal samples
        samples += 1
        if defect := judge(sample):
            bad.append(ShardFinding(name, sample.key, sample.offsets[0], defect.stage, defect.reason))

    try:
        info = storage.info(location)
        with open_tar(storage, location, info) as tar:
            index = index_tar(tar, info.etag, visit)
        if record is not None:
            check_size(location, record, index.bytes)
            if not record.is_trusted and index.digest != record.digest:
                raise DataError("the shard was replaced: its content is not the one that was indexed")
            if samples != record.samples:
                raise DataError(f"it has {samples} samples, and its manifest says {record.samples}")
        if record is not None and not record.is_trusted:
            stored = load_index(storage, url, record)
            arrays = ("first", "extension", "offset", "size", "crc", "image_id", "duplicate")
            are_equal = (np.array_equal(getattr(stored, array), getattr(index, array)) for array in arrays)
            if stored.keys != index.keys or not all(are_equal):
                raise DataError(f"its {SIDECAR} does not describe it. Delete that and run mome shards index")
    except (DataError, NotFound) as error:
        reason = "the shard is missing" if isinstance(error, NotFound) else str(error).removeprefix(f"{location}: ")
        return ShardReport(name, samples, tuple(bad), ShardFinding(name, "", 0, SHARD, reason))
    return ShardReport(name, samples, tuple(bad), skipped=dict(tar.skipped))


def fitting_type(storage: Storage, url: str, shard: str, max_pixels: int) -> SourceType | None:
    """Return the most specific source type that a shard's first sample can be read as; None for none."""
    types: tuple[SourceType, ...] = ("pairs", "questions", "statements", "labelled", "regions", "text", "images")
    location = join(parse_pattern(url).folder, shard)
    with suppress(DataError, NotFound), open_tar(storage, location, storage.info(location)) as tar:
        for sample in tar.samples():
            return next((kind for kind in types if sample_defect(kind, max_pixels, None, sample) is None), None)
    return None


def sample_defect(source_type: SourceType, max_pixels: int, classes: int | None, sample: TarSample) -> BadSample | None:
    """Return why training would quarantine a sample, judged in the loader's order; None if it would be read."""
    contents = sample.contents
    images: tuple[bytes, ...] = ()
    try:
        with judging("members"):
            members.check_members(contents, sample.is_duplicate)
            if source_type in ("pairs", "text", "regions"):
                members.captions_of(contents)
            elif source_type != "images":
                members.annotation_of(contents, source_type, classes)
            if source_type == "regions":
                regions_of(contents)
            elif source_type != "text":
                prefixes = members.BOTH if source_type == "statements" else (("",),)
                images = tuple(members.image_bytes(contents, prefix) for prefix in prefixes)
        with judging("image"):
            for image in images:
                decode(image, max_pixels)
    except BadSample as error:
        return error
    return None
