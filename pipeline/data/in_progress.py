"""The samples being decoded right now, for the report of a hung rank: a thread stuck in a decoder cannot report.

Each thread writes the name of its sample into memory that a loader process shares with its rank.
"""

import itertools
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENTRY, _THREADS = 256, 64
BYTES = _ENTRY * _THREADS

# Memory of `BYTES` bytes each: the first is written by this process, the others by processes that it watches.
boards: list[mmap.mmap] = [mmap.mmap(-1, BYTES)]
_numbers = itertools.count()
_thread = threading.local()


@contextmanager
def decoding(sample: str) -> Iterator[None]:
    """Record that this thread decodes a sample, while in `with`."""
    if not hasattr(_thread, "start"):
        _thread.start = next(_numbers) % _THREADS * _ENTRY
    start, data = _thread.start, sample.encode("utf-8", "backslashreplace")[: _ENTRY - 1]
    boards[0][start : start + len(data) + 1] = data + b"\0"
    try:
        yield
    finally:
        boards[0][start] = 0


def samples() -> list[str]:
    """Return the samples being decoded by this process and by those it watches."""
    data = [board[start : start + _ENTRY] for board in list(boards) for start in range(0, BYTES, _ENTRY)]
    entries = [entry.partition(b"\0")[0] for entry in data]
    return [entry.decode("utf-8", "replace") for entry in entries if entry]
