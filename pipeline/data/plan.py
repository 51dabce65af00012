"""The order of the data: which sample stands in which place of which global batch. Pure arithmetic, no reading.

Contract C1. Per source and epoch the shards are permuted, laid end to end and cut into C lanes equal to within one
sample; odd samples rotate over the lanes from epoch to epoch. A lane shuffles inside windows of a few shard pieces.
Each lane mixes its sources by one periodic cycle (Tijdeman, "The chairman assignment problem", Discrete Mathematics
32, 1980), which stays within one sample of the weights, and starts in it at a hashed offset. Global batch s takes
the next B/C samples of every lane, in lane order. Who reads what plays no part anywhere. Buckets change which of a
lane's next samples share a batch, inside fixed blocks of steps, and nothing else.

Every sample is found by arithmetic, wherever it stands: nothing is counted through and no window is ever laid out,
so memory is in proportion to the shards and lanes, whatever the number of samples.

Letters: C lanes, B places of a global batch, N samples of a source, K sources, M length of the cycle, L places asked
for at once, S shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.randomness import hash64, hash64_array, permutation, permuted

PARTS = 4096  # weights are rounded to this many parts
_VERSION = 2
_RUN = 64  # places that `slot` finds together: numpy's calls cost as much for one place
T = TypeVar("T")


class Slot(NamedTuple):
    """One sample in one epoch of one source; `shard` and `sample` count from 0, `sample` only those to be read."""

    source: str
    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class PlanSource:
    """What the plan knows of a source. `digest` names the data; `weight` is relative to the other sources'."""

    counts: np.ndarray  # (S,) int64, samples to be read of each shard
    weight: float
    digest: str


@dataclass(frozen=True)
class Buckets:
    """Samples of like length share a batch: each lane sorts blocks of `batches` batches' worth of its samples.

    `length` tells a sample's length in any unit, always the same for the same slot; what it measures belongs in the
    plan's `extra`. Lengths are asked only of lanes that are read. A block may reach over the end of an epoch. The
    mixing of sources is as without buckets over every block, not inside it.
    """

    batches: int
    length: Callable[[Slot], int]


class Plan:
    """The order of one stage. `step` counts from the stage's start, `place` is the position in the global batch.

    `extra` holds whatever else decides what a row contains and is only hashed into the digest. Raises ConfigError
    when the lanes do not divide the batch, and DataError when a source has fewer samples than there are lanes.
    """

    def __init__(
        self,
        sources: Mapping[str, PlanSource],
        lanes: int,
        window: int,
        seed: int,
        batch: int,
        extra: Sequence[str] = (),
        buckets: Buckets | None = None,
    ):
        _check(sources, lanes, batch)
        self.names = tuple(sorted(sources))
        self.lanes, self.size = lanes, batch
        self.parts = weight_parts([sources[name].weight for name in self.names])
        self.order = LaneOrder({name: sources[name].counts for name in self.names}, lanes, window, seed)
        facts = [lanes, window, seed, batch, list(extra), buckets.batches if buckets else None]
        self.digest = _digest([sources[name] for name in self.names], self.names, self.parts, facts)
        self._cycle = np.array(mixing_cycle(self.parts), dtype=np.int64)
        self._before = _prefix_counts(self._cycle, len(self.names))
        self._starts = np.array([hash64(seed, "cycle", lane) % len(self._cycle) for lane in range(lanes)])
        self._share = batch // lanes
        self._seed, self._buckets = seed, buckets
        self._runs: _Recent[list[Slot]] = _Recent(64)
        self._blocks: _Recent[np.ndarray] = _Recent(max(64, 3 * lanes))

    def slot(self, step: int, place: int) -> Slot:
        """The sample planned at one place of one global batch."""
        length = self._share if self._buckets else _RUN  # lengths are asked of no other lane
        first = place - place % length
        run = range(first, min(first + length, self.size))
        return self._runs.get((step, first), lambda: self.slots(step, run))[place - first]

    def slots(self, step: int, places: range) -> list[Slot]:
        """The samples planned at some places of one global batch: one call costs little more than one place."""
        return self._read(*self._turns(step, places))

    def batch(self, step: int) -> list[Slot]:
        """The samples of global batch `step`, in order of place."""
        return self.slots(step, range(self.size))

    def replacement(self, step: int, place: int, attempt: int) -> Slot:
        """The candidate to take the place of a bad sample: from the same window, drawn by a hash of the attempt."""
        lane, turn = self._turns(step, range(place, place + 1))
        source, ordinal = self._mixed(lane, turn)
        return self._named(source, *self.order.replacements(source, lane, ordinal, attempt))[0]

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`, on average over the lanes."""
        taken = step * self.size / sum(self.parts)
        totals = self.order.totals.tolist()
        return {n: taken * part / total for n, part, total in zip(self.names, self.parts, totals, strict=True)}

    def _turns(self, step: int, places: range) -> tuple[np.ndarray, np.ndarray]:
        """(L,) int64 lanes, and (L,) the turns of their mixed sequences that stand at these places."""
        lane, at = np.divmod(np.arange(places.start, places.stop, places.step), self._share)
        if self._buckets is None:
            return lane, step * self._share + at
        batches = self._buckets.batches
        block, in_block = divmod(step, batches)
        # One order for all lanes: a global batch takes each lane's group of the same rank in length.
        group = permutation(hash64(self._seed, "bucket", block), batches)[in_block]
        read, which = np.unique(lane, return_inverse=True)
        groups = [self._groups(one, block)[group] for one in read.tolist()]
        in_lane = np.array(groups, dtype=np.int64).reshape(len(groups), self._share)[which, at]
        return lane, block * batches * self._share + in_lane

    def _groups(self, lane: int, block: int) -> np.ndarray:
        """(batches, B/C) int32: the turns of a block, counted from its first, sorted into groups of like length."""
        buckets = self._buckets
        assert buckets is not None

        def make() -> np.ndarray:
            turns = np.arange(buckets.batches * self._share)
            slots = self._read(np.full(len(turns), lane), block * len(turns) + turns)
            lengths = np.array([buckets.length(slot) for slot in slots])
            groups = np.argsort(lengths, kind="stable").reshape(buckets.batches, self._share)
            return np.sort(groups, axis=1).astype(np.int32)  # in a group the lane's own order stays

        return self._blocks.get((lane, block), make)

    def _mixed(self, lane: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and which of the source's samples in that lane comes at that turn of the lane. (L,) int64."""
        start = self._starts[lane]
        cycles, at = np.divmod(start + turn, len(self._cycle))
        source = self._cycle[at]
        ordinal = cycles * self._before[source, -1] + self._before[source, at] - self._before[source, start]
        return source, ordinal

    def _read(self, lane: np.ndarray, turn: np.ndarray) -> list[Slot]:
        source, ordinal = self._mixed(lane, turn)
        return self._named(source, *self.order.samples(source, lane, ordinal))

    def _named(self, source: np.ndarray, *numbers: np.ndarray) -> list[Slot]:
        names = [self.names[number] for number in source.tolist()]
        return list(map(Slot, names, *(values.tolist() for values in numbers)))


def rank_slice(batch: int, rank: int, world: int) -> range:
    """The places of a global batch that a rank reads: ⌊rB/W⌋ to ⌊(r+1)B/W⌋ - 1. W need divide nothing."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def weight_parts(weights: Sequence[float]) -> list[int]:
    """The weights as whole parts of `PARTS` (each at least 1), in lowest terms so that the cycle is short."""
    total = math.fsum(weights)
    exact = [weight / total * PARTS for weight in weights]
    parts = [max(1, math.floor(value)) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for turn in range(PARTS - sum(parts)):
        parts[by_remainder[turn % len(parts)]] += 1
    while sum(parts) > PARTS:  # many tiny weights were raised to 1: the largest pays
        parts[parts.index(max(parts))] -= 1
    common = math.gcd(*parts)
    return [part // common for part in parts]


def mixing_cycle(parts: Sequence[int]) -> list[int]:
    """One period of M = sum(parts) turns, each naming a source; every prefix is within 1 - 1/(2K-2) of the weights.

    Tijdeman's rule: among the sources that lag by at least 1/(2K-2), the one whose deadline comes first.
    """
    length, bound = sum(parts), 2 * len(parts) - 2
    if len(parts) == 1:
        return [0]
    taken = [0] * len(parts)
    cycle = []
    for turn in range(1, length + 1):
        lags = [part * turn - length * count for part, count in zip(parts, taken, strict=True)]  # in 1/length
        ready = [i for i, lag in enumerate(lags) if lag * bound >= length]
        # Deadline (1 - 1/bound - lag) / weight, exactly: a rounding tie would differ between machines.
        chosen = min(ready, key=lambda i: (Fraction(length * (bound - 1) - bound * lags[i], parts[i]), i))
        taken[chosen] += 1
        cycle.append(chosen)
    return cycle


def _prefix_counts(cycle: np.ndarray, num_sources: int) -> np.ndarray:
    """(K, M+1) int64: how often source k stands among the first t turns of the cycle."""
    stands = cycle == np.arange(num_sources)[:, None]
    return np.concatenate([np.zeros((num_sources, 1), dtype=np.int64), np.cumsum(stands, axis=1)], axis=1)


@dataclass(frozen=True)
class Windows:
    """Where samples stand before their window is shuffled. All (L,) int64, `key` uint64."""

    epoch: np.ndarray
    low: np.ndarray  # the window is low … high-1 among the epoch's permuted samples
    high: np.ndarray
    position: np.ndarray
    key: np.ndarray  # of the window's order


@dataclass(frozen=True)
class _Epoch:
    """The shards of one source in one epoch: the i-th is shard[i] and holds the samples bounds[i] … bounds[i+1]-1."""

    bounds: np.ndarray  # (S'+1,) int64, empty shards left out
    shard: np.ndarray  # (S',) int64
    key: int

    def holding(self, position: np.ndarray) -> np.ndarray:
        """Which i holds a position."""
        return np.searchsorted(self.bounds, position, side="right") - 1


class LaneOrder:
    """Each source's samples, lane by lane and epoch by epoch. Sources are numbers, in the order of `counts`.

    A lane's samples of a source are numbered through all epochs: `ordinal` counts from 0. Lane c has in all epochs
    before e as many samples as there are numbers below eN that leave c modulo C: so lanes never differ by more than
    one, in an epoch or in total, and the odd samples of an epoch go to the lanes after those of the epoch before.
    """

    def __init__(self, counts: Mapping[str, np.ndarray], lanes: int, window: int, seed: int):
        self._seeds = [hash64(seed, "source", name) for name in counts]
        self._counts = [np.asarray(sizes, dtype=np.int64) for sizes in counts.values()]
        self._lanes, self._window = lanes, window
        self.totals = np.array([sizes.sum() for sizes in self._counts])  # (K,) int64
        self._epochs: _Recent[_Epoch] = _Recent(4 * len(counts))

    def samples(
        self, source: np.ndarray, lane: np.ndarray, ordinal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(L,) int64 each: epoch, shard and sample of each lane's `ordinal`-th sample of a source."""
        found = self.windows(source, lane, ordinal)
        chosen = permuted(found.key, found.high - found.low, found.position - found.low)
        return found.epoch, *self.locate(source, found.epoch, found.low + chosen)

    def replacements(
        self, source: np.ndarray, lane: np.ndarray, ordinal: np.ndarray, attempt: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `samples`, but some sample of the same window, drawn by a hash of the position and the attempt."""
        found = self.windows(source, lane, ordinal)
        drawn = hash64_array(hash64("replacement", attempt), found.key ^ found.position.astype(np.uint64))
        chosen = (drawn % (found.high - found.low).astype(np.uint64)).astype(np.int64)
        return found.epoch, *self.locate(source, found.epoch, found.low + chosen)

    def windows(self, source: np.ndarray, lane: np.ndarray, ordinal: np.ndarray) -> Windows:
        """The window, of a few pieces of shards, that each lane's `ordinal`-th sample of a source comes from."""
        epoch = (ordinal * self._lanes + lane) // self.totals[source]
        start, stop = self.lane_start(source, epoch, lane), self.lane_start(source, epoch, lane + 1)
        position = start + ordinal - self.taken(source, epoch, lane)
        low, high, key = np.empty_like(start), np.empty_like(start), np.empty(len(start), dtype=np.uint64)
        for shards, at in self._by_epoch(source, epoch):
            first = shards.holding(start[at])  # the shard the lane begins in
            piece = shards.holding(position[at]) - first
            opening = first + piece // self._window * self._window
            closing = np.minimum(opening + self._window, len(shards.shard))
            low[at] = np.maximum(start[at], shards.bounds[opening])
            high[at] = np.minimum(stop[at], shards.bounds[closing])
            key[at] = hash64_array(shards.key, low[at])
        return Windows(epoch, low, high, position, key)

    def locate(self, source: np.ndarray, epoch: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample that stand at a position among an epoch's permuted samples."""
        shard, sample = np.empty_like(position), np.empty_like(position)
        for shards, at in self._by_epoch(source, epoch):
            piece = shards.holding(position[at])
            shard[at] = shards.shard[piece]
            sample[at] = position[at] - shards.bounds[piece]
        return shard, sample

    def taken(self, source: np.ndarray, epoch: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Samples of a source that a lane has read before an epoch."""
        return (epoch * self.totals[source] + self._lanes - 1 - lane) // self._lanes

    def lane_start(self, source: np.ndarray, epoch: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Where a lane begins among an epoch's permuted samples; lane C begins where they end."""
        begin = epoch * self.totals[source]
        return self._before_lane(begin + self.totals[source], lane) - self._before_lane(begin, lane)

    def _before_lane(self, below: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """How many numbers under `below` leave less than `lane` modulo C."""
        rounds, rest = np.divmod(below, self._lanes)
        return rounds * lane + np.minimum(rest, lane)

    def _by_epoch(self, source: np.ndarray, epoch: np.ndarray) -> Iterator[tuple[_Epoch, np.ndarray | slice]]:
        """Each epoch of a source that is asked for, and where in the arrays."""
        asked = epoch * len(self._counts) + source
        each = dict.fromkeys(asked.tolist())
        for number in each:
            at = np.flatnonzero(asked == number) if len(each) > 1 else slice(None)
            yield self._shards(number % len(self._counts), number // len(self._counts)), at

    def _shards(self, source: int, epoch: int) -> _Epoch:
        def make() -> _Epoch:
            sizes, seed = self._counts[source], self._seeds[source]
            order = permutation(hash64(seed, "shards", epoch), len(sizes))
            order = order[sizes[order] > 0]
            return _Epoch(np.concatenate([[0], np.cumsum(sizes[order])]), order, hash64(seed, "window", epoch))

        return self._epochs.get((source, epoch), make)


@dataclass
class _Entry(Generic[T]):
    lock: threading.Lock
    value: T | None = None


class _Recent(Generic[T]):
    """The values used last, made again when needed: by one thread, while others may use other values."""

    def __init__(self, most: int):
        self._most = most
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(threading.Lock()))
            self._entries.move_to_end(key)
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.value is None:
                entry.value = make()
            return entry.value


def _check(sources: Mapping[str, PlanSource], lanes: int, batch: int) -> None:
    if batch % lanes:
        raise ConfigError(
            f"data.lanes {lanes} does not divide the global batch {batch}; every lane gives equally many samples. "
            f"Choose lanes from the divisors of the batch, e.g. {math.gcd(lanes, batch)}"
        )
    for name, source in sources.items():
        samples = int(source.counts.sum())
        if not samples:
            raise DataError(
                f"source '{name}' has no samples to read: its shards are empty, or its filters and opt-out list keep "
                "none. Look at them with mome shards show, or ask less of the filters"
            )
        if samples < lanes:
            raise DataError(
                f"source '{name}' has {samples} samples, fewer than data.lanes {lanes}: some lanes would stay "
                f"empty. Lower data.lanes to at most {samples}, or add samples"
            )


def _digest(sources: Sequence[PlanSource], names: Sequence[str], parts: Sequence[int], facts: Sequence[object]) -> str:
    read = [
        [name, source.digest, hashlib.sha256(source.counts.astype("<i8").tobytes()).hexdigest(), part]
        for name, source, part in zip(names, sources, parts, strict=True)
    ]
    return hashlib.sha256(json.dumps([_VERSION, read, *facts]).encode()).hexdigest()
