"""Samples by their place: read in large ranges, kept in bounded memory, and checked against what was indexed.

Remote shards are fetched in spans of at least 8 MiB of whole samples, each at most once while it is kept, whatever
number of threads ask. Local files are read sample by sample: the operating system keeps their pages already.
Every sample's bytes are compared with the checksum in its index, so that a changed shard is always found out.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pipeline.config.errors import DataError, StorageError
from pipeline.config.paths import is_local
from pipeline.data.manifest import (
    Manifest,
    ShardIndex,
    ShardRecord,
    check_present,
    check_size,
    load_index,
    load_manifest,
    shard_folder,
)
from pipeline.data.members import captions_of
from pipeline.data.plan import Slot
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64, signed
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join

SPAN = 8 * 2**20  # bytes of one request at least, where the shard has them
CACHE = 2**30  # bytes of remote spans kept in memory
_MAX_INDEXES = 1024


@dataclass(frozen=True)
class Sample:
    """One sample's bytes, undecoded."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    uid: int  # int64; the same wherever this sample is read
    members: dict[str, bytes]  # extension -> content


def sample_uid(record: ShardRecord, sample: int) -> int:
    """The name (int64) of a sample: a hash of its shard's content and its position there."""
    return signed(hash64(record.digest, sample))


class SampleReader:
    """Reads the slots of a plan from `sources`: name -> (URL, manifest). Threads may share one reader.

    Making one asks the store for every shard: a missing, truncated or replaced one raises DataError, by name.
    """

    def __init__(self, storage: Storage, sources: Mapping[str, tuple[str, Manifest]], cache_bytes: int = CACHE):
        self._shards = {name: _Shards(storage, url, manifest) for name, (url, manifest) in sources.items()}
        self._spans = _SpanCache(cache_bytes)

    def read(self, slot: Slot) -> Sample:
        """The sample of a slot. Raises DataError when its shard changed, StorageError when it cannot be reached."""
        shards = self._shards[slot.source]
        record = shards.manifest.shards[slot.shard]
        index = shards.index(slot.shard)
        members = self._members(shards, slot, index)
        if checksum(members) != index.crc[slot.sample]:
            self._spans.clear()  # what was kept may have been damaged on its way: read it once more
            members = self._members(shards, slot, index)
            if checksum(members) != index.crc[slot.sample]:
                raise shards.changed(slot.shard, f"sample '{index.keys[slot.sample]}' is not the one that was indexed")
        return Sample(
            source=slot.source,
            shard=record.name,
            key=index.keys[slot.sample],
            offset=index.span(slot.sample)[0],
            uid=sample_uid(record, slot.sample),
            members=dict(members),
        )

    def _members(self, shards: _Shards, slot: Slot, index: ShardIndex) -> list[tuple[str, bytes]]:
        if shards.is_local:
            start, stop = index.span(slot.sample)
            data = shards.fetch(slot.shard, start, stop)
        else:
            start, stop = span_of(index, slot.sample)
            key = (shards.location(slot.shard), start)
            data = self._spans.get(key, lambda: shards.fetch(slot.shard, start, stop))
        return [(name, data[at - start : at - start + size]) for name, at, size in index.members(slot.sample)]


def checksum(members: list[tuple[str, bytes]]) -> int:
    """CRC-32 of the members' contents, end to end."""
    crc = 0
    for _, data in members:
        crc = zlib.crc32(data, crc)
    return crc


def samples_of_source(storage: Storage, url: str) -> Iterator[Sample]:
    """Every sample of a folder of shards once, in the manifest's order."""
    manifest = load_manifest(storage, url)
    reader = SampleReader(storage, {url: (url, manifest)}, cache_bytes=4 * SPAN)
    for shard, record in enumerate(manifest.shards):
        for sample in range(record.samples):
            yield reader.read(Slot(url, 0, shard, sample))


def captions_of_source(storage: Storage, url: str) -> Iterator[str]:
    """Every caption or text of a folder of shards. Samples without one are passed over: training counts them."""
    for sample in samples_of_source(storage, url):
        try:
            yield from captions_of(sample.members)
        except BadSample:
            continue


def span_of(index: ShardIndex, sample: int) -> tuple[int, int]:
    """The bytes [start, stop) to fetch for a sample: at least 8 MiB of whole samples, or the whole shard."""
    starts = index.offset[index.first[:-1]]
    bounds = _span_bounds(starts, int(index.bytes))
    number = int(np.searchsorted(bounds, sample, side="right")) - 1
    return index.span(bounds[number])[0], index.span(bounds[number + 1] - 1)[1]


def _span_bounds(starts: np.ndarray, num_bytes: int) -> list[int]:
    """Sample numbers at which spans begin, and the number of samples at the end."""
    bounds = [0]
    while num_bytes - starts[bounds[-1]] >= 2 * SPAN:  # what is left becomes one span, so none is below 8 MiB
        following = int(np.searchsorted(starts, starts[bounds[-1]] + SPAN))
        if following >= len(starts):
            break
        bounds.append(following)
    return [*bounds, len(starts)]


class _Shards:
    """One source's shards: their indexes, and reads that tell a changed shard from a store that fails."""

    def __init__(self, storage: Storage, url: str, manifest: Manifest):
        self._storage, self._url, self.manifest = storage, url, manifest
        self._folder = shard_folder(url)
        self.is_local = is_local(url)
        self._seen = check_present(storage, url, manifest)
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def location(self, shard: int) -> str:
        return join(self._folder, self.manifest.shards[shard].name)

    def index(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = load_index(self._storage, self._url, self.manifest.shards[shard])
        with self._lock:
            self._indexes[shard] = index
            if len(self._indexes) > _MAX_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def fetch(self, shard: int, start: int, stop: int) -> bytes:
        location = self.location(shard)
        # A remote shard is pinned to the version seen at the start; a local one is known by its checksums alone.
        etag = None if self.is_local else self._seen[self.manifest.shards[shard].name].etag
        try:
            return self._storage.read_range(location, start, stop, etag)
        except ObjectChanged as error:
            raise self.changed(shard, "it was replaced while the run read it") from error
        except NotFound as error:
            raise DataError(f"{location}: the shard is missing, and was there at first. Put it back") from error
        except StorageError:
            check_size(location, self.manifest.shards[shard], self._storage.info(location).size)
            raise

    def changed(self, shard: int, how: str) -> DataError:
        return DataError(
            f"{self.location(shard)}: the shard was changed: {how}. "
            "Restore it, or index the folder again (mome shards index) and start a new run"
        )


class _SpanCache:
    """Fetched spans, the longest unused leaving first when they exceed `most` bytes; each fetched by one thread."""

    def __init__(self, most: int):
        self._most, self._held = most, 0
        self._spans: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int], fetch: Callable[[], bytes]) -> bytes:
        with self._lock:
            span = self._spans.get(key)
            is_ours = span is None
            if span is None:
                span = self._spans[key] = Future()
            self._spans.move_to_end(key)
        if is_ours:
            self._fill(key, span, fetch)
        return span.result()

    def clear(self) -> None:
        with self._lock:
            for key in [key for key, span in self._spans.items() if span.done()]:
                self._drop(key)

    def _fill(self, key: tuple[str, int], span: Future[bytes], fetch: Callable[[], bytes]) -> None:
        try:
            data = fetch()
        except BaseException as error:
            with self._lock:
                self._spans.pop(key, None)
            span.set_exception(error)
            return
        with self._lock:
            span.set_result(data)
            self._held += len(data)
            while self._held > self._most:
                oldest = next((k for k, s in self._spans.items() if s.done() and k != key), None)
                if oldest is None:
                    return
                self._drop(oldest)

    def _drop(self, key: tuple[str, int]) -> None:
        self._held -= len(self._spans.pop(key).result())
