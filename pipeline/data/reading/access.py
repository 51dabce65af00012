"""The ways to a sample's bytes: a local file, spans of a remote shard in memory, a remote shard in the node's cache."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from pipeline.data.reading.cache import CachedShard, CacheFull, NodeCache
from pipeline.data.reading.open_shards import OpenFile, OpenShard, SourceShards
from pipeline.data.reading.readahead import Need
from pipeline.data.reading.working_set import WorkingSet

log = logging.getLogger(__name__)

Members = list[tuple[str, bytes]]  # (extension, content), in the tar's order
Forget = Callable[[], None]
_REFUSAL = 10.0  # seconds for which a shard that found no room in the cache is read by spans


class Access(Protocol):
    """Reads one source's samples by the shard's and the sample's number. Threads share it."""

    def read(self, shard: int, opened: OpenShard, number: int) -> tuple[Members, Forget]:
        """The sample, and what to call when it proves damaged, before it is read once more."""

    def need(self, shard: int, opened: OpenShard, number: int) -> Need:
        """What has to be fetched ahead for a sample."""


class LocalAccess:
    """A source of this machine: read sample by sample, for the operating system keeps and prefetches its pages."""

    def __init__(self, name: str, shards: SourceShards, files: WorkingSet[OpenFile]):
        self._name, self._shards, self._files = name, shards, files

    def read(self, shard: int, opened: OpenShard, number: int) -> tuple[Members, Forget]:
        key, file = (self._name, shard), None
        with suppress(OSError):
            file = self._files.get(key, 1, partial(OpenFile, self._shards.location(shard)))
        if file is not None:
            forget = partial(self._files.forget, key, file)
            if (members := _members(file, opened, number)) is not None:
                return members, forget
            forget()
        # A file that fails or is too short: further attempts, and words for it, are Storage's.
        found = opened.index.members(number)
        return [(name, self._shards.fetch(shard, at, at + size)) for name, at, size in found], _nothing

    def need(self, shard: int, opened: OpenShard, number: int) -> Need:
        raise AssertionError("local files need no reading ahead")


class SpanAccess:
    """A remote source: spans of it in memory."""

    def __init__(self, name: str, shards: SourceShards, memory: WorkingSet[Any], requests: Executor):
        self._name, self._shards, self._memory, self._requests = name, shards, memory, requests

    def read(self, shard: int, opened: OpenShard, number: int) -> tuple[Members, Forget]:
        start, stop = opened.span(number)
        key, fetch = (self._name, shard, start, stop), partial(self._shards.fetch, shard, start, stop)
        data: bytes = self._memory.get(key, stop - start, fetch)
        members = [(name, data[at - start : at - start + size]) for name, at, size in opened.index.members(number)]
        return members, partial(self._memory.forget, key, data)

    def need(self, shard: int, opened: OpenShard, number: int) -> Need:
        start, stop = opened.span(number)
        return Need(
            store=self._memory,
            key=(self._name, shard, start, stop),  # spans with hard links may begin together
            size=stop - start,
            bytes=stop - start,
            reads=opened.chosen_in(opened.span_number(number)),
            fetch=partial(self._shards.fetch, shard, start, stop),
            start=self._requests.submit,
        )


class CacheAccess:
    """A remote source: whole shards in the node's cache, pinned while they are read; spans when it has no room."""

    def __init__(
        self,
        name: str,
        shards: SourceShards,
        cache: NodeCache,
        pins: WorkingSet[CachedShard],
        spans: SpanAccess,
        downloads: Executor,
        requests: Executor,
        requests_each: int,
    ):
        self._name, self._shards, self._cache, self._pins, self._spans = name, shards, cache, pins, spans
        self._downloads, self._requests, self._requests_each = downloads, requests, requests_each
        self._refused: dict[int, float] = {}  # shard -> when to try the cache again
        self._has_warned = False

    def read(self, shard: int, opened: OpenShard, number: int) -> tuple[Members, Forget]:
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

    def need(self, shard: int, opened: OpenShard, number: int) -> Need:
        if self._is_refused(shard):
            return self._spans.need(shard, opened, number)
        return Need(
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
        self._pins.forget((self._name, shard), file)

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


def _members(file: OpenFile | CachedShard, opened: OpenShard, number: int) -> Members | None:
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
