"""Samples by reference: read from local files or a store, verified against the index, prefetched for coming steps.

Every sample's bytes are compared with the checksum in the index, so that a changed shard is always detected. A remote
shard is fetched into memory in chunks of at least 8 MiB of whole samples, because a request costs more than decoding a
sample, or as a whole into the node's cache.
"""

from __future__ import annotations

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


@dataclass
class SharedResources:
    """Memory, open files and threads that a reader's sources share."""

    memory: PrefetchCache[Any]  # views and chunks, bounded in bytes
    files: PrefetchCache[OpenShard]  # bounded in number
    requests: ThreadPoolExecutor
    downloads: ThreadPoolExecutor  # of whole shards into the cache
    cache: NodeCache | None
    requests_per_download: int


class ShardReader:
    """Reads of one source's shards by shard and sample number. Shared by threads.

    Raises DataError, naming the shard, if a shard is missing, truncated or replaced, and StorageError if the store
    fails. The constructor asks the store unless the source knows its objects.
    """

    def __init__(self, name: str, storage: Storage, source: Source, shared: SharedResources):
        self._name, self._storage, self._source, self._shared = name, storage, source, shared
        self._folder = shard_folder(source.url)
        self.is_local = is_local(source.url)
        self.records = source.manifest.shards
        objects = source.objects
        if objects is None:
            objects = check_present(storage, source.url, source.manifest)
        # A remote shard is pinned to its present version; a local one is identified by its checksums alone.
        self._etags = [None if self.is_local else objects[shard.name].etag for shard in self.records]
        self._retry_at: dict[int, float] = {}  # shard without room in the cache -> when to try it again
        self._has_warned = False

    def view(self, shard: int) -> ShardView:
        """Return the view of a shard, loaded from its index unless it is in memory."""
        return self._shared.memory.get((self._name, shard), self._view_bytes(shard), partial(self._load_view, shard))

    def prefetch_view(self, shard: int, step: int) -> None:
        """Load the view that `step` needs in a thread, unless it is in memory."""
        key, size = (self._name, shard), self._view_bytes(shard)
        if self._shared.memory.plan(key, size, step):
            self._shared.memory.prefetch(key, size, partial(self._load_view, shard), self._shared.requests.submit)

    def _view_bytes(self, shard: int) -> int:
        return _VIEW_BYTES + _INDEX_BYTES * self.records[shard].samples

    def _load_view(self, shard: int) -> ShardView:
        index = load_index(self._storage, self._source.url, self.records[shard])
        return make_shard_view(index, self._source.selected(index))

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Callable[[], None]]:
        """Return a sample's members, and a function to call if they are damaged, before the sample is read again.

        A local shard is read sample by sample, because the operating system caches and prefetches its pages.
        """
        places, file = list(view.index.members(number)), None
        if self._has_file(shard):
            with suppress(OSError if self.is_local else CacheFull):
                file = self._shared.files.get((self._name, shard), 1, partial(self._open, shard))
        if file is not None:
            discard = partial(self._discard, shard, file)
            with suppress(OSError):
                members = [(name, file.read(at, at + size)) for name, at, size in places]
                if [len(data) for _, data in members] == [size for _, _, size in places]:
                    return members, discard
            discard()
        if self.is_local:  # Storage retries a file that fails or is too short, and explains the failure
            return [(name, self.fetch(shard, at, at + size)) for name, at, size in places], lambda: None
        start, stop, _ = view.chunk(number)
        key, memory = (self._name, shard, start, stop), self._shared.memory
        chunk: bytes = memory.get(key, stop - start, partial(self.fetch, shard, start, stop))
        members = [(name, chunk[at - start : at - start + size]) for name, at, size in places]
        return members, partial(memory.invalidate, key, chunk)

    def prefetch(self, shard: int, view: ShardView, number: int) -> PrefetchRequest:
        """Return the request that prefetches a sample of a remote shard: its chunk, or the shard into the cache."""
        if self._has_file(shard):
            return PrefetchRequest(
                cache=self._shared.files,
                key=(self._name, shard),
                size=1,
                bytes=view.index.bytes,
                reads=len(view.index) if view.selected is None else len(view.selected),
                fetch=partial(self._open, shard),
                submit=self._shared.downloads.submit,
            )
        start, stop, num_selected = view.chunk(number)
        return PrefetchRequest(
            cache=self._shared.memory,
            key=(self._name, shard, start, stop),  # chunks with hard links may have the same start
            size=stop - start,
            bytes=stop - start,
            reads=num_selected,
            fetch=partial(self.fetch, shard, start, stop),
            submit=self._shared.requests.submit,
        )

    def fetch(self, shard: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard from its store."""
        location = join(self._folder, self.records[shard].name)
        try:
            return self._storage.read_range(location, start, stop, self._etags[shard])
        except ObjectChanged as error:
            raise self.changed(shard, "it was replaced while the run read it") from error
        except NotFound as error:
            raise DataError(f"{location}: the shard is missing, and was there at first. Put it back") from error
        except StorageError:
            check_size(location, self.records[shard], self._storage.info(location).size)
            raise

    def changed(self, shard: int, reason: str) -> DataError:
        return DataError(
            f"{join(self._folder, self.records[shard].name)}: the shard was changed: {reason}. "
            "Restore it, or index the folder again (mome shards index) and start a new run"
        )

    def _has_file(self, shard: int) -> bool:
        """Return True if the shard is read from a file: a local one, or one that the cache may have room for."""
        if self.is_local:
            return True
        return self._shared.cache is not None and self._retry_at.get(shard, 0.0) <= time.monotonic()

    def _open(self, shard: int) -> OpenShard:
        """Open the shard's local file, or its file in the cache after a download. Raise CacheFull without room."""
        record = self.records[shard]
        location = join(self._folder, record.name)
        if self.is_local:
            path = local_path(location)
            return OpenShard(os.open(path, os.O_RDONLY), path, is_cached=False)

        def fetch(pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
            """Yield the bytes of each [start, stop) in order, with several requests in flight."""
            in_flight: deque[Future[bytes]] = deque()
            try:
                for start, stop in pieces:
                    if len(in_flight) == self._shared.requests_per_download:
                        yield in_flight.popleft().result()
                    in_flight.append(self._shared.requests.submit(self.fetch, shard, start, stop))
                while in_flight:
                    yield in_flight.popleft().result()
            finally:
                for request in in_flight:
                    request.cancel()

        assert self._shared.cache is not None
        version = self._etags[shard] or record.digest
        with suppress(CacheFull):
            return self._shared.cache.open(location, record.bytes, version, fetch)
        self._shared.files.release()
        try:
            return self._shared.cache.open(location, record.bytes, version, fetch)
        except CacheFull as error:
            self._retry_at[shard] = time.monotonic() + _RETRY_CACHE_SECONDS
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; such shards are read over the network in chunks", error)
            raise

    def _discard(self, shard: int, file: OpenShard) -> None:
        if self._shared.cache is not None and not self.is_local:
            self._shared.cache.discard(file)
        self._shared.files.invalidate((self._name, shard), file)


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

        def requests(step: int) -> Iterator[PrefetchRequest]:
            """Yield a step's requests, after loading its shards' indexes in parallel.

            A shard whose index cannot be loaded is skipped; its reader meets the failure.
            """
            remote = [ref for ref in refs(step) if not self._shards[ref.source].is_local]
            keys = dict.fromkeys((ref.source, ref.shard) for ref in remote)
            for source, shard in keys:
                self._shards[source].prefetch_view(shard, step)
            views = {}
            for source, shard in keys:  # here and not in the pool, whose threads may all be fetching samples
                try:
                    views[source, shard] = self._shards[source].view(shard)
                except Exception as error:
                    log.debug("prefetching an index failed: %s", error)
            for ref in remote:
                if (view := views.get((ref.source, ref.shard))) is not None:
                    yield self._shards[ref.source].prefetch(ref.shard, view, view.number(ref.sample))

        assert self._prefetcher is None
        if not all(shards.is_local for shards in self._shards.values()):
            self._prefetcher = Prefetcher(requests, step, self._loader.read_ahead_bytes)

    def finish_step(self, step: int) -> None:
        """Mark all samples up to those of `step` as read, and release what no later step needs."""
        if self._prefetcher is not None:
            self._shared.memory.finish_step(step)
            self._shared.files.finish_step(step)
            self._shared.files.release(HORIZON)
            self._prefetcher.finish_step(step)

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
