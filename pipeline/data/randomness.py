"""Counter-based randomness: every random number is a hash of its purpose, independent of process and call order.

The mixing is splitmix64 (Steele, Lea and Flood, OOPSLA 2014). Its results are part of the data order (contract C1):
changing a constant here changes the data of every run.
"""

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Words = TypeVar("Words", int, np.ndarray)  # 64 bits each: a Python integer, or an array of uint64

_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIT = 2.0**-53
_ROUNDS = 8  # of the Feistel network: for n = 100, pairs are 30 % uneven after four rounds, below 0.5 % after eight


def _mix(words: Words) -> Words:
    words = ((words ^ (words >> 30)) * _FIRST) & _MASK
    words = ((words ^ (words >> 27)) * _SECOND) & _MASK
    return words ^ (words >> 31)


def hash64(*parts: int | str, signed: bool = False) -> int:
    """Return a 64-bit hash of the parts in order, unsigned or, for int64 tensors, signed. Integers are taken modulo
    2^64: uids may be negative.
    """
    state = _STEP
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = _mix(((state ^ (int(part) & _MASK)) + _STEP) & _MASK)
    return state - (1 << 64) if signed and state >> 63 else state


def hash64_array(key: int, values: np.ndarray) -> np.ndarray:
    """Return `hash64(key, value)` of every value: uint64, the shape of `values`. Distinct values never collide."""
    with np.errstate(over="ignore"):  # numpy warns of overflow for scalars, not for arrays
        return _mix((np.asarray(values).astype(np.uint64, copy=False) ^ np.uint64(hash64(key))) + np.uint64(_STEP))


def uniform_array(key: int, values: np.ndarray) -> np.ndarray:
    """Return one float64 in [0, 1) for every value."""
    return (hash64_array(key, values) >> np.uint64(11)).astype(np.float64) * _UNIT


@dataclass
class CounterRandom:
    """A stream of random numbers: the n-th is a hash of n and of the key, `hash64(seed, epoch, uid, purpose)`."""

    key: int
    counter: int = 0

    def integer(self, n: int = 1 << 64) -> int:
        """Return an integer in [0, n)."""
        assert n > 0
        self.counter += 1
        return (_mix((self.key + self.counter * _STEP) & _MASK) * n) >> 64  # the bias is below n / 2^64

    def uniform(self) -> float:
        """Return a float in [0, 1)."""
        return (self.integer() >> 11) * _UNIT


def permutation(key: int, n: int) -> np.ndarray:
    """Return the numbers 0 … n-1 (int64) in the order of their hashes under `key`; no two hashes are equal."""
    return np.argsort(hash64_array(key, np.arange(n, dtype=np.uint64)))


def permuted(key: np.ndarray, n: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return, elementwise, the element at `place` of a random permutation of 0 … n-1 without building it: key (L,)
    uint64, n (L,) and place (L,) int64 with 0 <= place < n < 2^62; returns (L,) int64 in [0, n). For one key and n it
    is a bijection: a Feistel network of eight rounds on a grid of a x b >= n cells, a and b about √n, applied again to
    the fewer than a cells outside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002).
    """
    rows = np.ceil(np.sqrt(n)).astype(np.uint64)  # IEEE square roots are the same on every machine
    bound = n.astype(np.uint64)
    columns = (bound + rows - np.uint64(1)) // rows
    cell, outside = place.astype(np.uint64), np.arange(len(n))
    high = np.uint64(32)  # 32 bits of hash: their sum with a row cannot overflow, which would break the bijection
    while outside.size:
        keys, height, width = key[outside], rows[outside], columns[outside]
        row, column = np.divmod(cell[outside], width)
        for turn in range(0, _ROUNDS, 2):
            row = (row + (_mix(keys + (column ^ np.uint64(turn << 32))) >> high)) % height
            column = (column + (_mix(keys + (row ^ np.uint64(turn + 1 << 32))) >> high)) % width
        cell[outside] = row * width + column
        outside = outside[cell[outside] >= bound[outside]]
    return cell.astype(np.int64)
