"""Inspection of a run's quarantine: counts by source and reason, and some samples read again with their images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from pipeline.config.errors import DataError, MomeError
from pipeline.config.schema import RunConfig
from pipeline.config.stored import check_stored_url
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import image_bytes
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.manifest import load_index, load_manifest, shard_folder
from pipeline.data.storage import Storage, join
from pipeline.pages.page import thumbnail

MAX_SAMPLES = 24  # each is a read from the store
MAX_PER_REASON = 3
THUMBNAIL = 96  # maximum side in pixels


@dataclass(frozen=True)
class QuarantinedSample:
    """A bad sample and the reason that training recorded."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    stage: str  # of reading: members, caption, image, …
    reason: str

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.source, self.stage, self.reason


@dataclass(frozen=True)
class InspectedSample:
    """A bad sample read again: its image as a data URI, or None and the `error` that prevents showing it."""

    sample: QuarantinedSample
    times: int  # how often it was replaced, over all epochs and stages
    image: str | None
    error: str


@dataclass(frozen=True)
class QuarantineReport:
    total: int  # replaced samples, repetitions included
    by_reason: list[tuple[str, str, str, int, int]]  # source, stage, reason, distinct samples, times
    samples: list[InspectedSample]  # a few of each reason


def inspect_quarantine(config: RunConfig, storage: Storage, records: list[dict[str, Any]]) -> QuarantineReport:
    """Summarize a run's quarantine and read a few samples of each reason again."""
    names = [entry.name for entry in fields(QuarantinedSample)]
    times = Counter(QuarantinedSample(**{name: record[name] for name in names}) for record in records)
    kinds: dict[tuple[str, str, str], list[QuarantinedSample]] = {}
    for sample in times:
        kinds.setdefault(sample.kind, []).append(sample)
    counts = [(*kind, len(samples), sum(times[sample] for sample in samples)) for kind, samples in kinds.items()]
    # One of each kind before a second one of any, so that rare reasons are included.
    rounds = [samples[turn] for turn in range(MAX_PER_REASON) for samples in kinds.values() if turn < len(samples)]
    inspected = [_inspect(config, storage, sample, times[sample]) for sample in rounds[:MAX_SAMPLES]]
    return QuarantineReport(len(records), sorted(counts, key=lambda row: -row[-1]), inspected)


def _inspect(config: RunConfig, storage: Storage, sample: QuarantinedSample, times: int) -> InspectedSample:
    try:
        data = image_bytes(_members(storage, config.sources[sample.source].shards, sample))
        return InspectedSample(sample, times, thumbnail(decode(data, config.data.max_pixels), THUMBNAIL), "")
    except BadSample as bad:
        return InspectedSample(sample, times, None, bad.reason)
    except (MomeError, KeyError) as error:
        return InspectedSample(sample, times, None, f"not read again: {error}")


def _members(storage: Storage, url: str, sample: QuarantinedSample) -> dict[str, bytes]:
    """Read the sample's members at its recorded offset. Raises DataError if the shards have changed."""
    check_stored_url(url, f"sources.{sample.source}.shards")
    record = next((record for record in load_manifest(storage, url).shards if record.name == sample.shard), None)
    if record is None:
        raise DataError(f"{sample.shard} is no longer in the manifest of {url}")
    index = load_index(storage, url, record)
    number = next((n for n in range(len(index)) if index.first_offset(n) == sample.offset), None)
    if number is None or index.keys[number] != sample.key:
        raise DataError(f"{sample.shard} now has another sample at byte {sample.offset}")
    location = join(shard_folder(url), sample.shard)
    return {name: storage.read_range(location, at, at + size) for name, at, size in index.members(number)}
