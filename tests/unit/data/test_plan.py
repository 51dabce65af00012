from __future__ import annotations

import math
import tracemalloc
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.plan import PARTS, Buckets, Plan, PlanSource, Slot, mixing_cycle, rank_slice, weight_parts


def shards(*counts: int, weight: float = 1.0, digest: str = "") -> PlanSource:
    return PlanSource(np.array(counts, dtype=np.int64), weight, digest)


def random_shards(num: int, most: int, seed: int = 0, weight: float = 1.0) -> PlanSource:
    """Shards of very unequal size, 0 to `most` samples: as many of 1 to 10 as of 100 to 1000."""
    sizes = 10 ** np.random.default_rng(seed).uniform(-1, math.log10(most), num)
    return PlanSource(sizes.astype(np.int64), weight, "")


def plan(lanes: int = 8, batch: int = 32, seed: int = 0, window: int = 2, buckets=None, **changed) -> Plan:
    sources = {"a": shards(10, 0, 7, 23, 1), "b": shards(50, 61, weight=2.3)} | changed
    return Plan(sources, lanes, window, seed, batch, buckets=buckets)


def by_lane(plan: Plan, steps: int) -> dict[int, list[Slot]]:
    share = plan.size // plan.lanes
    lanes = defaultdict(list)
    for step in range(steps):
        for place, slot in enumerate(plan.batch(step)):
            lanes[place // share].append(slot)
    return lanes


@pytest.mark.parametrize("lanes", [1, 2, 8, 32])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_sample_comes_exactly_once_per_epoch_and_shards(lanes: int, window: int):
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
    order = plan(c=shards(40, weight=0.7))
    total = 1.0 + 2.3 + 0.7
    for slots in by_lane(order, 400).values():
        taken = Counter()
        for count, slot in enumerate(slots, start=1):
            taken[slot.source] += 1
            for source, weight in {"a": 1.0, "b": 2.3, "c": 0.7}.items():
                assert abs(taken[source] - count * weight / total) < 2


TWENTY = {f"s{number:02}": shards(1000 + number, weight=number + 0.3) for number in range(20)}


def test_every_window_of_every_lane_is_within_two_samples_of_the_weights_for_20_sources():
    order = Plan(TWENTY, lanes=6, window=2, seed=3, batch=6 * 256)
    shares = np.array(order.parts) / sum(order.parts)
    assert sum(order.parts) == PARTS
    for slots in by_lane(order, 2 * PARTS // 256).values():  # two cycles: windows of up to one, from every start
        stands = np.array([order.names.index(slot.source) for slot in slots])[:, None] == np.arange(20)
        ahead = np.concatenate([np.zeros((1, 20)), np.cumsum(stands - shares, axis=0)])
        # A window's deviation is the difference of two prefixes': the widest pair bounds them all.
        assert np.ptp(ahead, axis=0).max() < 2


def test_batches_spread_as_independent_offsets_predict_and_less_than_if_samples_were_drawn():
    """A lane gives B/C turns in a row from a hashed offset, so a batch's count of a source is a sum of C such counts:
    mean Bw, variance C times that of B/C turns from a random offset of the cycle."""
    lanes, share, steps = 64, 16, PARTS // 16
    order = Plan(TWENTY, lanes, window=2, seed=5, batch=lanes * share)
    counts = [Counter(slot.source for slot in order.batch(step)) for step in range(steps)]
    cycle = np.array(mixing_cycle(order.parts))
    deviations, ratios = [], []
    for number, (name, part) in enumerate(zip(order.names, order.parts, strict=True)):
        before = np.concatenate([[0], np.cumsum(np.tile(cycle, 2) == number)])
        variance = lanes * np.var(before[share : share + PARTS] - before[:PARTS])
        expected = order.size * part / PARTS
        deviations.append([(count[name] - expected) / math.sqrt(variance) for count in counts])
        ratios.append(variance / (expected * (1 - part / PARTS)))
    assert np.abs(deviations).max() < 5
    assert 0.9 < np.std(deviations) < 1.1
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.5


def test_300_very_unequal_shards_on_192_lanes_come_exactly_once_per_epoch_in_equal_lanes():
    data = random_shards(300, 10_000)
    order = Plan({"a": data}, lanes=192, window=4, seed=1, batch=192 * 32)
    total = int(data.counts.sum())
    assert data.counts.min() == 0
    assert data.counts.max() > 5000
    epochs = Counter()
    read = [set(), set()]
    for step in range(2 * total // order.size + 2):
        for place, slot in enumerate(order.batch(step)):
            if slot.epoch < 2:
                epochs[slot.epoch, place // 32] += 1
                read[slot.epoch].add((slot.shard, slot.sample))
    whole = {(shard, sample) for shard, size in enumerate(data.counts.tolist()) for sample in range(size)}
    assert read == [whole, whole]
    lengths = np.array([[epochs[epoch, lane] for lane in range(192)] for epoch in range(2)])
    assert lengths.sum(axis=1).tolist() == [total, total], "no sample twice"
    assert np.ptp(lengths, axis=1).max() <= 1
    assert np.ptp(lengths.sum(axis=0)) <= 1


@pytest.mark.parametrize("lanes", [1, 12, 16, 192])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 36, 64, 100, 128, 256, 384])
def test_lanes_are_fetched_by_as_many_ranks_as_the_formula_says(lanes: int, world: int):
    batch = 4608
    share = batch // lanes
    slices = [rank_slice(batch, rank, world) for rank in range(world)]
    fetched = sum(len({place // share for place in places}) for places in slices)
    formula = lanes + world - math.gcd(lanes, world)
    if batch % world == 0:
        assert fetched == formula
    assert fetched <= formula  # rounding a rank's first place down can only bring it to a lane's edge


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
    sources = {"a": shards(41), "b": shards(99, weight=2.0)}
    turned = dict(reversed(sources.items()))
    assert Plan(sources, 4, 2, 0, 8).digest == Plan(turned, 4, 2, 0, 8).digest
    assert Plan(sources, 4, 2, 0, 8).batch(9) == Plan(turned, 4, 2, 0, 8).batch(9)


def test_whatever_decides_the_data_changes_the_digest():
    base = {"a": shards(41, 3)}
    digests = [
        Plan(base, 4, 2, 0, 8).digest,
        Plan({"a": shards(41, 3, digest="replaced")}, 4, 2, 0, 8).digest,
        Plan({"a": shards(40, 4)}, 4, 2, 0, 8).digest,
        Plan({"z": shards(41, 3)}, 4, 2, 0, 8).digest,
        Plan(base | {"b": shards(41)}, 4, 2, 0, 8).digest,
        Plan(base | {"b": shards(41, weight=2.0)}, 4, 2, 0, 8).digest,
        Plan(base, 2, 2, 0, 8).digest,
        Plan(base, 4, 3, 0, 8).digest,
        Plan(base, 4, 2, 1, 8).digest,
        Plan(base, 4, 2, 0, 16).digest,
        Plan(base, 4, 2, 0, 8, extra=["another tokenizer"]).digest,
        Plan(base, 4, 2, 0, 8, buckets=Buckets(4, len)).digest,
        Plan(base, 4, 2, 0, 8, buckets=Buckets(8, len)).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_epochs_and_lanes_are_shuffled():
    order = Plan({"a": shards(*[20] * 10)}, 4, 2, 0, 8)
    epochs = [[(s.shard, s.sample) for step in range(25) for s in order.batch(25 * e + step)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    in_order = sum(later == (now[0], now[1] + 1) for now, later in zip(epochs[0], epochs[0][1:], strict=False))
    assert in_order < 20


def test_a_window_reads_few_shards_at_a_time():
    order = Plan({"a": shards(*[20] * 12)}, 1, 3, 0, 1)
    read = [order.slot(step, 0).shard for step in range(240)]
    assert [len(set(read[first : first + 60])) for first in range(0, 240, 60)] == [3, 3, 3, 3]


def test_replacement_comes_from_the_same_window():
    order = Plan({"a": shards(*[20] * 12)}, 1, 3, 0, 1)
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
    order = Plan({"a": shards(64), "b": shards(32)}, 4, 2, 0, 8)
    assert order.epochs(16) == {"a": 1.0, "b": 2.0}


def test_a_source_smaller_than_the_lanes_is_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"source 'a' has 3 samples.*Lower data.lanes to at most 3"):
        Plan({"a": shards(2, 1)}, 4, 2, 0, 8)


def test_lanes_that_do_not_divide_the_batch_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"data.lanes 5 does not divide the global batch 8"):
        Plan({"a": shards(20)}, 5, 2, 0, 8)


def test_samples_of_some_places_are_those_of_the_batch_and_of_each_place():
    order = plan()
    batch = order.batch(7)
    assert len(batch) == 32
    assert order.slots(7, range(5, 29)) == batch[5:29]
    assert order.slots(7, range(3, 32, 4)) == batch[3::4]
    assert order.slots(7, range(4, 4)) == []
    assert [plan().slot(7, place) for place in range(32)] == batch


def test_memory_does_not_grow_with_the_samples():
    def needed(samples: int) -> int:
        tracemalloc.start()
        order = Plan({"a": shards(*[samples] * 5000)}, lanes=512, window=4, seed=0, batch=4096)
        for step in (0, 10**6):
            order.batch(step)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert needed(200_000) < 1.1 * needed(200)


def test_a_source_without_samples_is_refused():
    with pytest.raises(DataError, match="source 'a' has no samples to read"):
        Plan({"a": shards(0, 0)}, 4, 2, 0, 8)


def caption_length(slot: Slot) -> int:
    """Of made-up captions: 3 to 60 tokens or so, most of them short, as web captions are."""
    random = np.random.default_rng([slot.shard, slot.sample, len(slot.source)])
    return 3 + int(min(57, random.lognormal(2.2, 0.6)))


def bucketed(batches: int = 8, **changed) -> Plan:
    return plan(batch=64, buckets=Buckets(batches, caption_length), **changed)


def padding(order: Plan, steps: int) -> float:
    """Share of the token places of global batches that hold padding."""
    lengths = np.array([[caption_length(slot) for slot in order.batch(step)] for step in range(steps)])
    return 1 - lengths.mean() / lengths.max(axis=1).mean()


def test_buckets_more_than_halve_the_padding():
    assert padding(plan(batch=64), 64) > 0.7
    assert padding(bucketed(batches=8), 64) < 0.35
    assert padding(bucketed(batches=16), 64) < 0.25


def test_every_sample_comes_exactly_once_per_epoch_with_buckets():
    order, plain = bucketed(), plan(batch=64)
    read = Counter(slot for step in range(64) for slot in order.batch(step))
    without = Counter(slot for step in range(64) for slot in plain.batch(step))
    assert read == without, "eight whole blocks hold the same samples, and no sample twice"
    assert set(read.values()) == {1}
    assert {slot.epoch for slot in read if slot.source == "a"} >= {0, 1, 2}, "blocks reach over the end of epochs"


def test_every_block_of_every_lane_is_cut_into_groups_by_length():
    lanes = by_lane(bucketed(), 16)
    for lane, slots in lanes.items():
        for block in (slots[:64], slots[64:]):
            groups = [sorted(map(caption_length, block[first : first + 8])) for first in range(0, 64, 8)]
            in_order = sorted(groups)
            assert all(now[-1] <= later[0] for now, later in pairwise(in_order))
            if lane == 0:
                assert groups != in_order, "short batches do not come first"


def test_groups_of_all_lanes_in_a_batch_have_the_same_rank():
    lanes = by_lane(bucketed(), 8)
    ranks = []
    for slots in lanes.values():
        means = [np.mean([caption_length(slot) for slot in slots[first : first + 8]]) for first in range(0, 64, 8)]
        ranks.append(np.argsort(np.argsort(means)).tolist())
    assert ranks == ranks[:1] * 8


@pytest.mark.parametrize("world", [1, 3, 5, 8])
def test_ranks_find_the_bucketed_batch_whatever_their_number_and_the_step_they_begin_with(world: int):
    together = bucketed()
    for step in (1003, 2):
        apart = [bucketed().slots(step, rank_slice(64, rank, world)) for rank in range(world)]
        assert [slot for rows in apart for slot in rows] == together.batch(step)
    fresh = bucketed()
    assert [fresh.slot(2, place) for place in range(64)] == together.batch(2)


def test_lengths_are_asked_only_of_the_lanes_that_are_read():
    asked = set()

    def length(slot: Slot) -> int:
        asked.add(slot)
        return caption_length(slot)

    order = plan(batch=64, buckets=Buckets(8, length))
    order.slot(3, 17)
    assert asked == set(by_lane(plan(batch=64), 8)[2])


def test_threads_that_want_one_block_ask_its_lengths_once():
    asked = Counter()

    def length(slot: Slot) -> int:
        asked[slot] += 1
        return caption_length(slot)

    order = plan(batch=64, buckets=Buckets(8, length))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda step: order.slots(step, range(16, 24)), [*range(8)] * 4))
    assert found == [bucketed().slots(step, range(16, 24)) for step in [*range(8)] * 4]
    assert len(asked) == 64
    assert set(asked.values()) == {1}


def test_replacement_of_a_bucketed_sample_comes_from_its_window():
    data = {"a": shards(*[40] * 12)}
    order = Plan(data, 1, 3, 0, 4, buckets=Buckets(20, caption_length))
    plain = Plan(data, 1, 3, 0, 4)
    windows = [{slot.shard for step in range(30 * w, 30 * w + 30) for slot in plain.batch(step)} for w in range(4)]
    assert [len(window) for window in windows] == [3] * 4
    for step in range(0, 60):
        planned, instead = order.slot(step, 2), order.replacement(step, 2, attempt=1)
        assert [planned.shard in window for window in windows] == [instead.shard in window for window in windows]
