from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.manifest import Manifest, ShardRecord
from pipeline.data.plan import PARTS, Plan, Slot, mixing_cycle, rank_slice, weight_parts


def manifest(*sizes: int, prefix: str = "") -> Manifest:
    return Manifest(tuple(ShardRecord(f"{i}.tar", size, size * 100, f"{prefix}{i}") for i, size in enumerate(sizes)))


def plan(lanes: int = 8, batch: int = 32, seed: int = 0, window: int = 2, **changed) -> Plan:
    sources = {"a": (manifest(10, 0, 7, 23, 1), 1.0, "pairs"), "b": (manifest(50, 61), 2.3, "pairs")} | changed
    return Plan(sources, lanes, window, seed, batch)


def by_lane(plan: Plan, steps: int) -> dict[int, list[Slot]]:
    share = plan.size // plan.lanes
    lanes = defaultdict(list)
    for step in range(steps):
        for place, slot in enumerate(plan.batch(step)):
            lanes[place // share].append(slot)
    return lanes


@pytest.mark.parametrize("lanes", [1, 2, 8, 32])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_sample_comes_exactly_once_per_epoch_and_source(lanes: int, window: int):
    order = plan(lanes, window=window)
    read = Counter(slot for step in range(60) for slot in order.batch(step))
    assert set(read.values()) == {1}
    for source, size in {"a": 41, "b": 111}.items():
        last = min(lane_epochs(order, source, 60))
        assert last >= 5
        for epoch in range(last):
            assert sum(slot.source == source and slot.epoch == epoch for slot in read) == size


def lane_epochs(order: Plan, source: str, steps: int) -> list[int]:
    """The epoch each lane has reached in a source."""
    return [max(s.epoch for s in slots if s.source == source) for slots in by_lane(order, steps).values()]


def test_lanes_are_equal_within_one_sample_in_every_epoch_and_over_all_epochs():
    order = plan()
    lanes = by_lane(order, 60)
    for source in "ab":
        taken = Counter()
        for epoch in range(min(lane_epochs(order, source, 60))):
            lengths = [sum(s.source == source and s.epoch == epoch for s in slots) for slots in lanes.values()]
            taken.update(dict(enumerate(lengths)))
            assert max(lengths) - min(lengths) <= 1
            assert max(taken.values()) - min(taken.values()) <= 1, "odd samples must rotate"


def test_mixing_stays_within_two_samples_of_the_weights_in_every_lane():
    order = plan(c=(manifest(40), 0.7, "pairs"))
    total = 1.0 + 2.3 + 0.7
    for slots in by_lane(order, 400).values():
        taken = Counter()
        for count, slot in enumerate(slots, start=1):
            taken[slot.source] += 1
            for source, weight in {"a": 1.0, "b": 2.3, "c": 0.7}.items():
                assert abs(taken[source] - count * weight / total) < 2


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.3, 0.5, 0.2], [1, 2, 3, 4, 5, 6, 7], [1000, 1], [0.1] * 20])
def test_cycle_keeps_tijdemans_bound_and_is_periodic(weights: list[float]):
    parts = weight_parts(weights)
    cycle = mixing_cycle(parts)
    assert len(cycle) == sum(parts) <= PARTS
    assert [cycle.count(source) for source in range(len(parts))] == parts
    if len(parts) == 1:
        return
    taken = [0] * len(parts)
    for turn, source in enumerate(cycle, start=1):
        taken[source] += 1
        worst = max(abs(turn * part / len(cycle) - count) for part, count in zip(parts, taken, strict=True))
        assert worst <= 1 - 1 / (2 * len(parts) - 2) + 1e-9


def test_weights_are_exact_to_one_part():
    parts = weight_parts([0.3, 0.5, 0.2])
    assert sum(parts) == PARTS
    assert all(abs(p - w * PARTS) < 1 for p, w in zip(parts, [0.3, 0.5, 0.2], strict=True))
    assert weight_parts([2.0, 2.0]) == [1, 1]


def test_same_inputs_give_the_same_order_and_digest_whatever_was_asked_before():
    first, second = plan(), plan()
    first.batch(0), first.batch(77)
    assert first.digest == second.digest
    assert [first.batch(step) for step in (5, 3)] == [second.batch(step) for step in (5, 3)]


def test_order_of_naming_the_sources_plays_no_part():
    sources = {"a": (manifest(41), 1.0, "pairs"), "b": (manifest(99), 2.0, "pairs")}
    turned = dict(reversed(sources.items()))
    assert Plan(sources, 4, 2, 0, 8).digest == Plan(turned, 4, 2, 0, 8).digest
    assert Plan(sources, 4, 2, 0, 8).batch(9) == Plan(turned, 4, 2, 0, 8).batch(9)


def test_whatever_decides_the_data_changes_the_digest():
    base = {"a": (manifest(41), 1.0, "pairs")}
    digests = {
        Plan(base, 4, 2, 0, 8).digest,
        Plan({"a": (manifest(41, prefix="replaced"), 1.0, "pairs")}, 4, 2, 0, 8).digest,
        Plan({"a": (manifest(41), 1.0, "text")}, 4, 2, 0, 8).digest,
        Plan({"z": (manifest(41), 1.0, "pairs")}, 4, 2, 0, 8).digest,
        Plan(base | {"b": (manifest(41), 1.0, "pairs")}, 4, 2, 0, 8).digest,
        Plan(base | {"b": (manifest(41), 2.0, "pairs")}, 4, 2, 0, 8).digest,
        Plan(base, 2, 2, 0, 8).digest,
        Plan(base, 4, 3, 0, 8).digest,
        Plan(base, 4, 2, 1, 8).digest,
        Plan(base, 4, 2, 0, 16).digest,
        Plan(base, 4, 2, 0, 8, extra=["another tokenizer"]).digest,
    }
    assert len(digests) == 11


def test_epochs_and_lanes_are_shuffled():
    order = Plan({"a": (manifest(*[20] * 10), 1.0, "pairs")}, 4, 2, 0, 8)
    epochs = [[(s.shard, s.sample) for step in range(25) for s in order.batch(25 * e + step)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    in_order = sum(later == (now[0], now[1] + 1) for now, later in zip(epochs[0], epochs[0][1:], strict=False))
    assert in_order < 20


def test_a_window_reads_few_shards_at_a_time():
    order = Plan({"a": (manifest(*[20] * 12), 1.0, "pairs")}, 1, 3, 0, 1)
    read = [order.slot(step, 0).shard for step in range(240)]
    assert [len(set(read[first : first + 60])) for first in range(0, 240, 60)] == [3, 3, 3, 3]


def test_replacement_comes_from_the_same_window():
    order = Plan({"a": (manifest(*[20] * 12), 1.0, "pairs")}, 1, 3, 0, 1)
    window = {order.slot(step, 0).shard for step in range(60)}
    candidates = [order.replacement(17, 0, attempt) for attempt in range(16)]
    assert {slot.shard for slot in candidates} <= window
    assert len(set(candidates)) > 8
    assert candidates == [order.replacement(17, 0, attempt) for attempt in range(16)]
    assert {slot.epoch for slot in candidates} == {0}


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 40])
def test_ranks_tile_the_batch_and_differ_by_at_most_one_row(world: int):
    slices = [rank_slice(32, rank, world) for rank in range(world)]
    assert [place for rows in slices for place in rows] == list(range(32))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_a_far_step_is_found_at_once():
    order = plan()
    slots = order.batch(10**9)
    assert len(slots) == 32
    assert all(slot.epoch > 10**7 for slot in slots)


def test_epochs_tell_how_often_each_source_was_read():
    order = Plan({"a": (manifest(64), 1.0, "pairs"), "b": (manifest(32), 1.0, "pairs")}, 4, 2, 0, 8)
    assert order.epochs(16) == {"a": 1.0, "b": 2.0}


def test_a_source_smaller_than_the_lanes_is_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"source 'a' has 3 samples.*Lower data.lanes to at most 3"):
        Plan({"a": (manifest(2, 1), 1.0, "pairs")}, 4, 2, 0, 8)


def test_lanes_that_do_not_divide_the_batch_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"data.lanes 5 does not divide the global batch 8"):
        Plan({"a": (manifest(20), 1.0, "pairs")}, 5, 2, 0, 8)
