"""Samples that cannot be used: recorded, counted per source, and fatal above a rate (contract C7). A bad sample is one
that reading again cannot repair; storage faults and changed shards are not, and never cause a replacement. One that
hangs its decoder cannot be recorded: each thread writes the sample that it decodes into memory that a loader process
shares with its rank, for the report of a hung rank.
"""

from __future__ import annotations

import itertools
import mmap
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.config.errors import DataError, MomeError

_MAX_REASON = 300  # characters of a parser's own words
MIN_SEEN = 100  # minimum number of samples for a meaningful rate
_ENTRY, _THREADS = 256, 64  # bytes of a name; threads of a process
BOARD_BYTES = _ENTRY * _THREADS

# Names of samples being decoded: the first board is written by this process, the others by processes that it watches.
boards: list[mmap.mmap] = [mmap.mmap(-1, BOARD_BYTES)]
_numbers = itertools.count()
_thread = threading.local()


class BadSample(Exception):
    """One sample cannot be used; `stage` names the step that failed (members, caption, image, …), `reason` says why."""

    def __init__(self, stage: str, reason: str):
        # Logs, reports and MLflow reject lone surrogates; memory addresses would differ between readers.
        self.stage = stage
        self.reason = re.sub(r" at 0x[0-9a-f]+", "", reason.encode("utf-8", "backslashreplace").decode())
        super().__init__(f"{stage}: {self.reason}")

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.stage, self.reason)


@contextmanager
def judging(stage: str) -> Iterator[None]:
    """Turn exceptions into BadSample(stage, type: text), except the package's own (DataError, …) and MemoryError."""
    try:
        yield
    except (BadSample, MomeError, MemoryError):
        raise
    except Exception as error:
        raise BadSample(stage, f"{type(error).__name__}: {error}"[:_MAX_REASON]) from error


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


def samples_in_progress() -> list[str]:
    """Return the samples being decoded by this process and by those it watches."""
    entries = [board[at : at + _ENTRY] for board in list(boards) for at in range(0, BOARD_BYTES, _ENTRY)]
    return [entry.partition(b"\0")[0].decode("utf-8", "replace") for entry in entries if entry[0]]


@dataclass(frozen=True)
class BadRecord:
    """The log record of a bad sample, with the key of its replacement."""

    source: str
    shard: str
    key: str
    offset: int  # of the sample's first byte in the shard
    epoch: int
    step: int  # within the training stage
    place: int  # in the global batch
    stage: str
    reason: str
    replaced_by: str


@dataclass
class Quarantine:
    """Delivered samples per source (`seen`, `bad`) and records not yet logged (`new`). A bad sample is counted once per
    epoch, at the place that planned it: sums over ranks equal those at any world size.
    """

    max_bad_rate: float
    seen: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    new: list[BadRecord] = field(default_factory=list)

    def deliver(self, sources: Iterable[str], records: Sequence[BadRecord], is_last: bool = False) -> None:
        """Count a batch; raise DataError for a rate above the limit, with the last batch also from two bad ones on."""
        self.seen.update(sources)
        self.new += records
        self.bad.update(record.source for record in records)
        for source, bad in self.bad.items():
            samples = self.seen[source]
            if (samples >= MIN_SEEN or (is_last and bad > 1)) and bad > self.max_bad_rate * samples:
                last = next((r for r in reversed(self.new) if r.source == source), None)
                example = f" The last one: {last.key} in {last.shard}, {last.stage}: {last.reason}." if last else ""
                raise DataError(
                    f"source '{source}': {bad} of {samples} samples are bad ({bad / samples:.1%}), more than "
                    f"data.max_bad_rate {self.max_bad_rate:.1%} allows.{example} Repair or rebuild its shards, or "
                    "raise data.max_bad_rate."
                )
