"""The data order visits every sample once per epoch, mixes sources by weight, and depends on no rank or batch.
Random numbers never change, are uniform, and are independent of each other.
"""

import itertools
import math
import tracemalloc
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.order import WEIGHT_PARTS, DataOrder, LengthBuckets, OrderSource, SampleRef, mixing_cycle, share
from pipeline.data.randomness import CounterRandom, hash64, hash64_array, permutation, permuted, uniform_array


def shards(*counts: int, weight: float = 1.0, digest: str = "") -> OrderSource:
    return OrderSource(np.array(counts, dtype=np.int64), weight, digest)


SMALL = {"a": shards(10, 0, 7, 23, 1), "b": shards(50, 61, weight=2.3)}


def data_order(streams: int = 8, batch: int = 32, window: int = 2, buckets=None) -> DataOrder:
    return DataOrder(SMALL, streams, window, 0, batch, buckets=buckets)


def by_stream(order: DataOrder, steps: int) -> list[list[SampleRef]]:
    streams: list[list[SampleRef]] = [[] for _ in range(order.num_streams)]
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


# 300 shards of 0 to 3,000 samples, uniform in the logarithm.
UNEQUAL = {"a": shards(*(10 ** np.random.default_rng(0).uniform(-1, 3.5, 300)).astype(int))}
SHAPES = [(SMALL, n, window, 32, 60, 5) for n, window in ((1, 2), (2, 1), (8, 2), (8, 100), (32, 1))]


@pytest.mark.parametrize(
    ("sources", "streams", "window", "batch", "steps", "least"), [*SHAPES, (UNEQUAL, 192, 4, 192 * 32, 40, 2)]
)
def test_every_sample_occurs_once_per_epoch_in_streams_equal_to_within_one_sample(
    sources: dict[str, OrderSource], streams: int, window: int, batch: int, steps: int, least: int
):
    read = by_stream(DataOrder(sources, streams, window, 1, batch), steps)
    for source, data in sources.items():
        whole = {(shard, sample) for shard, size in enumerate(data.counts.tolist()) for sample in range(size)}
        epochs = [defaultdict[int, list](list) for _ in read]
        for stream, samples in zip(epochs, read, strict=True):
            for sample in samples:
                if sample.source == source:
                    stream[sample.epoch].append((sample.shard, sample.sample))
        last, taken = min(max(stream) for stream in epochs), np.zeros(streams, dtype=int)
        assert last >= least
        for epoch in range(last):
            lengths = np.array([len(stream[epoch]) for stream in epochs])
            taken += lengths
            assert {place for stream in epochs for place in stream[epoch]} == whole
            assert (lengths.sum(), np.ptp(lengths) <= 1) == (len(whole), True), "no sample twice"
            assert np.ptp(taken) <= 1, "odd samples must rotate"


def test_spans_of_20_sources_follow_the_weights():
    order = DataOrder(TWENTY, num_streams=6, shuffle_window=2, seed=3, batch_size=6 * 256)
    shares = np.array(order.parts) / sum(order.parts)
    assert sum(order.parts) == WEIGHT_PARTS
    for samples in by_stream(order, 2 * WEIGHT_PARTS // 256):  # two cycles: windows of one from every start
        is_source = np.array([order.names.index(sample.source) for sample in samples])[:, None] == np.arange(20)
        ahead = np.concatenate([np.zeros((1, 20)), np.cumsum(is_source - shares, axis=0)])
        # A window's deviation is the difference of two prefixes': the widest pair bounds them all.
        assert np.ptp(ahead, axis=0).max() < 2


def test_source_counts_vary_less_than_independent_draws():
    # A batch takes B/C consecutive positions of C streams with hashed offsets: its count of a source has mean Bw and C
    # times the variance of B/C positions from a random offset of the cycle.
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
    assert (max(ratios) < 1, np.mean(ratios) < 0.5) == (True, True)


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.3, 0.5, 0.2], [1, 2, 3, 4, 5, 6, 7], [1000, 1], [0.1] * 20])
def test_cycle_keeps_tijdemans_bound_and_is_periodic(weights: list[float]):
    parts, cycle = mixing_cycle(weights)
    assert (math.gcd(*parts), len(cycle)) == (1, sum(parts))
    assert len(cycle) <= WEIGHT_PARTS
    assert np.bincount(cycle, minlength=len(parts)).tolist() == parts
    turns = np.arange(1, len(cycle) + 1)[:, None]
    taken = np.cumsum(np.array(cycle)[:, None] == np.arange(len(parts)), axis=0)
    assert np.abs(turns * parts / len(cycle) - taken).max() <= 1 - 1 / max(1, 2 * len(parts) - 2) + 1e-9
    if len(parts) < 10:  # of many tiny weights, each has at least one part
        exact = [weight / sum(weights) * WEIGHT_PARTS for weight in weights]
        assert all(abs(p * WEIGHT_PARTS / sum(parts) - w) < 1 for p, w in zip(parts, exact, strict=True))


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
    for streams, world in itertools.product((1, 12, 192), (1, 2, 3, 7, 36, 64, 100, 128, 256, 384)):
        slices = [range(*share(4608, rank, world)) for rank in range(world)]
        fetched = sum(len({place // (4608 // streams) for place in places}) for places in slices)
        formula = streams + world - math.gcd(streams, world)  # of the ranks of each stream, summed
        assert fetched <= formula  # rounding a rank's first position down can only move it to the start of a stream
        assert fetched == formula or 4608 % world


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
    assert {(sample.epoch, sample.shard) for sample in candidates} <= {(0, shard) for shard in read[:60]}
    buckets = (LengthBuckets(20, caption_length), None)
    order, plain = (DataOrder({"a": shards(*[40] * 12)}, 1, 3, 0, 4, buckets=length) for length in buckets)
    windows = [{s.shard for step in range(30 * w, 30 * w + 30) for s in plain.samples(step)} for w in range(4)]
    assert [len(window) for window in windows] == [3] * 4
    for step in range(60):
        planned, (instead,) = order.samples(step)[2], order.samples(step, range(2, 3), attempt=1)
        assert [planned.shard in window for window in windows] == [instead.shard in window for window in windows]


def test_impossible_orders_are_rejected_and_memory_does_not_grow_with_the_number_of_samples():
    for counts, streams, message in [
        ((2, 1), 4, r"source 'a' has 3 samples.*Lower data.streams to at most 3"),
        ((0, 0), 4, "source 'a' has no samples to read"),
        ((20,), 5, "data.streams 5 does not divide the global batch size 8"),
    ]:
        with pytest.raises(ConfigError if message.startswith("data") else DataError, match=message):
            DataOrder({"a": shards(*counts)}, streams, 2, 0, 8)
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
    for stream, samples in enumerate(by_stream(data_order(batch=64, buckets=EIGHT), 16)):
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


def order_of(key: int, n: int) -> np.ndarray:
    return permuted(np.full(n, key, dtype=np.uint64), np.full(n, n), np.arange(n))


def keys(num: int) -> np.ndarray:
    return hash64_array(11, np.arange(num))


def test_hashes_counters_and_permutations_never_change():
    # The order of every run's data rests on these: they may never differ.
    assert (hash64(), hash64(0)) == (0x9E3779B97F4A7C15, 0x6E789E6AA1B965F4)
    assert (hash64(1, -2, "words"), hash64("crop", 7)) == (0xA8F7864B36A596C2, 0xADA709E8A50A17AF)
    values = np.array([0, 1, 2**63, 2**64 - 1, 12345], dtype=np.uint64)
    assert hash64_array(99, values).tolist() == [hash64(99, int(value)) for value in values]
    assert len({hash64(1, 2), hash64(2, 1), hash64("1", 2), hash64(1, "2"), hash64(12), hash64("12")}) == 6
    assert hash64(-5) == hash64(2**64 - 5)
    assert (hash64(0, signed=True), hash64(signed=True)) == (hash64(0), hash64() - 2**64)
    random = CounterRandom(0)  # the output of Vigna's splitmix64.c with seed 0
    assert random.uniform() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    assert random.integer(2**64) == 0x6E789E6AA1B965F4
    assert order_of(0, 10).tolist() == [1, 2, 0, 7, 9, 5, 3, 4, 8, 6]
    assert order_of(2**64 - 1, 1000)[:5].tolist() == [540, 586, 764, 115, 149]
    assert order_of(5, 40_000)[[0, 1, 39_999]].tolist() == [25846, 13676, 7238]


def test_numbers_are_uniform_and_determined_by_their_key():
    crop, again, words = (CounterRandom(hash64(1, 2, 3, purpose)) for purpose in ("crop", "crop", "words"))
    drawn = [crop.uniform() for _ in range(5)]
    assert drawn == [again.uniform() for _ in range(5)] != [words.uniform() for _ in range(5)]
    random = CounterRandom(5)
    uniforms = np.array([random.uniform() for _ in range(20000)])
    for numbers, tolerance in ((uniforms, 0.01), (uniform_array(3, np.arange(100000)), 0.005)):
        assert 0 <= numbers.min() < numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < tolerance
        assert abs(numbers.var() - 1 / 12) < 0.005
    assert abs(np.bincount([random.integer(7) for _ in range(21000)], minlength=7) - 3000).max() < 250


def test_permutations_contain_each_number_once_and_elements_do_not_depend_on_each_other():
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(4, n).tolist()) == list(range(n))
    for n in [*range(1, 200), 1024, 1025, 40_000]:
        for key in (0, hash64(n)):
            assert np.array_equal(np.sort(order_of(key, n)), np.arange(n))
    sizes = np.array([1, 2, 3, 17, 400, 65_537, 2**40])
    places = np.array([0, 1, 0, 16, 77, 65_536, 2**39 + 5])
    together = permuted(keys(7), sizes, places)
    assert together.tolist() == [permuted(keys(7)[[i]], sizes[[i]], places[[i]])[0] for i in range(7)]
    assert (together < sizes).all()
    assert permuted(keys(0), places[:0], places[:0]).tolist() == []


def test_permutations_are_uniform():
    for n, bound in ((2, 0.05), (3, 0.05), (4, 0.08)):
        num = 4000 * math.factorial(n)
        orders = permuted(np.repeat(keys(num), n), np.full(n * num, n), np.tile(np.arange(n), num)).reshape(num, n)
        _, times = np.unique(orders, axis=0, return_counts=True)
        assert len(times) == math.factorial(n)
        assert abs(times / 4000 - 1).max() < bound
    n, num = 30, 870 * 200
    for places in ((0, 1), (0, 29), (7, 22), (15, 16)):
        one, other = (permuted(keys(num), np.full(num, n), np.full(num, place)) for place in places)
        pairs = np.bincount(one * n + other, minlength=n * n).reshape(n, n)
        assert np.diag(pairs).sum() == 0
        # Chi-square exceeds these in 1 of 1000 cases, with 29 and 869 degrees of freedom.
        for times, bound in ((pairs.sum(1), 59), (pairs.sum(0), 59), (pairs[~np.eye(n, dtype=bool)], 1005)):
            assert ((times - times.mean()) ** 2 / times.mean()).sum() < bound


def test_long_permutations_resemble_sorted_hashes():
    n, places = 1000, np.arange(1000)
    orders = np.array([order_of(key, n) for key in keys(400).tolist()])
    # The counts of fixed points and of preserved neighbours are Poisson with mean 1.
    for counts in ((orders == places).sum(axis=1), (np.diff(orders, axis=1) == 1).sum(axis=1)):
        assert abs(counts.mean() - 1) < 0.2
        assert abs(counts.var() - 1) < 0.3
    rise = (np.diff(orders, axis=1) > 0).sum(axis=1)
    assert abs(rise.mean() - (n - 1) / 2) < 2
    assert abs(rise.var() / ((n + 1) / 12) - 1) < 0.25
    assert abs(np.abs(orders - places).mean() / (n / 3) - 1) < 0.01  # a number is displaced by n/3 on average
    assert abs(np.corrcoef(orders[:-1].ravel(), orders[1:].ravel())[0, 1]) < 0.01
