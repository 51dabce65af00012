"""The data order visits every sample once per epoch, mixes sources by weight, and depends on no rank or batch."""

import math
import tracemalloc
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.order import WEIGHT_PARTS, DataOrder, LengthBuckets, OrderSource, SampleRef, mixing_cycle, share


def shards(*counts: int, weight: float = 1.0, digest: str = "") -> OrderSource:
    return OrderSource(np.array(counts, dtype=np.int64), weight, digest)


def data_order(streams: int = 8, batch: int = 32, window: int = 2, buckets=None) -> DataOrder:
    sources = {"a": shards(10, 0, 7, 23, 1), "b": shards(50, 61, weight=2.3)}
    return DataOrder(sources, streams, window, 0, batch, buckets=buckets)


def by_stream(order: DataOrder, steps: int) -> dict[int, list[SampleRef]]:
    streams = defaultdict(list)
    for step in range(steps):
        for place, sample in enumerate(order.samples(step)):
            streams[place * order.num_streams // order.batch_size].append(sample)
    return streams


def caption_length(sample: SampleRef) -> int:
    """Return the length of a made-up caption: 3 to 60 tokens, most of them short, as in web captions."""
    random = np.random.default_rng([sample.shard, sample.sample, len(sample.source)])
    return 3 + int(min(57, random.lognormal(2.2, 0.6)))


TWENTY = {f"s{number:02}": shards(1000 + number, weight=number + 0.3) for number in range(20)}
EIGHT = LengthBuckets(8, caption_length)


@pytest.mark.parametrize(("streams", "window"), [(1, 2), (2, 1), (8, 2), (8, 100), (32, 1)])
def test_every_sample_occurs_once_per_epoch_in_streams_equal_to_within_one_sample(streams: int, window: int):
    read = by_stream(data_order(streams, window=window), 60)
    assert set(Counter(sample for samples in read.values() for sample in samples).values()) == {1}
    for source, size in {"a": 41, "b": 111}.items():
        epochs = [Counter(s.epoch for s in samples if s.source == source) for samples in read.values()]
        last, taken = min(max(counts) for counts in epochs), np.zeros(streams, dtype=int)
        assert last >= 5
        for epoch in range(last):
            lengths = np.array([counts[epoch] for counts in epochs])
            taken += lengths
            assert (lengths.sum(), np.ptp(lengths) <= 1) == (size, True)
            assert np.ptp(taken) <= 1, "odd samples must rotate"


def test_unequal_shards_fill_192_streams_equally():
    sizes = 10 ** np.random.default_rng(0).uniform(-1, 4, 300)  # 0 to 10,000 samples, uniform in the logarithm
    data = OrderSource(sizes.astype(np.int64), 1.0, "")
    order = DataOrder({"a": data}, num_streams=192, shuffle_window=4, seed=1, batch_size=192 * 32)
    total, epochs, read = int(data.counts.sum()), np.zeros((2, 192), dtype=int), [set(), set()]
    assert (data.counts.min(), data.counts.max() > 5000) == (0, True)
    for step in range(2 * total // order.batch_size + 2):
        for place, sample in enumerate(order.samples(step)):
            if sample.epoch < 2:
                epochs[sample.epoch, place // 32] += 1
                read[sample.epoch].add((sample.shard, sample.sample))
    whole = {(shard, sample) for shard, size in enumerate(data.counts.tolist()) for sample in range(size)}
    assert read == [whole, whole]
    assert epochs.sum(axis=1).tolist() == [total, total], "no sample twice"
    assert np.ptp(epochs, axis=1).max() <= 1
    assert np.ptp(epochs.sum(axis=0)) <= 1


def test_spans_of_20_sources_follow_the_weights():
    order = DataOrder(TWENTY, num_streams=6, shuffle_window=2, seed=3, batch_size=6 * 256)
    shares = np.array(order.parts) / sum(order.parts)
    assert sum(order.parts) == WEIGHT_PARTS
    for samples in by_stream(order, 2 * WEIGHT_PARTS // 256).values():  # two cycles: windows of one from every start
        is_source = np.array([order.names.index(sample.source) for sample in samples])[:, None] == np.arange(20)
        ahead = np.concatenate([np.zeros((1, 20)), np.cumsum(is_source - shares, axis=0)])
        # A window's deviation is the difference of two prefixes': the widest pair bounds them all.
        assert np.ptp(ahead, axis=0).max() < 2


def test_source_counts_vary_less_than_independent_draws():
    """A batch takes B/C consecutive positions of C streams with hashed offsets: its count of a source has mean Bw and C
    times the variance of B/C positions from a random offset of the cycle."""
    streams, share, steps = 64, 16, WEIGHT_PARTS // 16
    order = DataOrder(TWENTY, streams, shuffle_window=2, seed=5, batch_size=streams * share)
    counts = [Counter(sample.source for sample in order.samples(step)) for step in range(steps)]
    cycle = np.array(mixing_cycle([source.weight for source in TWENTY.values()])[1])
    deviations, ratios = [], []
    for number, (name, part) in enumerate(zip(order.names, order.parts, strict=True)):
        before = np.concatenate([[0], np.cumsum(np.tile(cycle, 2) == number)])
        variance = streams * np.var(before[share : share + WEIGHT_PARTS] - before[:WEIGHT_PARTS])
        expected = order.batch_size * part / WEIGHT_PARTS
        deviations.append([(count[name] - expected) / math.sqrt(variance) for count in counts])
        ratios.append(variance / (expected * (1 - part / WEIGHT_PARTS)))
    assert np.abs(deviations).max() < 5
    assert 0.9 < np.std(deviations) < 1.1
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.5


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.3, 0.5, 0.2], [1, 2, 3, 4, 5, 6, 7], [1000, 1], [0.1] * 20])
def test_cycle_keeps_tijdemans_bound_and_is_periodic(weights: list[float]):
    parts, cycle = mixing_cycle(weights)
    assert len(cycle) == sum(parts) <= WEIGHT_PARTS
    assert math.gcd(*parts) == 1
    assert np.bincount(cycle, minlength=len(parts)).tolist() == parts
    turns = np.arange(1, len(cycle) + 1)[:, None]
    taken = np.cumsum(np.array(cycle)[:, None] == np.arange(len(parts)), axis=0)
    assert np.abs(turns * parts / len(cycle) - taken).max() <= 1 - 1 / max(1, 2 * len(parts) - 2) + 1e-9
    if len(parts) < 10:  # of many tiny weights, each has at least one part
        exact = [weight / sum(weights) * WEIGHT_PARTS for weight in weights]
        assert all(abs(p * WEIGHT_PARTS / sum(parts) - w) < 1 for p, w in zip(parts, exact, strict=True))


@pytest.mark.parametrize("streams", [1, 12, 192])
def test_number_of_ranks_per_stream_follows_the_formula(streams: int):
    for world in (1, 2, 3, 7, 36, 64, 100, 128, 256, 384):
        slices = [range(*share(4608, rank, world)) for rank in range(world)]
        fetched = sum(len({place // (4608 // streams) for place in places}) for places in slices)
        formula = streams + world - math.gcd(streams, world)
        assert fetched <= formula  # rounding a rank's first position down can only move it to the start of a stream
        assert fetched == formula or 4608 % world


def test_batch_is_a_function_of_its_step():
    sources = {"a": shards(41), "b": shards(99, weight=2.0)}
    first, second = DataOrder(sources, 4, 2, 0, 8), DataOrder(dict(reversed(sources.items())), 4, 2, 0, 8)
    first.samples(0), first.samples(77)
    assert first.digest == second.digest
    assert [first.samples(step) for step in (5, 3)] == [second.samples(step) for step in (5, 3)]
    order, bucketed = data_order(), data_order(batch=64, buckets=EIGHT)
    batch = order.samples(7)
    for places in (range(32), range(5, 29), range(3, 32, 4), range(4, 4)):
        assert order.samples(7, places) == [batch[place] for place in places]
    for world in (1, 2, 3, 5, 7, 8, 40):
        slices = [range(*share(64, rank, world)) for rank in range(world)]
        assert [place for rows in slices for place in rows] == list(range(64))
        assert np.ptp([*map(len, slices)]) <= 1
        for step in (1003, 2) if world in (1, 5, 8) else ():
            apart = [data_order(batch=64, buckets=EIGHT).samples(step, places) for places in slices]
            assert [sample for rows in apart for sample in rows] == bucketed.samples(step)
    assert min(sample.epoch for sample in order.samples(10**9)) > 10**7
    assert DataOrder({"a": shards(64), "b": shards(32)}, 4, 2, 0, 8).epochs(16) == {"a": 1.0, "b": 2.0}


def test_every_input_changes_the_digest():
    base = {"a": shards(41, 3)}
    settings = {"num_streams": 4, "shuffle_window": 2, "seed": 0, "batch_size": 8}
    others = [
        {"a": shards(41, 3, digest="replaced")}, {"a": shards(40, 4)}, {"z": shards(41, 3)},
        base | {"b": shards(41)}, base | {"b": shards(41, weight=2.0)},
    ]  # fmt: skip
    changes = [
        {}, {"num_streams": 2}, {"shuffle_window": 3}, {"seed": 1}, {"batch_size": 16}, {"extra": ["a tokenizer"]},
        {"buckets": LengthBuckets(4, len)}, {"buckets": LengthBuckets(8, len)},
    ]  # fmt: skip
    digests = [DataOrder(sources, **settings).digest for sources in others]
    digests += [DataOrder(base, **(settings | change)).digest for change in changes]
    assert len(set(digests)) == len(digests) == 13


def test_epochs_are_shuffled_and_replacements_drawn_in_windows_of_three_shards():
    order = DataOrder({"a": shards(*[20] * 10)}, 4, 2, 0, 8)
    epochs = [[(s.shard, s.sample) for step in range(25) for s in order.samples(25 * e + step)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert sum(later == (now[0], now[1] + 1) for now, later in pairwise(epochs[0])) < 20
    order = DataOrder({"a": shards(*[20] * 12)}, 1, 3, 0, 1)
    read = [order.samples(step)[0].shard for step in range(240)]
    assert [len(set(read[first : first + 60])) for first in range(0, 240, 60)] == [3, 3, 3, 3]
    candidates, again = ([order.samples(17, range(1), attempt)[0] for attempt in range(16)] for _ in range(2))
    assert candidates == again
    assert len(set(candidates)) > 8
    assert {sample.shard for sample in candidates} <= set(read[:60])
    assert {sample.epoch for sample in candidates} == {0}
    order, plain = (
        DataOrder({"a": shards(*[40] * 12)}, 1, 3, 0, 4, buckets=buckets)
        for buckets in (LengthBuckets(20, caption_length), None)
    )
    windows = [{s.shard for step in range(30 * w, 30 * w + 30) for s in plain.samples(step)} for w in range(4)]
    assert [len(window) for window in windows] == [3] * 4
    for step in range(60):
        planned, (instead,) = order.samples(step)[2], order.samples(step, range(2, 3), attempt=1)
        assert [planned.shard in window for window in windows] == [instead.shard in window for window in windows]


def test_impossible_orders_are_rejected():
    for counts, streams, error, message in [
        ((2, 1), 4, DataError, r"source 'a' has 3 samples.*Lower data.streams to at most 3"),
        ((0, 0), 4, DataError, "source 'a' has no samples to read"),
        ((20,), 5, ConfigError, "data.streams 5 does not divide the global batch size 8"),
    ]:
        with pytest.raises(error, match=message):
            DataOrder({"a": shards(*counts)}, streams, 2, 0, 8)


def test_memory_does_not_grow_with_the_number_of_samples():
    needed = []
    for samples in (200, 200_000):
        tracemalloc.start()
        order = DataOrder({"a": shards(*[samples] * 5000)}, num_streams=512, shuffle_window=4, seed=0, batch_size=4096)
        order.samples(0), order.samples(10**6)
        needed.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert needed[1] < 1.1 * needed[0]


def test_buckets_more_than_halve_the_padding_and_keep_every_sample_once_per_epoch():
    read = []
    for buckets, low, high in [(None, 0.7, 1), (EIGHT, 0, 0.35), (LengthBuckets(16, caption_length), 0, 0.25)]:
        batches = [data_order(batch=64, buckets=buckets).samples(step) for step in range(64)]
        read.append(Counter(sample for batch in batches for sample in batch))
        lengths = np.array([[*map(caption_length, batch)] for batch in batches])
        assert low < 1 - lengths.mean() / lengths.max(axis=1).mean() < high
    assert read[0] == read[1] == read[2], "whole blocks hold the same samples, and no sample twice"
    assert set(read[1].values()) == {1}
    assert {sample.epoch for sample in read[1] if sample.source == "a"} >= {0, 1, 2}, "blocks reach over ends of epochs"


def test_buckets_group_every_block_by_length():
    ranks = []
    for stream, samples in by_stream(data_order(batch=64, buckets=EIGHT), 16).items():
        lengths = np.array([*map(caption_length, samples)]).reshape(2, 8, 8)  # two blocks of eight groups
        for groups in lengths:
            in_order = sorted(sorted(group) for group in groups.tolist())
            assert all(now[-1] <= later[0] for now, later in pairwise(in_order))
            if stream == 0:
                assert [sorted(group) for group in groups.tolist()] != in_order, "short batches do not come first"
        ranks.append(np.argsort(np.argsort(lengths.mean(axis=2), axis=1), axis=1).tolist())
    assert ranks == ranks[:1] * 8, "streams contribute groups of the same length rank"


def test_lengths_are_read_once_and_only_of_streams_in_use():
    read: Counter[SampleRef] = Counter()

    def length(sample: SampleRef) -> int:
        read[sample] += 1
        return caption_length(sample)

    order = data_order(batch=64, buckets=LengthBuckets(8, length))
    order.samples(3, range(17, 18))
    assert set(read) == set(by_stream(data_order(batch=64), 8)[2])
    steps = [*range(8)] * 4
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(lambda step: order.samples(step, range(16, 24)), steps))
    assert samples == [data_order(batch=64, buckets=EIGHT).samples(step, range(16, 24)) for step in steps]
    assert (len(read), set(read.values())) == (64, {1})
