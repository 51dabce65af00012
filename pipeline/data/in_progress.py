"""Which samples are being decoded now, for the report of a rank that hangs: a thread stuck in a decoder says nothing.

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

_memory = mmap.mmap(-1, BYTES)  # that this process writes to
_boards: list[mmap.mmap] = [_memory]  # that it reads
_numbers = itertools.count()
_thread = threading.local()


def write_to(memory: mmap.mmap) -> None:
    """From now on this process writes to `memory`, of `BYTES`."""
    global _memory
    _memory = memory


def watch(memory: mmap.mmap) -> None:
    """Have `samples` read what another process writes to `memory`."""
    _boards.append(memory)


def forget(memory: mmap.mmap) -> None:
    _boards[:] = [board for board in _boards if board is not memory]


@contextmanager
def decoding(sample: str) -> Iterator[None]:
    """While in `with`, this thread decodes that sample."""
    if not hasattr(_thread, "start"):
        _thread.start = next(_numbers) % _THREADS * _ENTRY
    start, data = _thread.start, sample.encode("utf-8", "backslashreplace")[: _ENTRY - 1]
    _memory[start : start + len(data) + 1] = data + b"\0"
    try:
        yield
    finally:
        _memory[start] = 0


def samples() -> list[str]:
    """The samples being decoded by this process and by those it watches."""
    found = []
    for board in list(_boards):
        data = board[:]
        entries = (data[start : start + _ENTRY].partition(b"\0")[0] for start in range(0, BYTES, _ENTRY))
        found += [entry.decode("utf-8", "replace") for entry in entries if entry]
    return found
