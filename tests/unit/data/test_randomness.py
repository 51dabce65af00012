"""Counter-based random numbers and permutations never change, are uniform, and are independent of each other."""

import math

import numpy as np
import pytest

from pipeline.data.randomness import CounterRandom, hash64, hash64_array, permutation, permuted, signed, uniform_array


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
    assert signed(2**64 - 5) == -5
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


def test_short_permutations_are_uniform():
    for n, bound in ((2, 0.05), (3, 0.05), (4, 0.08)):
        num = 4000 * math.factorial(n)
        orders = permuted(np.repeat(keys(num), n), np.full(n * num, n), np.tile(np.arange(n), num)).reshape(num, n)
        _, times = np.unique(orders, axis=0, return_counts=True)
        assert len(times) == math.factorial(n)
        assert abs(times / 4000 - 1).max() < bound


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 29), (7, 22), (15, 16)])
def test_pairs_of_positions_are_uniform(first: int, second: int):
    n, num = 30, 870 * 200
    one, other = (permuted(keys(num), np.full(num, n), np.full(num, place)) for place in (first, second))
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
