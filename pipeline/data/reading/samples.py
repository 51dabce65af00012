"""Samples by reference: read from local files or a store, verified against the index, prefetched for coming steps.

Every sample's bytes are compared with the checksum in the index, so that a changed shard is always detected.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pipeline.config.schema import LoaderConfig
from pipeline.data.contents.members import texts_of
from pipeline.data.order import SampleRef
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.randomness import hash64, signed
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, Prefetcher, PrefetchRequest
from pipeline.data.reading.shard_reader import CHUNK_BYTES, ShardReader, SharedResources
from pipeline.data.shards.index import ShardIndex, checksum
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import Storage

log = logging.getLogger(__name__)

_DOWNLOADS = 2  # concurrent prefetches of whole shards into the cache
_MAX_EARLY_STEPS = 64  # finished steps after one that is never finished
_BATCH = 16  # samples of a step when a source is iterated


@dataclass(frozen=True)
class Sample:
    """Undecoded bytes of one sample."""

    source: str
    shard: str
    key: str
    offset: int  # of its first byte in the shard
    uid: int  # int64; a hash of the shard's content and the number there, which identifies the sample in every run
    image_id: int  # int64; equal for samples with the same image, 0 without one
    is_duplicate: bool  # an earlier sample of the shard has the same key
    members: dict[str, bytes]  # extension -> content


class SampleReader:
    """Reads samples of `sources`, by name. Threads may share a reader; no thread starts before its first use.

    The constructor checks that the store has every shard, unless its source did so: a missing, truncated or replaced
    shard raises DataError, naming the shard. Remote shards go through `cache` if given. Close it after use.
    """

    def __init__(
        self,
        storage: Storage,
        sources: Mapping[str, Source],
        loader: LoaderConfig = LoaderConfig(),
        cache: NodeCache | None = None,
    ):
        self._loader = loader
        shortage = (
            f"data.loader.memory_bytes {loader.memory_bytes} is below what the open windows of this process need: "
            "chunks of shards are fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder"
        )
        self._shared = SharedResources(
            memory=PrefetchCache(loader.memory_bytes, shortage),
            files=PrefetchCache(max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)),
            requests=ThreadPoolExecutor(loader.max_concurrent_requests, thread_name_prefix="requests"),
            downloads=ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="downloads"),
            cache=cache,
            requests_per_download=max(2, loader.max_concurrent_requests // 2),
        )
        self._shards = {name: ShardReader(name, storage, source, self._shared) for name, source in sources.items()}
        self._prefetcher: Prefetcher | None = None
        self._finished, self._early = -1, set[int]()  # all steps up to `_finished` are finished, and `_early`
        self._lock = threading.Lock()

    def read(self, ref: SampleRef) -> Sample:
        """Return a sample. Raise DataError if its shard changed, StorageError if it cannot be read."""
        shards = self._shards[ref.source]
        view = shards.view(ref.shard)
        index, number = view.index, view.number(ref.sample)
        members, invalidate = shards.read(ref.shard, view, number)
        if checksum(data for _, data in members) != index.crc[number]:
            invalidate()  # the cached bytes may have been damaged in transit: read again
            members, _ = shards.read(ref.shard, view, number)
            if checksum(data for _, data in members) != index.crc[number]:
                raise shards.changed(ref.shard, f"sample '{index.keys[number]}' is not the one that was indexed")
        record = shards.records[ref.shard]
        return Sample(
            source=ref.source,
            shard=record.name,
            key=index.keys[number],
            offset=index.first_offset(number),
            uid=signed(hash64(record.digest, number)),
            image_id=int(index.image_id[number]),
            is_duplicate=bool(index.duplicate[number]),
            members=dict(members),
        )

    def index(self, ref: SampleRef) -> tuple[ShardIndex, int]:
        """Return the index of a sample's shard and the sample's number in it."""
        view = self._shards[ref.source].view(ref.shard)
        return view.index, view.number(ref.sample)

    def start_prefetch(self, refs: Callable[[int], Iterable[SampleRef]], step: int) -> None:
        """Prefetch the samples `refs(step)` of the steps from `step` on in a thread. Local files need no prefetch."""
        if all(shards.is_local for shards in self._shards.values()):
            return
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher.join()
        self._finished, self._early = step - 1, set()
        for cache in (self._shared.memory, self._shared.files):
            cache.restart(step)
        self._prefetcher = Prefetcher(lambda s: self._prefetch_step(refs(s), s), step, self._loader.read_ahead_bytes)

    def finish_step(self, step: int) -> None:
        """Mark all samples of `step` as read, and release what no later step needs. Steps may arrive out of order."""
        if (prefetcher := self._prefetcher) is None:
            return
        with self._lock:
            self._early.add(step)
            if len(self._early) > _MAX_EARLY_STEPS:
                self._finished = min(self._early) - 1
            while self._finished + 1 in self._early:
                self._finished += 1
                self._early.discard(self._finished)
            finished = self._finished
        self._shared.memory.finish_step(finished)
        self._shared.files.finish_step(finished)
        self._shared.files.release(HORIZON)
        prefetcher.finish_step(finished)

    def close(self) -> None:
        """End all threads after the requests in flight, and drop all cached data."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
        for cache in (self._shared.memory, self._shared.files):
            cache.close()
        for wait in (False, True):
            for pool in (self._shared.downloads, self._shared.requests):
                pool.shutdown(wait, cancel_futures=True)
        if self._prefetcher is not None:
            self._prefetcher.join()
            self._prefetcher = None

    def _prefetch_step(self, refs: Iterable[SampleRef], step: int) -> Iterator[PrefetchRequest]:
        """Yield the requests for the samples of remote sources, after loading their shards' indexes in parallel.

        A shard whose index cannot be loaded is skipped; its reader meets the failure.
        """
        remote = [ref for ref in refs if not self._shards[ref.source].is_local]
        keys = list(dict.fromkeys((ref.source, ref.shard) for ref in remote))
        for source, shard in keys:
            self._shards[source].prefetch_view(shard, step)
        views = {}
        for source, shard in keys:
            try:
                views[source, shard] = self._shards[source].view(shard)
            except Exception as error:
                log.debug("prefetching an index failed: %s", error)
        for ref in remote:
            if (view := views.get((ref.source, ref.shard))) is not None:
                yield self._shards[ref.source].prefetch(ref.shard, view, view.number(ref.sample))


def sample_refs(source: Source) -> Callable[[int, int], list[SampleRef]]:
    """Return `refs(start, stop)`, which lists samples of a source by their numbers in the manifest's order."""
    ends = np.cumsum(source.counts)

    def refs(start: int, stop: int) -> list[SampleRef]:
        numbers = np.arange(start, stop)
        shards = np.searchsorted(ends, numbers, side="right")
        samples = numbers - (ends - source.counts)[shards]
        places = zip(shards.tolist(), samples.tolist(), strict=True)
        return [SampleRef(source.url, 0, shard, sample) for shard, sample in places]

    return refs


def iter_samples(storage: Storage, source: str | Source, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """Yield the samples [start, stop) of a folder of shards, or all of them, in the manifest's order."""
    source = Source(source, load_manifest(storage, source)) if isinstance(source, str) else source
    end = int(source.counts.sum()) if stop is None else stop
    refs_between = sample_refs(source)

    def refs(step: int) -> list[SampleRef]:
        first = start + step * _BATCH
        return refs_between(first, max(first, min(first + _BATCH, end)))

    loader = LoaderConfig(memory_bytes=16 * CHUNK_BYTES, read_ahead_bytes=8 * CHUNK_BYTES)
    with closing(SampleReader(storage, {source.url: source}, loader)) as reader:
        reader.start_prefetch(refs, 0)
        for step in range(-(-(end - start) // _BATCH)):
            for ref in refs(step):
                yield reader.read(ref)
            reader.finish_step(step)


def iter_captions(storage: Storage, url: str) -> Iterator[str]:
    """Yield every text of a folder of shards of any source type, skipping samples without one."""
    for sample in iter_samples(storage, url):
        try:
            with judging("members"):
                texts = texts_of(sample.members)
        except BadSample:
            continue
        yield from texts
