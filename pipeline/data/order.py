"""The data order: which sample is at which position of which global batch. Pure arithmetic, no reading.

Contract C1. Per source and epoch, the shards are permuted, concatenated and cut into C streams of equal length to
within one sample; the odd samples rotate over the streams from epoch to epoch. A stream shuffles inside windows of a
few shard pieces. Each stream mixes its sources by one periodic cycle (Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980), which stays within one sample of the weights and starts at a hashed offset. Global
batch s takes the next B/C samples of every stream, in stream order. Ranks and workers have no influence. Length
buckets change which of a stream's next samples share a batch, inside fixed blocks of steps, and nothing else.

Every sample is located by arithmetic in time independent of its position, and no window is materialised: memory is
proportional to the number of shards and streams, whatever the number of samples.

Letters: C streams, B samples of a global batch, N samples of a source, K sources, M length of the cycle, L positions
of one call, S shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.randomness import hash64, hash64_array, permutation, permuted

WEIGHT_PARTS = 4096  # weights are rounded to multiples of 1/4096
_VERSION = 2


class SampleRef(NamedTuple):
    """One sample in one epoch of one source; `shard` and `sample` count from 0, `sample` among those selected."""

    source: str
    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class OrderSource:
    """A source as the order sees it. `digest` identifies the data; `weight` is relative to the other sources'."""

    counts: np.ndarray  # (S,) int64, selected samples of each shard
    weight: float
    digest: str


@dataclass(frozen=True)
class LengthBuckets:
    """Batches of samples of similar length: each stream sorts blocks of `batches` batches' worth of its samples.

    `length` returns a sample's length in any unit, always the same for the same sample; what it measures belongs in
    the order's `extra`. It is called only for samples of streams that are read. A block may cross the end of an epoch.
    Over a whole block the sources are mixed as without buckets; inside it they are not.
    """

    batches: int
    length: Callable[[SampleRef], int]


class DataOrder:
    """The order of one stage. `step` counts from the stage's start, `place` is the position in the global batch.

    `extra` holds everything else that determines an example's content; it only enters the digest. Raises ConfigError
    when the number of streams does not divide the batch, and DataError when a source has fewer samples than streams.
    """

    def __init__(
        self,
        sources: Mapping[str, OrderSource],
        num_streams: int,
        shuffle_window: int,
        seed: int,
        batch_size: int,
        extra: Sequence[str] = (),
        buckets: LengthBuckets | None = None,
    ):
        if batch_size % num_streams:
            raise ConfigError(
                f"data.streams {num_streams} does not divide the global batch size {batch_size}; every stream "
                "contributes the same number of samples. Choose a divisor of the batch size, e.g. "
                f"{math.gcd(num_streams, batch_size)}"
            )
        for name, source in sources.items():
            samples = int(source.counts.sum())
            if not samples:
                raise DataError(
                    f"source '{name}' has no samples to read: its shards are empty, or its filters and opt-out list "
                    "exclude every sample. Inspect the shards with `mome shards show`, or relax the filters"
                )
            if samples < num_streams:
                raise DataError(
                    f"source '{name}' has {samples} samples, fewer than data.streams {num_streams}: some streams would "
                    f"be empty. Lower data.streams to at most {samples}, or add samples"
                )
        self.names = tuple(sorted(sources))
        self.num_streams, self.batch_size = num_streams, batch_size
        self.parts = weight_parts([sources[name].weight for name in self.names])
        counts = {name: sources[name].counts for name in self.names}
        self._streams = StreamOrder(counts, num_streams, shuffle_window, seed)
        source_facts = [
            [name, sources[name].digest, hashlib.sha256(counts[name].astype("<i8").tobytes()).hexdigest(), part]
            for name, part in zip(self.names, self.parts, strict=True)
        ]
        settings = [num_streams, shuffle_window, seed, batch_size, list(extra), buckets.batches if buckets else None]
        self.digest = hashlib.sha256(json.dumps([_VERSION, source_facts, *settings]).encode()).hexdigest()
        self._cycle = np.array(mixing_cycle(self.parts), dtype=np.int64)
        occurrences = np.cumsum(self._cycle == np.arange(len(self.names))[:, None], axis=1)
        self._before = np.pad(occurrences, ((0, 0), (1, 0)))  # (K, M+1): occurrences among the first t of the cycle
        self._starts = np.array([hash64(seed, "cycle", stream) % len(self._cycle) for stream in range(num_streams)])
        self._per_stream = batch_size // num_streams
        self._seed, self._buckets = seed, buckets
        self._lock = threading.RLock()  # threads that need the same block look up its lengths once
        self._groups = lru_cache(max(64, 3 * num_streams))(self._sort_block)

    def samples(self, step: int, places: range) -> list[SampleRef]:
        """Return the samples planned at several places of a global batch, at little more than the cost of one."""
        return self._read(*self._positions(step, places))

    def batch(self, step: int) -> list[SampleRef]:
        """Return the samples of global batch `step`, in order of place."""
        return self.samples(step, range(self.batch_size))

    def replacement(self, step: int, place: int, attempt: int) -> SampleRef:
        """Return a candidate to replace a bad sample: from the same window, drawn by a hash of the attempt."""
        return self._read(*self._positions(step, range(place, place + 1)), attempt)[0]

    def epochs(self, step: int) -> dict[str, float]:
        """Return the epochs of each source read before `step`, averaged over the streams."""
        cycles = step * self.batch_size / sum(self.parts)
        totals = self._streams.totals.tolist()
        return {n: cycles * part / total for n, part, total in zip(self.names, self.parts, totals, strict=True)}

    def _positions(self, step: int, places: range) -> tuple[np.ndarray, np.ndarray]:
        """Return the streams (L,) int64 and the positions (L,) in their mixed sequences at these places."""
        stream, offset = np.divmod(np.arange(places.start, places.stop, places.step), self._per_stream)
        if self._buckets is None:
            return stream, step * self._per_stream + offset
        batches = self._buckets.batches
        block, in_block = divmod(step, batches)
        # All streams share one permutation: a global batch takes the group of the same length rank of each.
        group = permutation(hash64(self._seed, "bucket", block), batches)[in_block]
        read, which = np.unique(stream, return_inverse=True)
        with self._lock:
            groups = np.array([self._groups(number, block)[group] for number in read.tolist()], dtype=np.int64)
        in_stream = groups.reshape(len(read), self._per_stream)[which, offset]
        return stream, block * batches * self._per_stream + in_stream

    def _sort_block(self, stream: int, block: int) -> np.ndarray:
        """Return (batches, B/C) int32: a block's positions, relative to its first, grouped by similar length."""
        assert self._buckets is not None
        positions = np.arange(self._buckets.batches * self._per_stream)
        samples = self._read(np.full(len(positions), stream), block * len(positions) + positions)
        lengths = np.array([self._buckets.length(sample) for sample in samples])
        groups = np.argsort(lengths, kind="stable").reshape(self._buckets.batches, self._per_stream)
        return np.sort(groups, axis=1).astype(np.int32)  # inside a group the stream's own order is kept

    def _read(self, stream: np.ndarray, position: np.ndarray, attempt: int | None = None) -> list[SampleRef]:
        """Return the samples at the positions of mixed streams, or with an `attempt` their replacements."""
        start = self._starts[stream]
        cycles, offset = np.divmod(start + position, len(self._cycle))
        source = self._cycle[offset]
        # The ordinal of each sample among its stream's samples of the source.
        ordinal = cycles * self._before[source, -1] + self._before[source, offset] - self._before[source, start]
        numbers = self._streams.samples(source, stream, ordinal, attempt)
        names = [self.names[number] for number in source.tolist()]
        return list(map(SampleRef, names, *(values.tolist() for values in numbers)))


def rank_slice(batch: int, rank: int, world: int) -> range:
    """Return the places of a global batch that a rank reads: ⌊rB/W⌋ to ⌊(r+1)B/W⌋ - 1. W need divide nothing."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def weight_parts(weights: Sequence[float]) -> list[int]:
    """Return the weights as integer parts of `WEIGHT_PARTS` (at least 1 each), in lowest terms for a short cycle."""
    total = math.fsum(weights)
    exact = [weight / total * WEIGHT_PARTS for weight in weights]
    parts = [max(1, math.floor(value)) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for turn in range(WEIGHT_PARTS - sum(parts)):
        parts[by_remainder[turn % len(parts)]] += 1
    while sum(parts) > WEIGHT_PARTS:  # many tiny weights were raised to 1: take it from the largest
        parts[parts.index(max(parts))] -= 1
    common = math.gcd(*parts)
    return [part // common for part in parts]


def mixing_cycle(parts: Sequence[int]) -> list[int]:
    """Return one period of M = sum(parts) source numbers; every prefix is within 1 - 1/(2K-2) of the weights.

    Tijdeman's rule: among the sources that lag by at least 1/(2K-2), take the one whose deadline comes first.
    """
    length, bound = sum(parts), 2 * len(parts) - 2
    if len(parts) == 1:
        return [0]
    counts = [0] * len(parts)
    cycle = []
    for turn in range(1, length + 1):
        lags = [part * turn - length * count for part, count in zip(parts, counts, strict=True)]  # in 1/length
        ready = [i for i, lag in enumerate(lags) if lag * bound >= length]
        # Deadline (1 - 1/bound - lag) / weight as an exact fraction: rounding could break ties differently per machine.
        chosen = min(ready, key=lambda i: (Fraction(length * (bound - 1) - bound * lags[i], parts[i]), i))
        counts[chosen] += 1
        cycle.append(chosen)
    return cycle


class _Epoch(NamedTuple):
    """A source's shards in one epoch: the i-th is shard[i] and holds the samples bounds[i] … bounds[i+1]-1."""

    bounds: np.ndarray  # (S'+1,) int64, without empty shards
    shard: np.ndarray  # (S',) int64
    key: int

    def piece(self, position: np.ndarray) -> np.ndarray:
        """Return the index i of the shard that contains each position."""
        return np.searchsorted(self.bounds, position, side="right") - 1


class StreamOrder:
    """Each source's samples, stream by stream and epoch by epoch. Sources are numbered in the order of `counts`.

    `ordinal` numbers a stream's samples of a source through all epochs, from 0. Before epoch e, stream c has read as
    many samples as there are integers below eN that are c modulo C: streams never differ by more than one sample, in
    an epoch or in total, and the odd samples of an epoch go to the streams after those of the epoch before.
    """

    def __init__(self, counts: Mapping[str, np.ndarray], num_streams: int, shuffle_window: int, seed: int):
        self._seeds = [hash64(seed, "source", name) for name in counts]
        self._counts = [np.asarray(sizes, dtype=np.int64) for sizes in counts.values()]
        self._num_streams, self._shuffle_window = num_streams, shuffle_window
        self.totals = np.array([sizes.sum() for sizes in self._counts])  # (K,) int64
        self._epoch = lru_cache(4 * len(counts))(self._permute_shards)

    def samples(
        self, source: np.ndarray, stream: np.ndarray, ordinal: np.ndarray, attempt: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return epoch, shard and sample, (L,) int64 each, of each stream's `ordinal`-th sample of a source.

        With an `attempt`, return another sample of the same shuffle window, drawn by a hash of position and attempt.
        """
        # Positions count an epoch's permuted samples; a stream has the positions start … stop-1.
        total = self.totals[source]
        epoch = (ordinal * self._num_streams + stream) // total
        before = epoch * total
        start, stop = (
            self._before_stream(before + total, end) - self._before_stream(before, end) for end in (stream, stream + 1)
        )
        read_earlier = (before + self._num_streams - 1 - stream) // self._num_streams  # by the stream, in other epochs
        position = start + ordinal - read_earlier

        pairs = epoch * len(self._counts) + source
        epochs = [
            (self._epoch(pair % len(self._counts), pair // len(self._counts)), np.flatnonzero(pairs == pair))
            for pair in np.unique(pairs).tolist()
        ]
        # The shuffle window of each sample is low … high-1, permuted under `key`.
        low, high, key = np.empty_like(start), np.empty_like(start), np.empty(len(start), dtype=np.uint64)
        for shards, at in epochs:
            first = shards.piece(start[at])  # the shard in which the stream begins
            piece = shards.piece(position[at]) - first
            opening = first + piece // self._shuffle_window * self._shuffle_window
            closing = np.minimum(opening + self._shuffle_window, len(shards.shard))
            low[at] = np.maximum(start[at], shards.bounds[opening])
            high[at] = np.minimum(stop[at], shards.bounds[closing])
            key[at] = hash64_array(shards.key, low[at])
        if attempt is None:
            chosen = low + permuted(key, high - low, position - low)
        else:
            drawn = hash64_array(hash64("replacement", attempt), key ^ position.astype(np.uint64))
            chosen = low + (drawn % (high - low).astype(np.uint64)).astype(np.int64)
        shard, sample = np.empty_like(chosen), np.empty_like(chosen)
        for shards, at in epochs:
            piece = shards.piece(chosen[at])
            shard[at], sample[at] = shards.shard[piece], chosen[at] - shards.bounds[piece]
        return epoch, shard, sample

    def _before_stream(self, bound: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """Return how many integers below `bound` are less than `stream` modulo C."""
        rounds, rest = np.divmod(bound, self._num_streams)
        return rounds * stream + np.minimum(rest, stream)

    def _permute_shards(self, source: int, epoch: int) -> _Epoch:
        sizes, seed = self._counts[source], self._seeds[source]
        order = permutation(hash64(seed, "shards", epoch), len(sizes))
        order = order[sizes[order] > 0]
        return _Epoch(np.concatenate([[0], np.cumsum(sizes[order])]), order, hash64(seed, "window", epoch))
