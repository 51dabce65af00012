"""Bad samples looked at again: what was quarantined, by source and reason, with its picture where that decodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.config.errors import MomeError
from pipeline.config.schema import RunConfig
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
class Rejected:
    """One bad sample. `picture` is a data URI; without one, `why` says what keeps it from being shown."""

    source: str
    shard: str
    key: str
    offset: int
    stage: str  # of reading that found it: members, caption, image, …
    reason: str
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
    times = Counter((r["source"], r["shard"], r["key"], r["offset"], r["stage"], r["reason"]) for r in records)
    samples, repeats = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for (source, _, _, _, stage, reason), count in times.items():
        samples[source, stage, reason] += 1
        repeats[source, stage, reason] += count
    by_reason = [(*kind, samples[kind], count) for kind, count in repeats.most_common()]
    return Quarantined(len(records), by_reason, [_look(config, storage, *one, times[one]) for one in _some(times)])


def _some(times: Counter[tuple[str, str, str, int, str, str]]) -> list[tuple[str, str, str, int, str, str]]:
    """A few of each reason, rare reasons included: no more of any until every reason had its share."""
    kinds: dict[tuple[str, str, str], list[tuple[str, str, str, int, str, str]]] = {}
    for one in times:
        kinds.setdefault((one[0], one[4], one[5]), []).append(one)
    rounds = [found[turn] for turn in range(EACH) for found in kinds.values() if turn < len(found)]
    return rounds[:PICTURES]


def _look(
    config: RunConfig, storage: Storage, source: str, shard: str, key: str, offset: int, stage: str, reason: str, times: int
) -> Rejected:
    picture, why = None, ""
    try:
        data = image_bytes(_members(storage, config.sources[source].shards, shard, offset))
        picture = thumbnail(decode(data, config.data.max_pixels), SIDE)
    except BadSample as bad:
        why = f"no picture to show: {bad.reason}"
    except (MomeError, KeyError) as error:
        why = f"not read again: {error}"
    return Rejected(source, shard, key, offset, stage, reason, times, picture, why)


def _members(storage: Storage, url: str, shard: str, offset: int) -> dict[str, bytes]:
    """The members of the sample whose first byte is at `offset`. Raises DataError where the shards have changed."""
    manifest = load_manifest(storage, url)
    record = next((each for each in manifest.shards if each.name == shard), None)
    if record is None:
        raise BadSample("members", f"{shard} is no longer in the manifest of {url}")
    index = load_index(storage, url, record)
    number = next((n for n in range(len(index)) if index.span(n)[0] == offset), None)
    if number is None:
        raise BadSample("members", f"no sample begins at byte {offset} of {shard}: it was written anew")
    location = join(shard_folder(url), shard)
    return {name: storage.read_range(location, at, at + size) for name, at, size in index.members(number)}
