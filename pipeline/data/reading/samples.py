"""Samples by reference: read from local files or a store, verified against the index, prefetched for coming steps.

Every sample's bytes are compared with the checksum in the index, so that a changed shard is always detected. A remote
shard is fetched into memory in chunks of at least 8 MiB of whole samples, because a request costs more than decoding a
sample, or as a whole into the node's cache.
"""

import logging
import os
import resource
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.errors import DataError, StorageError
from pipeline.config.schema import LoaderConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.contents.members import texts_of
from pipeline.data.order import SampleRef
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.randomness import hash64, signed
from pipeline.data.reading.cache import CacheFull, NodeCache, OpenShard
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, Prefetcher, PrefetchRequest
from pipeline.data.shards.index import ShardIndex, checksum
from pipeline.data.shards.manifest import check_present, check_size, load_index, load_manifest, shard_folder
from pipeline.data.shards.source import Source
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20  # minimum bytes of one request, unless the shard is smaller
_VIEW_BYTES, _INDEX_BYTES = 4096, 256  # approximate memory of a shard's view, and in addition of each sample in it
_RETRY_CACHE_SECONDS = 10.0  # for which a shard without room in the cache is read in chunks
_DOWNLOADS = 2  # concurrent prefetches of whole shards into the cache
_BATCH = 16  # samples of a step when a source is iterated
_CHANGED = (
    "{}: the shard was changed: {}. Restore it, or index the folder again (mome shards index) and start a new run"
)

Members = list[tuple[str, bytes]]  # (extension, content), in the tar's order


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


class Chunk(NamedTuple):
    """Bytes [start, stop) of a shard that are fetched together, and the number of selected samples in them."""

    start: int
    stop: int
    num_selected: int


@dataclass(frozen=True, eq=False)
class ShardView:
    """Index of a shard without its metadata columns, the selected samples, and the chunks to fetch."""

    index: ShardIndex
    selected: np.ndarray | None  # numbers of the selected samples; None: all
    bounds: list[int]  # the sample numbers at which chunks begin, and the number of samples
    chunks: list[Chunk]

    def number(self, sample: int) -> int:
        """Return the number in the shard of the `sample`-th selected one."""
        return sample if self.selected is None else int(self.selected[sample])

    def chunk(self, number: int) -> Chunk:
        """Return the chunk that contains a sample."""
        return self.chunks[bisect_right(self.bounds, number) - 1]


def make_shard_view(index: ShardIndex, selected: np.ndarray | None = None) -> ShardView:
    """Split a shard into chunks of at least 8 MiB, or a single chunk if it is smaller."""
    starts = np.maximum.accumulate(index.offset[index.first[:-1]])  # a hard link's data precedes its position
    bounds = [0]
    while len(starts) and index.bytes - starts[bounds[-1]] >= 2 * CHUNK_BYTES:  # so that the last is not too small
        following = int(np.searchsorted(starts, starts[bounds[-1]] + CHUNK_BYTES))
        if following >= len(starts):
            break
        bounds.append(following)
    bounds.append(len(starts))
    counts = np.diff(bounds if selected is None else np.searchsorted(selected, bounds)).tolist()
    spans = zip(pairwise(bounds), counts, strict=True)
    chunks = [Chunk(*index.byte_range(first, stop), count) for (first, stop), count in spans if first < stop]
    return ShardView(replace(index, columns={}), selected, bounds, chunks)


@dataclass(eq=False)
class _OpenSource:
    """A source and what is known of its shards."""

    name: str
    source: Source
    folder: str
    is_local: bool
    etags: list[str | None]  # a remote shard is pinned to its version; a local one is identified by its checksums alone
    retry_at: dict[int, float] = field(default_factory=dict)  # shard without room in the cache -> when to try it again
    has_warned: bool = False

    def location(self, shard: int) -> str:
        return join(self.folder, self.source.manifest.shards[shard].name)


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
        self._storage, self._loader, self._cache = storage, loader, cache
        self._sources: dict[str, _OpenSource] = {}
        for name, source in sources.items():
            objects, local = source.objects, is_local(source.url)
            if objects is None:
                objects = check_present(storage, source.url, source.manifest)
            etags = [None if local else objects[shard.name].etag for shard in source.manifest.shards]
            self._sources[name] = _OpenSource(name, source, shard_folder(source.url), local, etags)
        shortage = (
            f"data.loader.memory_bytes {loader.memory_bytes} is below what the open windows of this process need: "
            "chunks of shards are fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder"
        )
        self._memory: PrefetchCache[Any] = PrefetchCache(loader.memory_bytes, shortage)  # views and chunks, in bytes
        self._files: PrefetchCache[OpenShard] = PrefetchCache(
            max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        )
        self._requests = ThreadPoolExecutor(loader.max_concurrent_requests, thread_name_prefix="requests")
        self._downloads = ThreadPoolExecutor(
            _DOWNLOADS, thread_name_prefix="downloads"
        )  # of whole shards into the cache
        self._prefetcher: Prefetcher | None = None

    def read(self, ref: SampleRef) -> Sample:
        """Return a sample. Raise DataError if its shard changed, StorageError if it cannot be read."""
        source = self._sources[ref.source]
        view: ShardView = self._memory.get(*self._view_entry(source, ref.shard))
        index, number = view.index, view.number(ref.sample)
        for _ in range(2):  # the cached bytes may have been damaged in transit: read again
            members, invalidate = self._read_members(source, ref.shard, view, number)
            if checksum(data for _, data in members) == index.crc[number]:
                record = source.source.manifest.shards[ref.shard]
                return Sample(
                    source=ref.source,
                    shard=record.name,
                    key=index.keys[number],
                    offset=int(index.offset[index.first[number]]),
                    uid=signed(hash64(record.digest, number)),
                    image_id=int(index.image_id[number]),
                    is_duplicate=bool(index.duplicate[number]),
                    members=dict(members),
                )
            invalidate()
        reason = f"sample '{index.keys[number]}' is not the one that was indexed"
        raise DataError(_CHANGED.format(source.location(ref.shard), reason))

    def index(self, ref: SampleRef) -> tuple[ShardIndex, int]:
        """Return the index of a sample's shard and the sample's number in it."""
        view: ShardView = self._memory.get(*self._view_entry(self._sources[ref.source], ref.shard))
        return view.index, view.number(ref.sample)

    def start_prefetch(self, refs: Callable[[int], Iterable[SampleRef]], step: int) -> None:
        """Prefetch the samples `refs(step)` of the steps from `step` on in a thread. Local files need no prefetch."""

        def requests(step: int) -> Iterator[PrefetchRequest]:
            """Yield a step's requests, after loading its shards' indexes in parallel.

            A shard whose index cannot be loaded is skipped; its reader meets the failure.
            """
            remote = [ref for ref in refs(step) if not self._sources[ref.source].is_local]
            entries = {(r.source, r.shard): self._view_entry(self._sources[r.source], r.shard) for r in remote}
            for key, size, load in entries.values():
                if self._memory.plan(key, size, step):
                    self._memory.prefetch(key, size, load, self._requests.submit)
            views = {}
            for place, entry in entries.items():  # here and not in the pool, whose threads may all be fetching samples
                try:
                    views[place] = self._memory.get(*entry)
                except Exception as error:
                    log.debug("prefetching an index failed: %s", error)
            for ref in remote:
                if (view := views.get((ref.source, ref.shard))) is not None:
                    yield self._request(self._sources[ref.source], ref.shard, view, view.number(ref.sample))

        assert self._prefetcher is None
        if not all(source.is_local for source in self._sources.values()):
            self._prefetcher = Prefetcher(requests, step, self._loader.read_ahead_bytes)

    def finish_step(self, step: int) -> None:
        """Mark all samples up to those of `step` as read, and release what no later step needs."""
        if self._prefetcher is not None:
            self._memory.finish_step(step)
            self._files.finish_step(step)
            self._files.release(HORIZON)
            self._prefetcher.finish_step(step)

    def close(self) -> None:
        """End all threads after the requests in flight, and drop all cached data."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
        self._memory.close()
        self._files.close()
        for wait in (False, True):
            for pool in (self._downloads, self._requests):
                pool.shutdown(wait, cancel_futures=True)
        if self._prefetcher is not None:
            self._prefetcher.join()
            self._prefetcher = None

    def _view_entry(self, source: _OpenSource, shard: int) -> tuple[Hashable, int, Callable[[], ShardView]]:
        """Return key, approximate bytes and fetch of a shard's view, which is loaded from the shard's index."""
        record = source.source.manifest.shards[shard]

        def load() -> ShardView:
            index = load_index(self._storage, source.source.url, record)
            return make_shard_view(index, source.source.selected(index))

        return (source.name, shard), _VIEW_BYTES + _INDEX_BYTES * record.samples, load

    def _request(
        self, source: _OpenSource, shard: int, view: ShardView, number: int, in_chunks: bool = False
    ) -> PrefetchRequest:
        """Return the request for a sample's file, or with `in_chunks` or without room in the cache for its chunk."""
        is_cached = self._cache is not None and source.retry_at.get(shard, 0.0) <= time.monotonic()
        if not in_chunks and (source.is_local or is_cached):
            reads = len(view.index) if view.selected is None else len(view.selected)
            fetch = partial(self._open, source, shard)
            return PrefetchRequest(
                self._files, (source.name, shard), 1, view.index.bytes, reads, fetch, self._downloads.submit
            )
        start, stop, num_selected = view.chunk(number)
        key = (source.name, shard, start, stop)  # chunks with hard links may have the same start
        read = partial(self._fetch, source, shard, start, stop)
        return PrefetchRequest(self._memory, key, stop - start, stop - start, num_selected, read, self._requests.submit)

    def _read_members(
        self, source: _OpenSource, shard: int, view: ShardView, number: int
    ) -> tuple[Members, Callable[[], None]]:
        """Return a sample's members, and a function to call if they are damaged, before the sample is read again.

        A local shard is read sample by sample, because the operating system caches and prefetches its pages.
        """
        places, request = list(view.index.members(number)), self._request(source, shard, view, number)
        if request.cache is self._files:
            with suppress(OSError if source.is_local else CacheFull):
                file: OpenShard = self._files.get(request.key, request.size, request.fetch)

                def discard() -> None:
                    if self._cache is not None and not source.is_local:
                        self._cache.discard(file)
                    self._files.invalidate(request.key, file)

                with suppress(OSError):
                    members = [(name, file.read(at, at + size)) for name, at, size in places]
                    if [len(data) for _, data in members] == [size for _, _, size in places]:
                        return members, discard
                discard()
            if source.is_local:  # Storage retries a file that fails or is too short, and explains the failure
                return [(name, self._fetch(source, shard, at, at + size)) for name, at, size in places], lambda: None
            request = self._request(source, shard, view, number, in_chunks=True)
        chunk: bytes = self._memory.get(request.key, request.size, request.fetch)
        start = view.chunk(number).start
        members = [(name, chunk[at - start : at - start + size]) for name, at, size in places]
        return members, partial(self._memory.invalidate, request.key, chunk)

    def _fetch(self, source: _OpenSource, shard: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard from its store."""
        location = source.location(shard)
        try:
            return self._storage.read(location, start, stop, source.etags[shard])
        except ObjectChanged as error:
            raise DataError(_CHANGED.format(location, "it was replaced while the run read it")) from error
        except NotFound as error:
            raise DataError(f"{location}: the shard is missing, and was there at first. Put it back") from error
        except StorageError:
            check_size(location, source.source.manifest.shards[shard], self._storage.info(location).size)
            raise

    def _open(self, source: _OpenSource, shard: int) -> OpenShard:
        """Open the shard's local file, or its file in the cache after a download. Raise CacheFull without room."""
        record, location = source.source.manifest.shards[shard], source.location(shard)
        if source.is_local:
            path = local_path(location)
            return OpenShard(os.open(path, os.O_RDONLY), path, is_cached=False)

        def fetch(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
            """Yield the bytes of each [start, stop) in order, with several requests in flight."""
            in_flight: deque[Future[bytes]] = deque()
            try:
                for start, stop in pieces:
                    if len(in_flight) == max(2, self._loader.max_concurrent_requests // 2):
                        yield in_flight.popleft().result()
                    in_flight.append(self._requests.submit(self._fetch, source, shard, start, stop))
                while in_flight:
                    yield in_flight.popleft().result()
            finally:
                for request in in_flight:
                    request.cancel()

        assert self._cache is not None
        version = source.etags[shard] or record.digest
        with suppress(CacheFull):
            return self._cache.open(location, record.bytes, version, fetch)
        self._files.release()
        try:
            return self._cache.open(location, record.bytes, version, fetch)
        except CacheFull as error:
            source.retry_at[shard] = time.monotonic() + _RETRY_CACHE_SECONDS
            if not source.has_warned:
                source.has_warned = True
                log.warning("%s; such shards are read over the network in chunks", error)
            raise


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
    firsts = range(start, int(source.counts.sum()) if stop is None else stop, _BATCH)
    refs_between = sample_refs(source)

    def refs(step: int) -> list[SampleRef]:
        return refs_between(firsts[step], min(firsts[step] + _BATCH, firsts.stop)) if step < len(firsts) else []

    loader = LoaderConfig(memory_bytes=16 * CHUNK_BYTES, read_ahead_bytes=8 * CHUNK_BYTES)
    with closing(SampleReader(storage, {source.url: source}, loader)) as reader:
        reader.start_prefetch(refs, 0)
        for step in range(len(firsts)):
            yield from map(reader.read, refs(step))
            reader.finish_step(step)


def iter_captions(storage: Storage, url: str) -> Iterator[str]:
    """Yield every text of a folder of shards of any source type, skipping samples without one."""
    for sample in iter_samples(storage, url):
        texts: list[str] = []
        with suppress(BadSample), judging("members"):
            texts = texts_of(sample.members)
        yield from texts
