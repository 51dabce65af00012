"""Samples by their place: read from where their shard lies, and checked against what was indexed.

Every sample's bytes are compared with the checksum in its index, so that a changed shard is always found out. Remote
shards are read in large spans kept in bounded memory, or whole in the node's cache, and ahead of need when the reader
is told which steps are coming.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.config.schema import LoaderConfig
from pipeline.data.contents.members import texts_of
from pipeline.data.order import SampleRef
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.randomness import hash64, signed
from pipeline.data.reading.cache import CachedShard, NodeCache
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, Prefetcher, PrefetchRequest
from pipeline.data.reading.shard_reader import (
    CHUNK_BYTES,
    CacheStrategy,
    ChunkStrategy,
    LocalStrategy,
    OpenFile,
    ReadStrategy,
    ShardReader,
    ShardView,
)
from pipeline.data.shards.index import ShardIndex, checksum
from pipeline.data.shards.manifest import ShardRecord, load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

_DOWNLOADS = 2  # shards on their way to the cache at once, beside those that readers wait for
_MOST_EARLY = 64  # steps told as reached before one that never is
_CHUNK = 16  # samples of a step, when a source is read from end to end


@dataclass(frozen=True)
class Sample:
    """One sample's bytes, undecoded."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    uid: int  # int64; the same wherever this sample is read
    image_id: int  # int64; equal for samples that show the same image, 0 where there is none
    is_duplicate: bool  # an earlier sample of the shard has its key
    members: dict[str, bytes]  # extension -> content


def sample_uid(record: ShardRecord, sample: int) -> int:
    """The name (int64) of a sample: a hash of its shard's content and its position there."""
    return signed(hash64(record.digest, sample))


class SampleReader:
    """Reads the slots of a plan from `sources`, by name. Threads may share one reader; no thread starts before its use.

    Making one asks the store for every shard, unless its source was asked already: a missing, truncated or replaced one
    raises DataError, by name. Remote shards go through `cache` where one is given. Close it, or use it in `with`.
    """

    def __init__(
        self,
        storage: Storage,
        sources: Mapping[str, Source],
        loader: LoaderConfig = LoaderConfig(),
        cache: NodeCache | None = None,
    ):
        self._shards = {name: ShardReader(storage, source) for name, source in sources.items()}
        self._loader = loader
        self._memory: PrefetchCache[Any] = PrefetchCache(loader.memory_bytes, self._tell_shortage)  # indexes and spans
        descriptors = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._files: PrefetchCache[OpenFile] = PrefetchCache(descriptors)
        self._pins: PrefetchCache[CachedShard] = PrefetchCache(descriptors)
        self._requests = ThreadPoolExecutor(loader.max_concurrent_requests, thread_name_prefix="requests")
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="downloads")
        self._access = {name: self._access_to(name, cache) for name in sources}
        self._ahead: Prefetcher | None = None
        self._passed, self._early = -1, set[int]()  # all steps up to `_passed` are reached, and these besides
        self._has_told = False
        self._lock = threading.Lock()

    def read(self, slot: SampleRef) -> Sample:
        """The sample of a slot. Raises DataError when its shard changed, StorageError when it cannot be reached."""
        shards, access = self._shards[slot.source], self._access[slot.source]
        opened = self._open(slot.source, slot.shard)
        index, number = opened.index, opened.number(slot.sample)
        members, invalidate = access.read(slot.shard, opened, number)
        if checksum(data for _, data in members) != index.crc[number]:
            invalidate()  # what was kept may have been damaged on its way: once more
            members, _ = access.read(slot.shard, opened, number)
            if checksum(data for _, data in members) != index.crc[number]:
                raise shards.changed(slot.shard, f"sample '{index.keys[number]}' is not the one that was indexed")
        record = shards.record(slot.shard)
        return Sample(
            source=slot.source,
            shard=record.name,
            key=index.keys[number],
            offset=index.place(number),
            uid=sample_uid(record, number),
            image_id=int(index.image_id[number]),
            is_duplicate=bool(index.duplicate[number]),
            members=dict(members),
        )

    def index(self, slot: SampleRef) -> tuple[ShardIndex, int]:
        """The index of the slot's shard, without the json's fields, and the sample's number in it."""
        opened = self._open(slot.source, slot.shard)
        return opened.index, opened.number(slot.sample)

    def follow(self, slots: Callable[[int], Iterable[SampleRef]], step: int) -> None:
        """Reads ahead from `step` on, in a thread; `slots(step)` gives what a step will read."""
        self._stop_following()
        if all(shards.is_local for shards in self._shards.values()):
            return
        self._passed, self._early = step - 1, set()
        for store in (self._memory, self._pins):
            store.restart(step)
        self._ahead = Prefetcher(lambda later: self._needs(slots(later), later), step, self._loader.read_ahead_bytes)

    def reached(self, step: int) -> None:
        """All of `step` is read: what no later step needs may go. Steps may be told a little out of their order."""
        if (ahead := self._ahead) is None:
            return
        with self._lock:
            self._early.add(step)
            if len(self._early) > _MOST_EARLY:
                self._passed = min(self._early) - 1
            while self._passed + 1 in self._early:
                self._passed += 1
                self._early.discard(self._passed)
            passed = self._passed
        self._memory.reached(passed)
        self._pins.reached(passed)
        self._pins.release(HORIZON)
        ahead.reached(passed)

    def close(self) -> None:
        """Ends every thread, once the requests in flight are answered, and lets go of all that is kept."""
        if self._ahead is not None:
            self._ahead.stop()
        for store in (self._memory, self._files, self._pins):
            store.close()
        for pool in (self._downloads, self._requests):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._downloads, self._requests):
            pool.shutdown(wait=True)
        self._stop_following()

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _access_to(self, name: str, cache: NodeCache | None) -> ReadStrategy:
        shards = self._shards[name]
        if shards.is_local:
            return LocalStrategy(name, shards, self._files)
        spans = ChunkStrategy(name, shards, self._memory, self._requests)
        if cache is None:
            return spans
        each = max(2, self._loader.max_concurrent_requests // 2)
        return CacheStrategy(name, shards, cache, self._pins, spans, self._downloads, self._requests, each)

    def _open(self, source: str, shard: int) -> ShardView:
        shards = self._shards[source]
        return self._memory.get((source, shard), shards.index_bytes(shard), partial(shards.open, shard))

    def _stop_following(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead.join()
            self._ahead = None

    def _needs(self, slots: Iterable[SampleRef], step: int) -> Iterator[PrefetchRequest]:
        """What the slots of remote sources need. A shard without a good index is left to whoever reads it."""
        remote = [slot for slot in slots if not self._shards[slot.source].is_local]
        opened = self._open_together(dict.fromkeys((slot.source, slot.shard) for slot in remote), step)
        for slot in remote:
            if (shard := opened.get((slot.source, slot.shard))) is not None:
                yield self._access[slot.source].need(slot.shard, shard, shard.number(slot.sample))

    def _open_together(self, wanted: Iterable[tuple[str, int]], step: int) -> dict[tuple[str, int], ShardView]:
        keys = list(wanted)
        for source, shard in keys:
            shards = self._shards[source]
            size = shards.index_bytes(shard)
            if self._memory.need((source, shard), size, step):
                self._memory.ask((source, shard), size, partial(shards.open, shard), self._requests.submit)
        opened = {}
        for source, shard in keys:
            try:
                opened[source, shard] = self._open(source, shard)
            except Exception as error:
                log.debug("reading ahead: %s", error)
        return opened

    def _tell_shortage(self) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning(
                "data.loader.memory_bytes %d holds less than the open windows of this process need: parts of shards "
                "are fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder",
                self._loader.memory_bytes,
            )


def slots_of(source: Source) -> Callable[[int, int], list[SampleRef]]:
    """`slots(start, stop)`: the samples of a source from one number to another, in the manifest's order."""
    ends = np.cumsum(source.counts)

    def slots(start: int, stop: int) -> list[SampleRef]:
        numbers = np.arange(start, stop)
        shards = np.searchsorted(ends, numbers, side="right")
        samples = numbers - (ends - source.counts)[shards]
        places = zip(shards.tolist(), samples.tolist(), strict=True)
        return [SampleRef(source.url, 0, shard, sample) for shard, sample in places]

    return slots


def iter_samples(storage: Storage, source: str | Source, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """Samples `start` to `stop`, or all, of a folder of shards, each once, in the manifest's order."""
    opened = Source(source, load_manifest(storage, source)) if isinstance(source, str) else source
    end = int(opened.counts.sum()) if stop is None else stop
    between = slots_of(opened)

    def slots(step: int) -> list[SampleRef]:
        first = start + step * _CHUNK
        return between(first, max(first, min(first + _CHUNK, end)))

    loader = LoaderConfig(memory_bytes=16 * CHUNK_BYTES, read_ahead_bytes=8 * CHUNK_BYTES)
    with SampleReader(storage, {opened.url: opened}, loader) as reader:
        reader.follow(slots, 0)
        for step in range(-(-(end - start) // _CHUNK)):
            for slot in slots(step):
                yield reader.read(slot)
            reader.reached(step)


def iter_captions(storage: Storage, url: str) -> Iterator[str]:
    """Every text of a folder of shards, of any use. Samples without one are passed over: training counts them."""
    for sample in iter_samples(storage, url):
        try:
            with judging("members"):
                texts = texts_of(sample.members)
        except BadSample:
            continue
        yield from texts
