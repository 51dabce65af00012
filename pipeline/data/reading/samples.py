"""Samples by reference: read from local files or a store, checked by the index's checksums, and prefetched. A remote
shard is fetched in chunks of at least 8 MiB, because a request costs more than decoding a sample, or whole into the
node's cache.
"""

import logging
import os
import resource
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.config.errors import DataError, StorageError
from pipeline.config.schema import LoaderConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.contents.members import texts_of
from pipeline.data.order import SampleRef
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.randomness import hash64
from pipeline.data.reading.cache import CacheFull, NodeCache, OpenShard
from pipeline.data.reading.prefetch import HORIZON, PrefetchCache, PrefetchRequest
from pipeline.data.shards import manifest
from pipeline.data.shards.index import ShardIndex
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
    numbers: np.ndarray  # of the selected samples in the shard
    bounds: list[int]  # the sample numbers at which chunks begin, and the number of samples
    chunks: list[Chunk]  # of the samples from one bound to the next


def make_shard_view(index: ShardIndex, selected: np.ndarray | None = None) -> ShardView:
    """Split a shard into chunks of at least 8 MiB, or a single chunk if it is smaller. `selected` None: all samples."""
    starts = np.maximum.accumulate(index.offset[index.first[:-1]])  # a hard link's data precedes its position
    bounds = [0]
    while len(starts) and index.bytes - starts[bounds[-1]] >= 2 * CHUNK_BYTES:  # so that the last is not too small
        following = int(np.searchsorted(starts, starts[bounds[-1]] + CHUNK_BYTES))
        if following >= len(starts):
            break
        bounds.append(following)
    bounds.append(len(starts))
    numbers = np.arange(len(starts)) if selected is None else selected
    spans = zip(pairwise(bounds), np.diff(np.searchsorted(numbers, bounds)).tolist(), strict=True)
    chunks = [Chunk(*index.byte_range(first, stop), count) for (first, stop), count in spans if first < stop]
    return ShardView(replace(index, columns={}), numbers, bounds, chunks)


@dataclass(eq=False, slots=True)
class _Shard:
    source: Source
    record: manifest.ShardRecord
    location: str
    is_local: bool
    etag: str | None  # version of a remote shard; a local one is identified by its checksums alone
    retry_at: float = 0.0  # time at which to try again to download it into the cache, which had no room


class SampleReader:
    """Reads samples of `sources`, by name. Threads may share a reader; no thread starts before its first use. The
    constructor raises DataError unless the store has every shard. Close it after use.
    """

    def __init__(
        self, storage: Storage, sources: Mapping[str, Source], loader: LoaderConfig = LoaderConfig(),
        cache: NodeCache | None = None,
    ):  # fmt: skip
        self._storage, self._loader, self._cache = storage, loader, cache
        self._shards: dict[str, list[_Shard]] = {}
        for name, source in sources.items():
            objects, local, folder = source.objects, is_local(source.url), manifest.parse_pattern(source.url).folder
            if objects is None:
                objects = manifest.check_present(storage, source.url, source.manifest)
            self._shards[name] = [
                _Shard(source, record, join(folder, record.name), local, None if local else objects[record.name].etag)
                for record in source.manifest.shards
            ]
        shortage = (
            f"data.loader.memory_bytes {loader.memory_bytes} is below what the open windows of this process need: "
            "chunks of shards are fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder"
        )
        self._memory: PrefetchCache[Any] = PrefetchCache(loader.memory_bytes, shortage)  # views and chunks, in bytes
        max_files = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._files: PrefetchCache[OpenShard] = PrefetchCache(max_files)
        self._requests = ThreadPoolExecutor(loader.max_concurrent_requests, thread_name_prefix="requests")
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="downloads")  # into the cache
        self._prefetcher: Thread | None = None
        self._has_warned = False

    def read(self, ref: SampleRef) -> Sample:
        """Return a sample. Raise DataError if its shard changed, StorageError if it cannot be read."""
        shard, (view, number) = self._shards[ref.source][ref.shard], self.view(ref)
        index = view.index
        # Read again what was damaged in transit or on this node; at last by `Storage`, which explains a failing file.
        for in_chunks in (False, False, True):
            request = self._request(shard, view, number, in_chunks)
            try:
                content = request.cache.get(request.key, request.size, request.fetch)
            except OSError as error:
                if in_chunks or not (shard.is_local or isinstance(error, CacheFull)):
                    raise
                continue
            members: list[tuple[str, bytes]] = []
            if isinstance(content, OpenShard):
                with suppress(OSError):
                    members = [(n, os.pread(content.descriptor, size, at)) for n, at, size in index.members(number)]
            else:
                start = view.chunks[bisect_right(view.bounds, number) - 1].start
                members = [(n, content[at - start : at - start + size]) for n, at, size in index.members(number)]
            if members and isal_zlib.crc32(b"".join(data for _, data in members)) == index.crc[number]:
                return Sample(
                    source=ref.source, shard=shard.record.name, key=index.keys[number], members=dict(members),
                    offset=int(index.offset[index.first[number]]), uid=hash64(shard.record.digest, number, signed=True),
                    image_id=int(index.image_id[number]), is_duplicate=bool(index.duplicate[number]),
                )  # fmt: skip
            if self._cache is not None and isinstance(content, OpenShard) and content.is_cached:
                self._cache.discard(content)
            request.cache.invalidate(request.key, content)
        fault = f"sample '{index.keys[number]}' is not the one that was indexed"
        raise DataError(_CHANGED.format(shard.location, fault))

    def view(self, ref: SampleRef) -> tuple[ShardView, int]:
        """Return the view of a sample's shard and the sample's number in the shard."""
        request = self._view_request(self._shards[ref.source][ref.shard])
        view: ShardView = self._memory.get(request.key, request.size, request.fetch)
        return view, int(view.numbers[ref.sample])

    def start_prefetch(self, refs: Callable[[int], Iterable[SampleRef]], step: int) -> None:
        """Prefetch the samples `refs(step)` of the steps from `step` on in a thread. Local files need no prefetch."""

        def requests(step: int) -> Iterator[PrefetchRequest]:
            """Yield a step's requests, after loading its shards' indexes in parallel; skip a shard without one."""
            samples = [(self._shards[ref.source][ref.shard], ref.sample) for ref in refs(step)]
            loads = {shard: self._view_request(shard) for shard, _ in samples if not shard.is_local}
            for request in loads.values():
                if self._memory.plan(request, step):
                    self._memory.prefetch(request)
            views: dict[_Shard, ShardView] = {}
            for shard, request in loads.items():  # here and not in the pool, whose threads may all be fetching samples
                try:
                    views[shard] = self._memory.get(request.key, request.size, request.fetch)
                except Exception as error:
                    log.debug("prefetching an index failed: %s", error)
            for shard, sample in samples:
                if (view := views.get(shard)) is not None:
                    yield self._request(shard, view, int(view.numbers[sample]))

        assert self._prefetcher is None
        if not all(shard.is_local for shards in self._shards.values() for shard in shards[:1]):
            arguments = requests, step, self._loader.read_ahead_bytes
            self._prefetcher = Thread(target=self._memory.read_ahead, args=arguments, name="read-ahead", daemon=True)
            self._prefetcher.start()

    def finish_step(self, step: int) -> None:
        """Mark all samples up to those of `step` as read, and release what no later step needs."""
        if self._prefetcher is not None:
            self._files.finish_step(step)
            self._files.release(HORIZON)
            self._memory.finish_step(step)  # last, because it continues the prefetching

    def close(self) -> None:
        """End all threads after the requests in flight, and drop all cached data."""
        self._memory.close()
        self._files.close()
        for wait in (False, True):
            for pool in (self._downloads, self._requests):
                pool.shutdown(wait, cancel_futures=True)
        if self._prefetcher is not None:
            self._prefetcher.join()
            self._prefetcher = None

    def _view_request(self, shard: _Shard) -> PrefetchRequest:
        """Return the request for a shard's view, whose size is approximate."""
        source, record, load = shard.source, shard.record, manifest.load_index
        return PrefetchRequest(
            self._memory, shard, _VIEW_BYTES + _INDEX_BYTES * record.samples,
            lambda: make_shard_view(index := load(self._storage, source.url, record), source.selected(index)),
            self._requests.submit,
        )  # fmt: skip

    def _request(self, shard: _Shard, view: ShardView, number: int, in_chunks: bool = False) -> PrefetchRequest:
        """Return the request for a sample's file, or with `in_chunks` or without room in the cache for its chunk."""
        is_cached = self._cache is not None and shard.retry_at <= time.monotonic()
        if not in_chunks and (shard.is_local or is_cached):
            open_file, num_reads = partial(self._open, shard), len(view.numbers)
            size, submit = view.index.bytes, self._downloads.submit
            return PrefetchRequest(self._files, shard, 1, open_file, submit, size, num_reads)
        start, stop, num_reads = view.chunks[bisect_right(view.bounds, number) - 1]
        key = (shard, start, stop)  # chunks with hard links may have the same start
        fetch, size = partial(self._fetch, shard, start, stop), stop - start
        return PrefetchRequest(self._memory, key, size, fetch, self._requests.submit, size, num_reads)

    def _fetch(self, shard: _Shard, start: int, stop: int) -> bytes:
        try:
            return self._storage.read(shard.location, start, stop, shard.etag)
        except ObjectChanged as error:
            raise DataError(_CHANGED.format(shard.location, "it was replaced while the run read it")) from error
        except NotFound as error:
            raise DataError(f"{shard.location}: the shard is missing, and was there at first. Put it back") from error
        except StorageError:
            manifest.check_size(shard.location, shard.record, self._storage.info(shard.location).size)
            raise

    def _open(self, shard: _Shard) -> OpenShard:
        """Open the shard's local file, or its file in the cache after a download. Raise CacheFull without room."""
        if shard.is_local:
            path = local_path(shard.location)
            return OpenShard(os.open(path, os.O_RDONLY), path, is_cached=False)

        def fetch(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
            """Yield the bytes of each [start, stop) in order, with several requests in flight."""
            in_flight: deque[Future[bytes]] = deque()
            try:
                for start, stop in pieces:
                    if len(in_flight) == max(2, self._loader.max_concurrent_requests // 2):
                        yield in_flight.popleft().result()
                    in_flight.append(self._requests.submit(self._fetch, shard, start, stop))
                while in_flight:
                    yield in_flight.popleft().result()
            finally:
                for request in in_flight:
                    request.cancel()

        assert self._cache is not None
        version = shard.etag or shard.record.digest
        open_cached = partial(self._cache.open, shard.location, shard.record.bytes, version, fetch)
        with suppress(CacheFull):
            return open_cached()
        self._files.release()
        try:
            return open_cached()
        except CacheFull as error:
            shard.retry_at = time.monotonic() + _RETRY_CACHE_SECONDS
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; such shards are read over the network in chunks", error)
            raise


def sample_refs(source: Source, numbers: Sequence[int]) -> list[SampleRef]:
    """Return samples of a source by their numbers in the manifest's order."""
    ends = np.cumsum(source.counts)
    shards = np.searchsorted(ends, numbers, side="right")
    samples = np.asarray(numbers, dtype=np.int64) - (ends - source.counts)[shards]
    places = zip(shards.tolist(), samples.tolist(), strict=True)
    return [SampleRef(source.url, 0, shard, sample) for shard, sample in places]


def iter_samples(storage: Storage, source: str | Source, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """Yield the samples [start, stop) of a folder of shards, or all of them, in the manifest's order."""
    opened = Source(source, manifest.load_manifest(storage, source)) if isinstance(source, str) else source
    numbers = range(start, int(opened.counts.sum()) if stop is None else stop)
    loader = LoaderConfig(memory_bytes=16 * CHUNK_BYTES, read_ahead_bytes=8 * CHUNK_BYTES)
    with closing(SampleReader(storage, {opened.url: opened}, loader)) as reader:
        reader.start_prefetch(lambda step: sample_refs(opened, numbers[step * _BATCH :][:_BATCH]), 0)
        for step in range(-(-len(numbers) // _BATCH)):
            yield from map(reader.read, sample_refs(opened, numbers[step * _BATCH :][:_BATCH]))
            reader.finish_step(step)


def iter_captions(storage: Storage, url: str) -> Iterator[str]:
    """Yield every text of a folder of shards of any source type, skipping samples without one."""
    for sample in iter_samples(storage, url):
        texts: list[str] = []
        with suppress(BadSample), judging("members"):
            texts = texts_of(sample.members)
        yield from texts
