"""Reads of one source's shards, and the strategies for them: local files, chunks in memory, the node's cache.

A remote shard is fetched in chunks of at least 8 MiB of whole samples, because a request costs more than decoding a
sample.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from pipeline.config.errors import DataError, StorageError
from pipeline.config.urls import is_local, local_path
from pipeline.data.reading.cache import CachedShard, CacheFull, NodeCache
from pipeline.data.reading.prefetch import PrefetchCache, PrefetchRequest
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import ShardRecord, check_present, check_size, load_index, shard_folder
from pipeline.data.shards.source import Source
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20  # minimum bytes of one request, unless the shard is smaller
_INDEX_BYTES = 256  # memory per sample
_RETRY_CACHE_SECONDS = 10.0  # for which a shard without room in the cache is read in chunks

Members = list[tuple[str, bytes]]  # (extension, content), in the tar's order
Invalidate = Callable[[], None]


@dataclass(frozen=True, eq=False)
class ShardView:
    """Index of a shard without its metadata columns, the selected samples, and the chunks to fetch."""

    index: ShardIndex
    selected: np.ndarray | None  # numbers of the selected samples; None: all
    bounds: list[int]  # the sample numbers at which chunks begin, and the number of samples
    chunks: list[tuple[int, int]]  # the bytes [start, stop) of each

    def number(self, sample: int) -> int:
        """Return the number in the shard of the `sample`-th selected one."""
        return sample if self.selected is None else int(self.selected[sample])

    def chunk_index(self, number: int) -> int:
        return bisect_right(self.bounds, number) - 1

    def chunk(self, number: int) -> tuple[int, int]:
        """Return the bytes [start, stop) of the shard to fetch for a sample."""
        return self.chunks[self.chunk_index(number)]

    def num_selected(self, chunk: int) -> int:
        """Return the number of selected samples in a chunk."""
        first, last = self.bounds[chunk], self.bounds[chunk + 1]
        if self.selected is None:
            return last - first
        return int(np.searchsorted(self.selected, last) - np.searchsorted(self.selected, first))


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
    chunks = [index.byte_range(first, stop) for first, stop in pairwise(bounds) if first < stop]
    return ShardView(replace(index, columns={}), selected, bounds, chunks)


class ShardReader:
    """Reads of one source that distinguish a changed shard from a failing store.

    Raises DataError, naming the shard, if a shard is missing, truncated or replaced. The constructor asks the store
    unless the source knows its objects.
    """

    def __init__(self, storage: Storage, source: Source):
        self._storage, self._source = storage, source
        self._folder = shard_folder(source.url)
        self.is_local = is_local(source.url)
        objects = source.objects
        if objects is None:
            objects = check_present(storage, source.url, source.manifest)
        # A remote shard is pinned to its present version; a local one is identified by its checksums alone.
        self._etags = [] if self.is_local else [objects[shard.name].etag for shard in source.manifest.shards]

    def record(self, shard: int) -> ShardRecord:
        return self._source.manifest.shards[shard]

    def location(self, shard: int) -> str:
        return join(self._folder, self.record(shard).name)

    def version(self, shard: int) -> str:
        """Return an identifier of this version of a remote shard."""
        return self._etags[shard] or self.record(shard).digest

    def open(self, shard: int) -> ShardView:
        index = load_index(self._storage, self._source.url, self.record(shard))
        return make_shard_view(index, self._source.selected(index))

    def index_bytes(self, shard: int) -> int:
        """Return the approximate memory of a shard's view."""
        return 4096 + _INDEX_BYTES * self.record(shard).samples

    def fetch(self, shard: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard from its store."""
        location = self.location(shard)
        try:
            return self._storage.read_range(location, start, stop, self._etags[shard] if self._etags else None)
        except ObjectChanged as error:
            raise self.changed(shard, "it was replaced while the run read it") from error
        except NotFound as error:
            raise DataError(f"{location}: the shard is missing, and was there at first. Put it back") from error
        except StorageError:
            check_size(location, self.record(shard), self._storage.info(location).size)
            raise

    def changed(self, shard: int, reason: str) -> DataError:
        return DataError(
            f"{self.location(shard)}: the shard was changed: {reason}. "
            "Restore it, or index the folder again (mome shards index) and start a new run"
        )


class OpenFile:
    """Local shard held open; the descriptor is closed with the last reference."""

    def __init__(self, location: str):
        self._descriptor = -1
        self._descriptor = os.open(local_path(location), os.O_RDONLY)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop), fewer if the file is shorter."""
        return os.pread(self._descriptor, stop - start, start)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class ReadStrategy(Protocol):
    """Reads of one source's samples by shard and sample number. Shared by threads."""

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Invalidate]:
        """Return the sample, and a function to call if it is damaged, before it is read again."""

    def prefetch(self, shard: int, view: ShardView, number: int) -> PrefetchRequest:
        """Return the request that prefetches a sample."""


class LocalStrategy:
    """Local source, read sample by sample; the operating system caches and prefetches its pages."""

    def __init__(self, name: str, shards: ShardReader, files: PrefetchCache[OpenFile]):
        self._name, self._shards, self._files = name, shards, files

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Invalidate]:
        key, file = (self._name, shard), None
        with suppress(OSError):
            file = self._files.get(key, 1, partial(OpenFile, self._shards.location(shard)))
        if file is not None:
            if (members := _read_members(file, view, number)) is not None:
                return members, partial(self._files.invalidate, key, file)
            self._files.invalidate(key, file)
        # Storage retries a file that fails or is too short, and explains the failure.
        places = view.index.members(number)
        return [(name, self._shards.fetch(shard, at, at + size)) for name, at, size in places], lambda: None

    def prefetch(self, shard: int, view: ShardView, number: int) -> PrefetchRequest:
        raise AssertionError("local files are not prefetched")


class ChunkStrategy:
    """Remote source, read in chunks that are kept in memory."""

    def __init__(self, name: str, shards: ShardReader, memory: PrefetchCache[Any], requests: Executor):
        self._name, self._shards, self._memory, self._requests = name, shards, memory, requests

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Invalidate]:
        request = self.prefetch(shard, view, number)
        data: bytes = self._memory.get(request.key, request.size, request.fetch)
        start, _ = view.chunk(number)
        members = [(name, data[at - start : at - start + size]) for name, at, size in view.index.members(number)]
        return members, partial(self._memory.invalidate, request.key, data)

    def prefetch(self, shard: int, view: ShardView, number: int) -> PrefetchRequest:
        start, stop = view.chunk(number)
        return PrefetchRequest(
            cache=self._memory,
            key=(self._name, shard, start, stop),  # chunks with hard links may have the same start
            size=stop - start,
            bytes=stop - start,
            reads=view.num_selected(view.chunk_index(number)),
            fetch=partial(self._shards.fetch, shard, start, stop),
            submit=self._requests.submit,
        )


class CacheStrategy:
    """Remote source, read from whole shards in the node's cache, or in chunks if the cache has no room."""

    def __init__(
        self,
        name: str,
        shards: ShardReader,
        cache: NodeCache,
        pins: PrefetchCache[CachedShard],
        chunks: ChunkStrategy,
        downloads: Executor,
        requests: Executor,
        max_requests: int,
    ):
        self._name, self._shards, self._cache, self._pins, self._chunks = name, shards, cache, pins, chunks
        self._downloads, self._requests, self._max_requests = downloads, requests, max_requests
        self._retry_at: dict[int, float] = {}  # shard without room -> when to try the cache again
        self._has_warned = False

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Invalidate]:
        if self._has_room(shard):
            with suppress(CacheFull):
                file = self._pins.get((self._name, shard), 1, partial(self._open, shard))
                if (members := _read_members(file, view, number)) is not None:
                    return members, partial(self._discard, shard, file)
                self._discard(shard, file)
        return self._chunks.read(shard, view, number)

    def prefetch(self, shard: int, view: ShardView, number: int) -> PrefetchRequest:
        if not self._has_room(shard):
            return self._chunks.prefetch(shard, view, number)
        return PrefetchRequest(
            cache=self._pins,
            key=(self._name, shard),
            size=1,
            bytes=view.index.bytes,
            reads=len(view.index) if view.selected is None else len(view.selected),
            fetch=partial(self._open, shard),
            submit=self._downloads.submit,
        )

    def _open(self, shard: int) -> CachedShard:
        url, size, version = self._shards.location(shard), self._shards.record(shard).bytes, self._shards.version(shard)
        try:
            return self._cache.open(url, size, version, partial(self._fetch, shard))
        except CacheFull:
            self._pins.release()
        try:
            return self._cache.open(url, size, version, partial(self._fetch, shard))
        except CacheFull as error:
            self._retry_at[shard] = time.monotonic() + _RETRY_CACHE_SECONDS
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; such shards are read over the network in chunks", error)
            raise

    def _discard(self, shard: int, file: CachedShard) -> None:
        self._cache.discard(file)
        self._pins.invalidate((self._name, shard), file)

    def _has_room(self, shard: int) -> bool:
        return self._retry_at.get(shard, 0.0) <= time.monotonic()

    def _fetch(self, shard: int, pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each [start, stop) in order, with several requests in flight."""
        in_flight: deque[Future[bytes]] = deque()
        try:
            for start, stop in pieces:
                if len(in_flight) == self._max_requests:
                    yield in_flight.popleft().result()
                in_flight.append(self._requests.submit(self._shards.fetch, shard, start, stop))
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for request in in_flight:
                request.cancel()


def _read_members(file: OpenFile | CachedShard, view: ShardView, number: int) -> Members | None:
    """Return a sample read from an open file; None if the file fails or is too short."""
    members = []
    with suppress(OSError):
        for extension, start, size in view.index.members(number):
            data = file.read(start, start + size)
            if len(data) < size:
                return None
            members.append((extension, data))
        return members
    return None
