"""The shards of one source as a reader opens them: their indexes, the spans they are fetched in, and their bytes.

A remote shard is fetched in spans of at least 8 MiB of whole samples, because a request costs more than decoding one.
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

CHUNK_BYTES = 8 * 2**20  # bytes of one request at least, where the shard has them
_INDEX_BYTES = 256  # of memory, for each sample


@dataclass(frozen=True, eq=False)
class ShardView:
    """A shard's index, without the json's fields, and what is derived from it."""

    index: ShardIndex
    chosen: np.ndarray | None  # the numbers of the samples that are read; None: all
    bounds: list[int]  # the sample numbers at which spans begin, and the number of samples
    spans: list[tuple[int, int]]  # the bytes [start, stop) of each

    def number(self, sample: int) -> int:
        """The number in the shard of the `sample`-th chosen one."""
        return sample if self.chosen is None else int(self.chosen[sample])

    def span_number(self, number: int) -> int:
        return bisect_right(self.bounds, number) - 1

    def span(self, number: int) -> tuple[int, int]:
        """The bytes [start, stop) of the shard to fetch for a sample."""
        return self.spans[self.span_number(number)]

    def chosen_in(self, which: int) -> int:
        """How many chosen samples a span holds."""
        first, last = self.bounds[which], self.bounds[which + 1]
        if self.chosen is None:
            return last - first
        return int(np.searchsorted(self.chosen, last) - np.searchsorted(self.chosen, first))


def make_shard_view(index: ShardIndex, chosen: np.ndarray | None = None) -> ShardView:
    """Cuts a shard into spans of at least 8 MiB, or one of all it has."""
    starts = np.maximum.accumulate(index.offset[index.first[:-1]])  # a hard link's data lies before its place
    bounds = [0]
    while len(starts) and index.bytes - starts[bounds[-1]] >= 2 * CHUNK_BYTES:
        following = int(np.searchsorted(starts, starts[bounds[-1]] + CHUNK_BYTES))
        if following >= len(starts):
            break
        bounds.append(following)
    bounds.append(len(starts))
    spans = [index.span(first, stop) for first, stop in pairwise(bounds) if first < stop]
    return ShardView(replace(index, columns={}), chosen, bounds, spans)


class ShardReader:
    """Reads of one source that tell a changed shard from a store that fails.

    Unless the source knows what the store holds, making one asks: a missing, truncated or replaced shard raises
    DataError, by name.
    """

    def __init__(self, storage: Storage, source: Source):
        self._storage, self._source = storage, source
        self._folder = shard_folder(source.url)
        self.is_local = is_local(source.url)
        found = check_present(storage, source.url, source.manifest) if source.seen is None else source.seen
        # A remote shard is pinned to the version seen now; a local one is known by its checksums alone.
        self._etags = [] if self.is_local else [found[shard.name].etag for shard in source.manifest.shards]

    def record(self, shard: int) -> ShardRecord:
        return self._source.manifest.shards[shard]

    def location(self, shard: int) -> str:
        return join(self._folder, self.record(shard).name)

    def version(self, shard: int) -> str:
        """What tells this version of a remote shard from all others."""
        return self._etags[shard] or self.record(shard).digest

    def open(self, shard: int) -> ShardView:
        index = load_index(self._storage, self._source.url, self.record(shard))
        return make_shard_view(index, self._source.chosen(index))

    def index_bytes(self, shard: int) -> int:
        """The memory that an open shard takes, about."""
        return 4096 + _INDEX_BYTES * self.record(shard).samples

    def fetch(self, shard: int, start: int, stop: int) -> bytes:
        """The bytes [start, stop), from where the shard lies."""
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

    def changed(self, shard: int, how: str) -> DataError:
        return DataError(
            f"{self.location(shard)}: the shard was changed: {how}. "
            "Restore it, or index the folder again (mome shards index) and start a new run"
        )


class OpenFile:
    """A local shard held open. Whoever reads it holds it: its descriptor is closed with the last of them."""

    def __init__(self, location: str):
        self._descriptor = -1
        self._descriptor = os.open(local_path(location), os.O_RDONLY)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); fewer when the file is shorter."""
        return os.pread(self._descriptor, stop - start, start)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


log = logging.getLogger(__name__)

Members = list[tuple[str, bytes]]  # (extension, content), in the tar's order
Invalidate = Callable[[], None]
_REFUSAL = 10.0  # seconds for which a shard that found no room in the cache is read by spans


class ReadStrategy(Protocol):
    """Reads one source's samples by the shard's and the sample's number. Threads share it."""

    def read(self, shard: int, opened: ShardView, number: int) -> tuple[Members, Invalidate]:
        """The sample, and what to call when it proves damaged, before it is read once more."""

    def need(self, shard: int, opened: ShardView, number: int) -> PrefetchRequest:
        """What has to be fetched ahead for a sample."""


class LocalStrategy:
    """A source of this machine: read sample by sample, for the operating system keeps and prefetches its pages."""

    def __init__(self, name: str, shards: ShardReader, files: PrefetchCache[OpenFile]):
        self._name, self._shards, self._files = name, shards, files

    def read(self, shard: int, opened: ShardView, number: int) -> tuple[Members, Invalidate]:
        key, file = (self._name, shard), None
        with suppress(OSError):
            file = self._files.get(key, 1, partial(OpenFile, self._shards.location(shard)))
        if file is not None:
            invalidate = partial(self._files.invalidate, key, file)
            if (members := _members(file, opened, number)) is not None:
                return members, invalidate
            invalidate()
        # A file that fails or is too short: further attempts, and words for it, are Storage's.
        found = opened.index.members(number)
        return [(name, self._shards.fetch(shard, at, at + size)) for name, at, size in found], _nothing

    def need(self, shard: int, opened: ShardView, number: int) -> PrefetchRequest:
        raise AssertionError("local files need no reading ahead")


class ChunkStrategy:
    """A remote source: spans of it in memory."""

    def __init__(self, name: str, shards: ShardReader, memory: PrefetchCache[Any], requests: Executor):
        self._name, self._shards, self._memory, self._requests = name, shards, memory, requests

    def read(self, shard: int, opened: ShardView, number: int) -> tuple[Members, Invalidate]:
        start, stop = opened.span(number)
        key, fetch = (self._name, shard, start, stop), partial(self._shards.fetch, shard, start, stop)
        data: bytes = self._memory.get(key, stop - start, fetch)
        members = [(name, data[at - start : at - start + size]) for name, at, size in opened.index.members(number)]
        return members, partial(self._memory.invalidate, key, data)

    def need(self, shard: int, opened: ShardView, number: int) -> PrefetchRequest:
        start, stop = opened.span(number)
        return PrefetchRequest(
            store=self._memory,
            key=(self._name, shard, start, stop),  # spans with hard links may begin together
            size=stop - start,
            bytes=stop - start,
            reads=opened.chosen_in(opened.span_number(number)),
            fetch=partial(self._shards.fetch, shard, start, stop),
            start=self._requests.submit,
        )


class CacheStrategy:
    """A remote source: whole shards in the node's cache, pinned while they are read; spans when it has no room."""

    def __init__(
        self,
        name: str,
        shards: ShardReader,
        cache: NodeCache,
        pins: PrefetchCache[CachedShard],
        spans: ChunkStrategy,
        downloads: Executor,
        requests: Executor,
        requests_each: int,
    ):
        self._name, self._shards, self._cache, self._pins, self._spans = name, shards, cache, pins, spans
        self._downloads, self._requests, self._requests_each = downloads, requests, requests_each
        self._refused: dict[int, float] = {}  # shard -> when to try the cache again
        self._has_warned = False

    def read(self, shard: int, opened: ShardView, number: int) -> tuple[Members, Invalidate]:
        if self._is_refused(shard):
            return self._spans.read(shard, opened, number)
        try:
            file = self._pins.get((self._name, shard), 1, partial(self._open, shard))
        except CacheFull:
            return self._spans.read(shard, opened, number)
        if (members := _members(file, opened, number)) is not None:
            return members, partial(self._discard, shard, file)
        self._discard(shard, file)
        return self._spans.read(shard, opened, number)

    def need(self, shard: int, opened: ShardView, number: int) -> PrefetchRequest:
        if self._is_refused(shard):
            return self._spans.need(shard, opened, number)
        return PrefetchRequest(
            store=self._pins,
            key=(self._name, shard),
            size=1,
            bytes=opened.index.bytes,
            reads=len(opened.index) if opened.chosen is None else len(opened.chosen),
            fetch=partial(self._open, shard),
            start=self._downloads.submit,
        )

    def _open(self, shard: int) -> CachedShard:
        url, size = self._shards.location(shard), self._shards.record(shard).bytes
        version, fetch = self._shards.version(shard), partial(self._pieces, shard)
        try:
            return self._cache.open(url, size, version, fetch)
        except CacheFull:
            self._pins.release()
        try:
            return self._cache.open(url, size, version, fetch)
        except CacheFull as error:
            self._refused[shard] = time.monotonic() + _REFUSAL
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; such shards are read over the network, part by part", error)
            raise

    def _discard(self, shard: int, file: CachedShard) -> None:
        self._cache.discard(file)
        self._pins.invalidate((self._name, shard), file)

    def _is_refused(self, shard: int) -> bool:
        return self._refused.get(shard, 0.0) > time.monotonic()

    def _pieces(self, shard: int, pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each [start, stop), in order, with several requests in flight."""
        flying: deque[Future[bytes]] = deque()
        try:
            for start, stop in pieces:
                if len(flying) == self._requests_each:
                    yield flying.popleft().result()
                flying.append(self._requests.submit(self._shards.fetch, shard, start, stop))
            while flying:
                yield flying.popleft().result()
        finally:
            for request in flying:
                request.cancel()


def _members(file: OpenFile | CachedShard, opened: ShardView, number: int) -> Members | None:
    """A sample read from an open file; None when the file fails or is too short."""
    members = []
    with suppress(OSError):
        for extension, start, size in opened.index.members(number):
            data = file.read(start, start + size)
            if len(data) < size:
                return None
            members.append((extension, data))
        return members
    return None


def _nothing() -> None:
    pass
