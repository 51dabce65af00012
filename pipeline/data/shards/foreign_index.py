"""Sample counts that other tools left beside a tar, so that it need not be read to be counted.

- Megatron-Energon's `<shard>.tar.idx`: little-endian uint64 offsets of each sample's first header, then of the end
- DALI's `<shard>.idx` (wds2idx, v1.0 to v1.2): 'v1.2 N', then one line of '<extension> <offset> <size> …' a sample
- img2dataset's `<shard>_stats.json`: `successes` is the number of samples it wrote

A count is checked against the tar's size where there are offsets, and against the tar itself when that is first read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

import numpy as np

from pipeline.config.errors import DataError
from pipeline.data.shards.tar import BLOCK
from pipeline.data.storage import Storage, join

_WORDS = {"v1.0": 3, "v1.1": 3, "v1.2": 4}  # of one member in DALI's lines


def trusted_count(storage: Storage, folder: str, tar: str, size: int, names: Collection[str]) -> int | None:
    """The samples of a tar of `size` bytes by the first such file among the folder's `names`; None without one.

    Raises DataError, with the file's name, when it does not fit the tar.
    """
    stem = tar.removesuffix(".tar")
    readers: dict[str, Callable[[bytes, int], int]] = {
        f"{tar}.idx": energon_count,
        f"{stem}.idx": dali_count,
        f"{stem}_stats.json": img2dataset_count,
    }
    for name, read in readers.items():
        if name not in names:
            continue
        location = join(folder, name)
        try:
            return read(storage.read(location), size)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(
                f"{location}: it does not fit {tar} ({error}). Delete it or make it again, or run mome shards index "
                "without --trust-counts"
            ) from error
    return None


def energon_count(data: bytes, size: int) -> int:
    """Raises ValueError when the offsets are not those of a tar of `size` bytes."""
    if len(data) < 8 or len(data) % 8:
        raise ValueError(f"{len(data)} bytes are no list of 8-byte offsets")
    offsets = np.frombuffer(data, dtype="<u8").astype(np.int64)
    if (offsets < 0).any() or (offsets % BLOCK).any() or (np.diff(offsets) <= 0).any():
        raise ValueError("its offsets are no growing multiples of 512")
    if offsets[-1] + 2 * BLOCK > size:
        raise ValueError(f"its samples end at byte {offsets[-1]}, the tar with its end blocks at {size}")
    return len(offsets) - 1


def dali_count(data: bytes, size: int) -> int:
    """Raises ValueError when the lines are not those of a tar of `size` bytes."""
    first, *lines = data.decode("utf-8").splitlines()
    version, stated = first.split()
    if version not in _WORDS:
        raise ValueError(f"version {version}; expected {', '.join(_WORDS)}")
    if len(lines) != int(stated):
        raise ValueError(f"it states {stated} samples and lists {len(lines)}")
    for number, line in enumerate(lines, 2):
        _check_line(line.split(), _WORDS[version], number, size)
    return len(lines)


def _check_line(words: list[str], per_member: int, number: int, size: int) -> None:
    if not words or len(words) % per_member:
        raise ValueError(f"line {number} is no list of members")
    for offset, length in zip(words[1::per_member], words[2::per_member], strict=True):
        if int(offset) % BLOCK or int(length) < 0 or int(offset) + int(length) + 2 * BLOCK > size:
            raise ValueError(f"line {number}: no member of {length} bytes can lie at byte {offset} of {size}")


def img2dataset_count(data: bytes, size: int) -> int:
    """Raises ValueError when the statistics cannot be those of a tar of `size` bytes."""
    successes = json.loads(data)["successes"]
    if type(successes) is not int or successes < 0 or (2 * successes + 2) * BLOCK > size:
        raise ValueError(f"{successes!r} samples in a tar of {size} bytes")
    return successes
