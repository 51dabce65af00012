from __future__ import annotations

import numpy as np

from pipeline.data.randomness import (
    CounterRandom,
    hash64,
    hash64_array,
    permutation,
    sample_random,
    signed,
    uniform_array,
)


def test_array_hash_equals_scalar_hash():
    values = np.array([0, 1, 2**63, 2**64 - 1, 12345], dtype=np.uint64)
    assert hash64_array(99, values).tolist() == [hash64(99, int(value)) for value in values]


def test_hash_never_changes():
    # The order of every run's data rests on these: they may never differ.
    assert hash64() == 0x9E3779B97F4A7C15
    assert hash64(0) == 0x6E789E6AA1B965F4
    assert hash64(1, -2, "words") == 0xA8F7864B36A596C2
    assert hash64("crop", 7) == 0xADA709E8A50A17AF


def test_counter_is_splitmix64():
    first, second = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4  # of Vigna's splitmix64.c with seed 0
    random = CounterRandom(0)
    assert random.uniform() == (first >> 11) * 2.0**-53
    assert random.integer(2**64) == second


def test_order_and_type_of_parts_matter():
    assert len({hash64(1, 2), hash64(2, 1), hash64("1", 2), hash64(1, "2"), hash64(12), hash64("12")}) == 6


def test_negative_uid_is_its_64_bits():
    assert hash64(-5) == hash64(2**64 - 5)
    assert signed(2**64 - 5) == -5


def test_same_sample_draws_same_numbers_and_purposes_differ():
    crop, again, words = (sample_random(1, 2, 3, purpose) for purpose in ("crop", "crop", "words"))
    drawn = [crop.uniform() for _ in range(5)]
    assert drawn == [again.uniform() for _ in range(5)]
    assert drawn != [words.uniform() for _ in range(5)]


def test_numbers_are_uniform():
    random = CounterRandom(5)
    uniforms = np.array([random.uniform() for _ in range(20000)])
    integers = np.bincount([random.integer(7) for _ in range(21000)], minlength=7)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.01
    assert abs(uniforms.var() - 1 / 12) < 0.005
    assert abs(integers - 3000).max() < 250
    many = uniform_array(3, np.arange(100000))
    assert abs(many.mean() - 0.5) < 0.005
    assert many.min() >= 0
    assert many.max() < 1


def test_permutation_holds_each_number_once():
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(4, n).tolist()) == list(range(n))
    random = CounterRandom(1)
    assert random.permutation(100).tolist() != random.permutation(100).tolist()
