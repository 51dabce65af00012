"""The shards of one source as a reader opens them: their indexes, the spans they are fetched in, and their bytes.

A remote shard is fetched in spans of at least 8 MiB of whole samples, because a request costs more than decoding one.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pipeline.config.errors import DataError, StorageError
from pipeline.config.paths import is_local, local_path
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import ShardRecord, check_present, check_size, load_index, shard_folder
from pipeline.data.shards.sources import Source
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join

SPAN = 8 * 2**20  # bytes of one request at least, where the shard has them
_INDEX_BYTES = 256  # of memory, for each sample


@dataclass(frozen=True, eq=False)
class OpenShard:
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


def open_shard(index: ShardIndex, chosen: np.ndarray | None = None) -> OpenShard:
    """Cuts a shard into spans of at least 8 MiB, or one of all it has."""
    starts = np.maximum.accumulate(index.offset[index.first[:-1]])  # a hard link's data lies before its place
    bounds = [0]
    while len(starts) and index.bytes - starts[bounds[-1]] >= 2 * SPAN:  # what is left becomes one, so none is smaller
        following = int(np.searchsorted(starts, starts[bounds[-1]] + SPAN))
        if following >= len(starts):
            break
        bounds.append(following)
    bounds.append(len(starts))
    spans = [index.span(first, stop) for first, stop in pairwise(bounds) if first < stop]
    return OpenShard(replace(index, columns={}), chosen, bounds, spans)


class SourceShards:
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

    def open(self, shard: int) -> OpenShard:
        index = load_index(self._storage, self._source.url, self.record(shard))
        return open_shard(index, self._source.chosen(index))

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
