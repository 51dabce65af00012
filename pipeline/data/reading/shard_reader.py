"""Reads of one source's shards: from local files, from chunks in memory, or from the node's cache.

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
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.errors import DataError, StorageError
from pipeline.config.urls import is_local, local_path
from pipeline.data.reading.cache import CacheFull, NodeCache, OpenShard
from pipeline.data.reading.prefetch import PrefetchCache, PrefetchRequest
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import check_present, check_size, load_index, shard_folder
from pipeline.data.shards.source import Source
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20  # minimum bytes of one request, unless the shard is smaller
_VIEW_BYTES, _INDEX_BYTES = 4096, 256  # approximate memory of a shard's view, and in addition of each sample in it
_RETRY_CACHE_SECONDS = 10.0  # for which a shard without room in the cache is read in chunks

Members = list[tuple[str, bytes]]  # (extension, content), in the tar's order


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
    requests: Executor
    downloads: Executor  # of whole shards into the cache
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
        self._etags = [] if self.is_local else [objects[shard.name].etag for shard in self.records]
        self._retry_at: dict[int, float] = {}  # shard without room in the cache -> when to try it again
        self._has_warned = False

    def view(self, shard: int) -> ShardView:
        """Return the view of a shard, loaded from its index unless it is in memory."""
        size = _VIEW_BYTES + _INDEX_BYTES * self.records[shard].samples
        return self._shared.memory.get((self._name, shard), size, partial(self._load_view, shard))

    def prefetch_view(self, shard: int, step: int) -> None:
        """Load the view that `step` needs in a thread, unless it is in memory."""
        key, size = (self._name, shard), _VIEW_BYTES + _INDEX_BYTES * self.records[shard].samples
        if self._shared.memory.plan(key, size, step):
            self._shared.memory.prefetch(key, size, partial(self._load_view, shard), self._shared.requests.submit)

    def _load_view(self, shard: int) -> ShardView:
        index = load_index(self._storage, self._source.url, self.records[shard])
        return make_shard_view(index, self._source.selected(index))

    def read(self, shard: int, view: ShardView, number: int) -> tuple[Members, Callable[[], None]]:
        """Return a sample, and a function to call if it is damaged, before it is read again.

        A local shard is read sample by sample, because the operating system caches and prefetches its pages.
        """
        file = None
        if self._has_file(shard):
            with suppress(OSError if self.is_local else CacheFull):
                file = self._shared.files.get((self._name, shard), 1, partial(self._open, shard))
        if file is not None:
            members = []
            with suppress(OSError):
                for extension, at, size in view.index.members(number):
                    data = file.read(at, at + size)
                    if len(data) < size:
                        break
                    members.append((extension, data))
                else:
                    return members, partial(self._discard, shard, file)
            self._discard(shard, file)
        if self.is_local:  # Storage retries a file that fails or is too short, and explains the failure
            places = view.index.members(number)
            return [(name, self.fetch(shard, at, at + size)) for name, at, size in places], lambda: None
        start, stop, _ = view.chunk(number)
        key, memory = (self._name, shard, start, stop), self._shared.memory
        chunk: bytes = memory.get(key, stop - start, partial(self.fetch, shard, start, stop))
        members = [(name, chunk[at - start : at - start + size]) for name, at, size in view.index.members(number)]
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
            return self._storage.read_range(location, start, stop, self._etags[shard] if self._etags else None)
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
        assert self._shared.cache is not None
        version, fetch = self._etags[shard] or record.digest, partial(self._fetch_pieces, shard)
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

    def _fetch_pieces(self, shard: int, pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
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
