"""The data order: which sample is at which position of which global batch. It is pure arithmetic: nothing is read, and
time and memory do not depend on the position or on the number of samples.

Contract C1. Per source and epoch, the shards are permuted, concatenated and cut into C streams of equal length to
within one sample; the odd samples rotate over the streams from epoch to epoch. A stream shuffles inside windows of a
few shard pieces. Each stream mixes its sources by one periodic cycle (Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980), which stays within one sample of the weights and starts at a hashed offset. Global batch
s takes the next B/C samples of every stream, in stream order. Ranks and workers have no influence. Length buckets
change which of a stream's next samples share a batch, inside fixed blocks of steps, and nothing else.

Letters: C streams, B samples of a global batch, N samples of a source, K sources, M length of the cycle, L positions of
one call, S shards.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
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


class OrderSource(NamedTuple):
    """A source as the order sees it. `digest` identifies the data; `weight` is relative to the other sources'."""

    counts: np.ndarray  # (S,) int64, selected samples of each shard
    weight: float
    digest: str


class LengthBuckets(NamedTuple):
    """Batches of similar length: each stream sorts blocks of `batches` batches' worth of its samples, and only over a
    whole block are the sources mixed by weight. What `length` measures belongs in the order's `extra`.
    """

    batches: int
    length: Callable[[SampleRef], int]


class DataOrder:
    """The order of one stage. `extra` only enters the digest: everything else that determines an example's content."""

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
                f"data.streams {num_streams} does not divide the global batch size {batch_size}; each stream gives the "
                f"same number of samples. Choose a divisor of the batch size, e.g. {math.gcd(num_streams, batch_size)}"
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
        self.seed, self._shuffle_window, self._buckets = seed, shuffle_window, buckets
        self._per_stream = batch_size // num_streams
        self._counts = [np.asarray(sources[name].counts, dtype=np.int64) for name in self.names]
        self._totals = np.array([counts.sum() for counts in self._counts])  # (K,) int64
        self.parts, cycle = mixing_cycle([sources[name].weight for name in self.names])
        source_facts = [
            [name, sources[name].digest, hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest(), part]
            for name, counts, part in zip(self.names, self._counts, self.parts, strict=True)
        ]
        settings = [num_streams, shuffle_window, seed, batch_size, list(extra), buckets.batches if buckets else None]
        self.digest = hashlib.sha256(json.dumps([_VERSION, source_facts, *settings]).encode()).hexdigest()
        self._cycle = np.array(cycle, dtype=np.int64)
        occurrences = np.cumsum(self._cycle == np.arange(len(self.names))[:, None], axis=1)
        self._before = np.pad(occurrences, ((0, 0), (1, 0)))  # (K, M+1): occurrences among the first t of the cycle
        self._starts = np.array([hash64(seed, "cycle", stream) % len(cycle) for stream in range(num_streams)])
        self._epoch = lru_cache(4 * len(self.names))(self._permute_shards)
        self._lock = threading.RLock()  # threads that need the same block look up its lengths once
        self._groups = lru_cache(max(64, 3 * num_streams))(self._sort_block)

    def samples(self, step: int, places: range | None = None, attempt: int | None = None) -> list[SampleRef]:
        """Return the samples at places of global batch `step` (default: all, which cost little more than one), or with
        an `attempt` candidates to replace them: from the same shuffle windows, drawn by a hash of the attempt.
        """
        places = range(self.batch_size) if places is None else places
        stream, offset = np.divmod(np.arange(places.start, places.stop, places.step), self._per_stream)
        if self._buckets is None:
            return self._look_up(stream, step * self._per_stream + offset, attempt)
        batches = self._buckets.batches
        block, in_block = divmod(step, batches)
        # All streams share one permutation: a global batch takes the group of the same length rank of each.
        group = permutation(hash64(self.seed, "bucket", block), batches)[in_block]
        read, which = np.unique(stream, return_inverse=True)
        with self._lock:
            groups = np.array([self._groups(number, block)[group] for number in read.tolist()], dtype=np.int64)
        in_stream = groups.reshape(len(read), self._per_stream)[which, offset]
        return self._look_up(stream, block * batches * self._per_stream + in_stream, attempt)

    def _sort_block(self, stream: int, block: int) -> np.ndarray:
        """Return (batches, B/C) int32: a block's positions, relative to its first, grouped by similar length."""
        assert self._buckets is not None
        positions = np.arange(self._buckets.batches * self._per_stream)
        samples = self._look_up(np.full(len(positions), stream), block * len(positions) + positions)
        groups = np.argsort([self._buckets.length(sample) for sample in samples], kind="stable")
        # Inside a group the stream's own order is kept.
        return np.sort(groups.reshape(self._buckets.batches, self._per_stream), axis=1).astype(np.int32)

    def _look_up(self, stream: np.ndarray, position: np.ndarray, attempt: int | None = None) -> list[SampleRef]:
        """Return the samples at positions (L,) of mixed streams, or with an `attempt` their replacements.

        Before epoch e, stream c reads one sample of a source for each integer below eN that equals c modulo C: streams
        differ by at most one sample, and an epoch's odd samples go to the streams after those of the epoch before.
        """
        starts = self._starts[stream]
        cycles, offset = np.divmod(starts + position, len(self._cycle))
        source = self._cycle[offset]
        # The ordinal of each sample among its stream's samples of the source, through all epochs.
        ordinal = cycles * self._before[source, -1] + self._before[source, offset] - self._before[source, starts]

        # In an epoch's permuted samples, a stream has the positions start … stop-1. With `counted` as the number of
        # integers below each bound that are less than the stream (or the next stream) modulo C:
        total = self._totals[source]
        epoch = (ordinal * self.num_streams + stream) // total
        before = epoch * total
        ends = np.stack([stream, stream + 1])
        rounds, rest = np.divmod(np.stack([before, before + total])[:, None], self.num_streams)
        counted = rounds * ends + np.minimum(rest, ends)  # (2 bounds, 2 ends, L)
        start, stop = counted[1] - counted[0]
        read_earlier = (before + self.num_streams - 1 - stream) // self.num_streams  # by the stream, in other epochs
        place = start + ordinal - read_earlier

        pairs = epoch * len(self.names) + source
        epochs = [
            (self._epoch(pair % len(self.names), pair // len(self.names)), np.flatnonzero(pairs == pair))
            for pair in np.unique(pairs).tolist()
        ]
        # The shuffle window of each sample is low … high-1, permuted under `key`.
        low, high, key = np.empty_like(start), np.empty_like(start), np.empty(len(start), dtype=np.uint64)
        for (bounds, shards, epoch_key), at in epochs:
            first = np.searchsorted(bounds, start[at], side="right") - 1  # the shard in which the stream begins
            piece = np.searchsorted(bounds, place[at], side="right") - 1 - first
            opening = first + piece // self._shuffle_window * self._shuffle_window
            closing = np.minimum(opening + self._shuffle_window, len(shards))
            low[at] = np.maximum(start[at], bounds[opening])
            high[at] = np.minimum(stop[at], bounds[closing])
            key[at] = hash64_array(epoch_key, low[at])
        if attempt is None:
            chosen = low + permuted(key, high - low, place - low)
        else:
            drawn = hash64_array(hash64("replacement", attempt), key ^ place.astype(np.uint64))
            chosen = low + (drawn % (high - low).astype(np.uint64)).astype(np.int64)
        shard, sample = np.empty_like(chosen), np.empty_like(chosen)
        for (bounds, shards, _), at in epochs:
            piece = np.searchsorted(bounds, chosen[at], side="right") - 1
            shard[at], sample[at] = shards[piece], chosen[at] - bounds[piece]
        names = [self.names[number] for number in source.tolist()]
        return list(map(SampleRef, names, epoch.tolist(), shard.tolist(), sample.tolist()))

    def _permute_shards(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return bounds (S'+1,), shards (S',), both int64 and without empty shards, and the key of the windows of one
        epoch of a source: shards[i] has the samples bounds[i] … bounds[i+1]-1.
        """
        sizes, seed = self._counts[source], hash64(self.seed, "source", self.names[source])
        shards = permutation(hash64(seed, "shards", epoch), len(sizes))
        shards = shards[sizes[shards] > 0]
        return np.concatenate([[0], np.cumsum(sizes[shards])]), shards, hash64(seed, "window", epoch)


def share(batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the places [⌊rB/W⌋, ⌊(r+1)B/W⌋) of a global batch that a rank reads; W need not divide B."""
    return rank * batch // world_size, (rank + 1) * batch // world_size


def mixing_cycle(weights: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the weights as integer parts (K), and one period of M = sum(parts) source numbers. The parts are multiples
    of 1/`WEIGHT_PARTS` (at least 1 each), in lowest terms. Every prefix of the cycle is within 1 - 1/(2K-2) of the
    weights by Tijdeman's rule: of the sources that lag by at least 1/(2K-2), take the one whose deadline comes first.
    """
    total = math.fsum(weights)
    exact = [weight / total * WEIGHT_PARTS for weight in weights]
    parts = [max(1, math.floor(value)) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for turn in range(WEIGHT_PARTS - sum(parts)):
        parts[by_remainder[turn % len(parts)]] += 1
    while sum(parts) > WEIGHT_PARTS:  # many tiny weights were raised to 1: take it from the largest
        parts[parts.index(max(parts))] -= 1
    common = math.gcd(*parts)
    parts = [part // common for part in parts]
    if len(parts) == 1:
        return parts, [0]
    length, bound, counts, cycle = sum(parts), 2 * len(parts) - 2, [0] * len(parts), list[int]()
    for turn in range(1, length + 1):
        lags = [part * turn - length * count for part, count in zip(parts, counts, strict=True)]  # in 1/length
        ready = [i for i, lag in enumerate(lags) if lag * bound >= length]
        # Deadline (1 - 1/bound - lag) / weight as an exact fraction: rounding could break ties differently per machine.
        chosen = min(ready, key=lambda i: (Fraction(length * (bound - 1) - bound * lags[i], parts[i]), i))
        counts[chosen] += 1
        cycle.append(chosen)
    return parts, cycle
