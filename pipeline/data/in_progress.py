"""The samples being decoded right now, for the report of a hung rank: a thread stuck in a decoder cannot report.

Each thread writes the name of its sample into memory that a loader process shares with its rank.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENTRY, _THREADS = 256, 64
BYTES = _ENTRY * _THREADS

_memory = mmap.mmap(-1, BYTES)  # written by this process
_boards: list[mmap.mmap] = [_memory]  # read by `samples`
_numbers = itertools.count()
_thread = threading.local()


def write_to(memory: mmap.mmap) -> None:
    """Make this process write to `memory`, of `BYTES` bytes."""
    global _memory
    _memory = memory


def watch(memory: mmap.mmap) -> None:
    """Include in `samples` what another process writes to `memory`."""
    _boards.append(memory)


def forget(memory: mmap.mmap) -> None:
    _boards[:] = [board for board in _boards if board is not memory]


@contextmanager
def decoding(sample: str) -> Iterator[None]:
    """Record that this thread decodes a sample, while in `with`."""
    if not hasattr(_thread, "start"):
        _thread.start = next(_numbers) % _THREADS * _ENTRY
    start, data = _thread.start, sample.encode("utf-8", "backslashreplace")[: _ENTRY - 1]
    _memory[start : start + len(data) + 1] = data + b"\0"
    try:
        yield
    finally:
        _memory[start] = 0


def samples() -> list[str]:
    """Return the samples being decoded by this process and by those it watches."""
    names: list[str] = []
    for board in list(_boards):
        data = board[:]
        entries = (data[start : start + _ENTRY].partition(b"\0")[0] for start in range(0, BYTES, _ENTRY))
        names += [entry.decode("utf-8", "replace") for entry in entries if entry]
    return names
