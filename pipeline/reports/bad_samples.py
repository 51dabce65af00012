"""Bad samples looked at again: what was quarantined, by source and reason, with its picture where that decodes."""

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

PICTURES = 24  # looked at again, at most: each is a read from the store
EACH = 3  # of one source and reason
SIDE = 96  # pixels of a thumbnail


@dataclass(frozen=True)
class Fault:
    """A bad sample and what is wrong with it, as training found it."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    stage: str  # of reading that found it: members, caption, image, …
    reason: str

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.source, self.stage, self.reason


@dataclass(frozen=True)
class Rejected:
    """One bad sample looked at again. `picture` is a data URI; where there is none, `why` says what is in the way."""

    fault: Fault
    times: int  # it was met: once an epoch, in every stage that reads it
    picture: str | None
    why: str


@dataclass(frozen=True)
class Quarantined:
    total: int  # samples replaced, repetitions counted
    by_reason: list[tuple[str, str, str, int, int]]  # source, stage, reason, different samples, times
    samples: list[Rejected]  # some of each


def look_again(config: RunConfig, storage: Storage, records: list[dict[str, Any]]) -> Quarantined:
    """Sums up a run's quarantine and reads a few of its samples once more."""
    names = [each.name for each in fields(Fault)]
    times = Counter(Fault(**{name: record[name] for name in names}) for record in records)
    kinds: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in times:
        kinds.setdefault(fault.kind, []).append(fault)
    sums = [(*kind, len(faults), sum(times[fault] for fault in faults)) for kind, faults in kinds.items()]
    samples = [_look(config, storage, fault, times[fault]) for fault in _some(list(kinds.values()))]
    return Quarantined(len(records), sorted(sums, key=lambda row: -row[-1]), samples)


def _some(kinds: list[list[Fault]]) -> list[Fault]:
    """A few of each kind, rare ones included: no more of any until every kind had its share."""
    rounds = [faults[turn] for turn in range(EACH) for faults in kinds if turn < len(faults)]
    return rounds[:PICTURES]


def _look(config: RunConfig, storage: Storage, fault: Fault, times: int) -> Rejected:
    try:
        data = image_bytes(_members(storage, config.sources[fault.source].shards, fault))
        return Rejected(fault, times, thumbnail(decode(data, config.data.max_pixels), SIDE), "")
    except BadSample as bad:
        return Rejected(fault, times, None, bad.reason)
    except (MomeError, KeyError) as error:
        return Rejected(fault, times, None, f"not read again: {error}")


def _members(storage: Storage, url: str, fault: Fault) -> dict[str, bytes]:
    """The sample whose first byte is where the fault's was. Raises DataError where the shards have changed."""
    check_stored_url(url, f"sources.{fault.source}.shards")
    record = next((each for each in load_manifest(storage, url).shards if each.name == fault.shard), None)
    if record is None:
        raise DataError(f"{fault.shard} is no longer in the manifest of {url}")
    index = load_index(storage, url, record)
    number = next((n for n in range(len(index)) if index.first_offset(n) == fault.offset), None)
    if number is None or index.keys[number] != fault.key:
        raise DataError(f"{fault.shard} holds another sample at byte {fault.offset} now")
    location = join(shard_folder(url), fault.shard)
    return {name: storage.read_range(location, at, at + size) for name, at, size in index.members(number)}
