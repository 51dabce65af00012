"""The plan at the size of a large run: is it right, how long does a step take, what memory does it need.

Nothing is read: the shards are numbers only. Every check is exact and raises AssertionError, naming what is wrong.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from pipeline.data.plan import LaneOrder, Plan, PlanSource, rank_slice

SHARES = (0.01, 0.09, 0.3, 0.6)  # of the samples and shards that each source has
WORLDS = (1, 8, 64, 100, 512, 4096)
_CHUNK = 1 << 20  # samples looked up at once


def bench_plan(
    samples: int = 1_000_000_000,
    shards: int = 100_000,
    ranks: int = 4096,
    lanes: int = 4096,
    batch: int = 65_536,
    window: int = 4,
    whole: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Plans four sources of very unequal size and shards; returns what was checked, times, memory and amplification.

    Times are of one rank of `ranks`, in milliseconds: `first` call there, and the median of those that follow.
    `whole` looks up every sample of every source of one epoch (minutes), not only of the smallest and of some lanes.
    """
    sources = simulated_sources(samples, shards, seed)
    resident = _resident_bytes()
    began = time.perf_counter()
    plan = Plan(sources, lanes, window, seed, batch)
    construct_seconds = time.perf_counter() - began
    steps = _places_in_time(plan)
    times = {name: _rank_times(plan, step, ranks) for name, step in steps.items()}
    memory = {
        "plan_bytes": _traced_peak(lambda: _use(Plan(sources, lanes, window, seed, batch), steps.values(), ranks)),
        "resident_growth_bytes": _resident_bytes() - resident,
    }
    began = time.perf_counter()
    checked = _check(plan, sources, ranks, whole)
    return {
        "samples": samples,
        "shards": shards,
        "lanes": lanes,
        "batch": batch,
        "ranks": ranks,
        "construct_seconds": construct_seconds,
        "milliseconds": times,
        "whole_batch_milliseconds": _milliseconds(partial(plan.batch, steps["middle"])),
        "memory": memory,
        "fetch_amplification": {str(world): _amplification(batch, lanes, world) for world in sorted({*WORLDS, ranks})},
        "checked": checked,
        "check_seconds": time.perf_counter() - began,
    }


def simulated_sources(samples: int, shards: int, seed: int) -> dict[str, PlanSource]:
    """Four sources with `samples` in all; a shard holds a tenth to ten times as many as another. Small ones weigh
    more than their share, so that epochs end at different times."""
    random = np.random.default_rng(seed)
    sources = {}
    left = samples
    for number, share in enumerate(SHARES):
        last = number == len(SHARES) - 1
        total = left if last else int(samples * share)
        left -= total
        relative = 10 ** random.uniform(0, 1, max(1, int(shards * share)))
        edges = np.rint(np.cumsum(relative) / relative.sum() * total).astype(np.int64)
        sources[f"source{number}"] = PlanSource(np.diff(edges, prepend=0), share**0.7, f"simulated {number}")
    return sources


def _places_in_time(plan: Plan) -> dict[str, int]:
    """Steps that matter: of the first epoch of the largest source, and a thousand epochs later."""
    largest = int(np.argmax(plan.order.totals))
    epoch = int(plan.order.totals[largest]) * sum(plan.parts) // (plan.size * plan.parts[largest])
    return {"begin": 0, "middle": epoch // 2, "end": epoch - 1, "after_1000_epochs": 1000 * epoch + epoch // 3}


def _rank_times(plan: Plan, step: int, ranks: int) -> dict[str, float]:
    places = rank_slice(plan.size, ranks // 2, ranks)
    first, *rest = (_milliseconds(partial(plan.slots, later, places)) for later in range(step, step + 65))
    return {"first": first, "then": statistics.median(rest)}


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def _use(plan: Plan, steps: Iterable[int], ranks: int) -> None:
    for step in steps:
        plan.slots(step, rank_slice(plan.size, ranks // 2, ranks))


def _traced_peak(work: Callable[[], object]) -> int:
    """Bytes of Python's and numpy's memory that the work needs at most. Slow while it looks."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _resident_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _amplification(batch: int, lanes: int, world: int) -> dict[str, float]:
    """How many ranks read each lane, on average: counted, and (C+W-gcd(C,W))/C, exact where W divides the batch and
    no less than what is counted elsewhere."""
    share = batch // lanes
    read = 0
    for rank in range(world):
        places = rank_slice(batch, rank, world)
        read += len(range(places.start // share, -(-places.stop // share))) if places else 0
    return {"measured": read / lanes, "formula": (lanes + world - math.gcd(lanes, world)) / lanes}


def _check(plan: Plan, sources: dict[str, PlanSource], ranks: int, whole: bool) -> dict[str, int]:
    """Counts of what was checked.

    The lanes' spans tile each source's epoch; the lanes that are looked at hold exactly the samples of their span;
    of the smallest source (of all with `whole`) every sample comes exactly once in all lanes together; what a step
    gives is what the lanes hold, in turn; and all ranks together read the batch.
    """
    checked = {"spans": 0, "lanes": 0, "samples": 0, "steps": 0}
    random = np.random.default_rng(1)
    smallest = int(np.argmin(plan.order.totals))
    for number, name in enumerate(plan.names):
        epoch = int(random.integers(1, 1000))
        checked["spans"] += _check_spans(plan.order, number, epoch, plan.lanes)
        if whole or number == smallest:
            checked["samples"] += _check_epoch(plan.order, number, epoch, plan.lanes, sources[name].counts)
            checked["lanes"] += plan.lanes
            continue
        for lane in {0, plan.lanes - 1, *random.integers(0, plan.lanes, 6).tolist()}:
            checked["samples"] += _check_lane(plan.order, number, epoch, lane)
            checked["lanes"] += 1
    for lane in {0, plan.lanes - 1, *random.integers(0, plan.lanes, 2).tolist()}:
        checked["steps"] += _check_turns(plan, lane, steps=256)
    step = int(random.integers(0, 10**6))
    apart = [slot for rank in range(ranks) for slot in plan.slots(step, rank_slice(plan.size, rank, ranks))]
    _require(apart == plan.batch(step), f"{ranks} ranks do not read batch {step}")
    return checked


def _check_spans(order: LaneOrder, source: int, epoch: int, lanes: int) -> int:
    every = np.arange(lanes + 1)
    source_of, epoch_of = np.full(lanes + 1, source), np.full(lanes + 1, epoch)
    starts = order.lane_start(source_of, epoch_of, every)
    sizes = np.diff(starts)
    taken = (order.taken(source_of, epoch_of + 1, every) - order.taken(source_of, epoch_of, every))[:-1]
    _require(starts[0] == 0 and starts[-1] == order.totals[source], f"lanes do not tile source {source}")
    _require(bool((sizes == taken).all()), f"lanes of source {source} read more or less than their span")
    _require(np.ptp(sizes) <= 1, f"lanes of source {source} differ by more than a sample")
    return lanes


def _check_epoch(order: LaneOrder, source: int, epoch: int, lanes: int, counts: np.ndarray) -> int:
    total = int(order.totals[source])
    first = np.cumsum(counts) - counts
    seen = np.zeros(total, dtype=bool)
    read = 0
    together = max(1, _CHUNK * lanes // total)
    for begin in range(0, lanes, together):
        for lane, ordinal in _lane_ordinals(order, source, epoch, range(begin, min(begin + together, lanes))):
            found, shard, sample = order.samples(np.full(len(lane), source), lane, ordinal)
            _require(bool((found == epoch).all()), f"source {source}: a lane leaves its epoch")
            _require(bool((sample < counts[shard]).all()), f"source {source}: a sample that its shard has not")
            seen[first[shard] + sample] = True
            read += len(lane)
    _require(read == total and bool(seen.all()), f"source {source}: samples come twice or never")
    return total


def _lane_ordinals(order: LaneOrder, source: int, epoch: int, lanes: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some lanes' samples of one epoch, as arrays of lane and ordinal of at most about `_CHUNK`."""
    lane = np.arange(lanes.start, lanes.stop)
    source_of, epoch_of = np.full(len(lane), source), np.full(len(lane), epoch)
    begin, end = order.taken(source_of, epoch_of, lane), order.taken(source_of, epoch_of + 1, lane)
    sizes = end - begin
    all_lanes = np.repeat(lane, sizes)
    ordinals = np.arange(sizes.sum()) + np.repeat(begin - np.cumsum(sizes) + sizes, sizes)
    for at in range(0, len(ordinals), _CHUNK):
        yield all_lanes[at : at + _CHUNK], ordinals[at : at + _CHUNK]


def _check_lane(order: LaneOrder, source: int, epoch: int, lane: int) -> int:
    """The lane's samples, shuffled, are those of its span, unshuffled: each window's order is one."""
    start, stop = order.lane_start(np.full(2, source), np.full(2, epoch), np.array([lane, lane + 1])).tolist()
    read = [
        np.stack(order.samples(np.full(len(lanes), source), lanes, ordinals)[1:])
        for lanes, ordinals in _lane_ordinals(order, source, epoch, range(lane, lane + 1))
    ]
    span = np.arange(start, stop)
    planned = np.stack(order.locate(np.full(len(span), source), np.full(len(span), epoch), span))
    _require(_sorted(np.concatenate(read, axis=1)) == _sorted(planned), f"source {source}: lane {lane} is not its span")
    return stop - start


def _sorted(samples: np.ndarray) -> bytes:
    shard, sample = samples
    return samples[:, np.lexsort((sample, shard))].tobytes()


def _check_turns(plan: Plan, lane: int, steps: int) -> int:
    """What the steps give of a lane are its samples of each source, in turn from the first."""
    share = plan.size // plan.lanes
    places = range(lane * share, (lane + 1) * share)
    slots = [slot for step in range(steps) for slot in plan.slots(step, places)]
    for number, name in enumerate(plan.names):
        given = [slot[1:] for slot in slots if slot.source == name]
        in_turn = plan.order.samples(np.full(len(given), number), np.full(len(given), lane), np.arange(len(given)))
        held = list(zip(*(values.tolist() for values in in_turn), strict=True))
        _require(given == held, f"steps do not give lane {lane}'s samples of {name} in turn")
    return steps


def _require(holds: bool | np.bool_, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
