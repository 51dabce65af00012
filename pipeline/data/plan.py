"""The order of the data: which sample stands in which place of which global batch. Pure arithmetic, no reading.

Contract C1. Per source and epoch the shards are permuted, laid end to end and cut into C lanes equal to within one
sample; odd samples rotate over the lanes from epoch to epoch. A lane shuffles inside windows of a few shard pieces.
Each lane mixes its sources by one periodic cycle (Tijdeman, "The chairman assignment problem", Discrete Mathematics
32, 1980), which stays within one sample of the weights, and starts in it at a hashed offset. Global batch s takes
the next B/C samples of every lane, in lane order. Who reads what plays no part anywhere.

Letters: C lanes, B places of a global batch, N samples of a source, K sources, M length of the cycle.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.manifest import Manifest
from pipeline.data.randomness import hash64, permutation

PARTS = 4096  # weights are rounded to this many parts
_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One sample in one epoch of one source; `shard` and `sample` count from 0 in the manifest's order."""

    source: str
    epoch: int
    shard: int
    sample: int


class Plan:
    """The order of one stage. `step` counts from the stage's start, `place` is the position in the global batch.

    `sources` maps each name to (manifest, weight, use); `extra` holds whatever else decides what a row contains and
    is only hashed into the digest. Raises ConfigError when the lanes do not divide the batch, and DataError when a
    source has fewer samples than there are lanes.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Manifest, float, str]],
        lanes: int,
        window: int,
        seed: int,
        batch: int,
        extra: Sequence[str] = (),
    ):
        if batch % lanes:
            raise ConfigError(
                f"data.lanes {lanes} does not divide the global batch {batch}; every lane gives equally many samples. "
                f"Choose lanes from the divisors of the batch, e.g. {math.gcd(lanes, batch)}"
            )
        for name, (manifest, _, _) in sources.items():
            if manifest.num_samples < lanes:
                raise DataError(
                    f"source '{name}' has {manifest.num_samples} samples, fewer than data.lanes {lanes}: some lanes "
                    f"would stay empty. Lower data.lanes to at most {manifest.num_samples}, or add samples"
                )
        self.names = tuple(sorted(sources))
        self.lanes, self.size = lanes, batch
        self.parts = weight_parts([sources[name][1] for name in self.names])
        self.digest = _digest(sources, self.names, self.parts, lanes, window, seed, batch, extra)
        self._orders = {n: _SourceOrder(n, sources[n][0], lanes, window, seed, len(sources)) for n in self.names}
        self._cycle = mixing_cycle(self.parts)
        self._before = _prefix_counts(self._cycle, len(self.names))
        self._starts = [hash64(seed, "cycle", lane) % len(self._cycle) for lane in range(lanes)]

    def slot(self, step: int, place: int) -> Slot:
        """The sample planned at one place of one global batch."""
        name, lane, ordinal = self._position(step, place)
        return self._orders[name].slot(lane, ordinal)

    def batch(self, step: int) -> list[Slot]:
        """The samples of global batch `step`, in order of place."""
        return [self.slot(step, place) for place in range(self.size)]

    def replacement(self, step: int, place: int, attempt: int) -> Slot:
        """The candidate to take the place of a bad sample: from the same window, drawn by a hash of the attempt."""
        name, lane, ordinal = self._position(step, place)
        return self._orders[name].replacement(lane, ordinal, attempt)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`, on average over the lanes."""
        taken = step * self.size / sum(self.parts)
        return {n: taken * part / self._orders[n].num_samples for n, part in zip(self.names, self.parts, strict=True)}

    def _position(self, step: int, place: int) -> tuple[str, int, int]:
        """Source, lane, and which of the source's samples in that lane stands there."""
        share = self.size // self.lanes
        lane = place // share
        start = self._starts[lane]
        turns, at = divmod(start + step * share + place % share, len(self._cycle))
        source = self._cycle[at]
        in_cycle = self._before[source][-1]
        ordinal = turns * in_cycle + self._before[source][at] - self._before[source][start]
        return self.names[source], lane, ordinal


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


def _prefix_counts(cycle: list[int], num_sources: int) -> list[list[int]]:
    """before[k][t]: how often source k stands among the first t turns of the cycle."""
    turns = np.array(cycle)
    return [[0, *np.cumsum(turns == source).tolist()] for source in range(num_sources)]


class _SourceOrder:
    """One source's samples, lane by lane and epoch by epoch.

    With q, r = divmod(N, C), lane c has q samples in an epoch, and one more when it is its turn: the r odd samples
    of epoch e go to the lanes e*r … e*r + r - 1 modulo C, so that lanes never differ by more than one in total.
    """

    def __init__(self, name: str, manifest: Manifest, lanes: int, window: int, seed: int, num_sources: int):
        self._seed = hash64(seed, "source", name)
        self._name, self._lanes, self._window = name, lanes, window
        self._sizes = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        self._each, self._odd = divmod(self.num_samples, lanes)
        self._epochs: _Recent[tuple[np.ndarray, np.ndarray]] = _Recent(4)
        self._windows: _Recent[np.ndarray] = _Recent(max(64, 3 * lanes))

    def slot(self, lane: int, ordinal: int) -> Slot:
        """The `ordinal`-th sample that this lane reads from this source."""
        epoch, low, high, at = self._find(lane, ordinal)
        return self._at(epoch, low + int(self._shuffled(epoch, low, high)[at]))

    def replacement(self, lane: int, ordinal: int, attempt: int) -> Slot:
        epoch, low, high, at = self._find(lane, ordinal)
        chosen = hash64(self._seed, "replacement", epoch, low + at, attempt) % (high - low)
        return self._at(epoch, low + chosen)

    def _find(self, lane: int, ordinal: int) -> tuple[int, int, int, int]:
        """Epoch, the window [low, high) of the epoch's permuted samples, and the position in that window."""
        epoch = ordinal * self._lanes // self.num_samples  # exact to one epoch either way
        while self._taken(epoch, lane) > ordinal:
            epoch -= 1
        while self._taken(epoch + 1, lane) <= ordinal:
            epoch += 1
        start, stop = self._lane_start(epoch, lane), self._lane_start(epoch, lane + 1)
        position = start + ordinal - self._taken(epoch, lane)
        bounds, _ = self._shards(epoch)
        first = int(np.searchsorted(bounds, start, side="right")) - 1  # the shard the lane begins in
        piece = int(np.searchsorted(bounds, position, side="right")) - 1 - first
        opening = first + piece // self._window * self._window
        low = max(start, int(bounds[opening]))
        high = min(stop, int(bounds[min(opening + self._window, len(bounds) - 1)]))
        return epoch, low, high, position - low

    def _taken(self, epoch: int, lane: int) -> int:
        """Samples that a lane has read before an epoch."""
        return epoch * self._each + (epoch * self._odd + self._lanes - 1 - lane) // self._lanes

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where a lane begins among an epoch's permuted samples."""
        turn = epoch * self._odd % self._lanes
        last = turn + self._odd
        odd_before = max(0, min(lane, last) - turn) + max(0, min(lane, last - self._lanes))
        return lane * self._each + odd_before

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bounds, order): the i-th shard that is not empty holds bounds[i] … bounds[i+1]-1 and is shard order[i]."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            order = permutation(hash64(self._seed, "shards", epoch), len(self._sizes))
            order = order[self._sizes[order] > 0]
            return np.concatenate([[0], np.cumsum(self._sizes[order])]), order

        return self._epochs.get(epoch, make)

    def _shuffled(self, epoch: int, low: int, high: int) -> np.ndarray:
        key = hash64(self._seed, "window", epoch, low)
        return self._windows.get((epoch, low), lambda: permutation(key, high - low).astype(np.int32))

    def _at(self, epoch: int, position: int) -> Slot:
        bounds, order = self._shards(epoch)
        piece = int(np.searchsorted(bounds, position, side="right")) - 1
        return Slot(self._name, epoch, int(order[piece]), position - int(bounds[piece]))


class _Recent(Generic[T]):
    """The values used last, made again when needed. A lock, because threads draw replacements."""

    def __init__(self, most: int):
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = make()
            if len(self._values) > self._most:
                self._values.popitem(last=False)
            return value


def _digest(
    sources: Mapping[str, tuple[Manifest, float, str]],
    names: Sequence[str],
    parts: Sequence[int],
    lanes: int,
    window: int,
    seed: int,
    batch: int,
    extra: Sequence[str],
) -> str:
    read = [[n, sources[n][0].digest, part, sources[n][2]] for n, part in zip(names, parts, strict=True)]
    facts = [_VERSION, read, lanes, window, seed, batch, list(extra)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
