"""Bad samples: recorded, counted per source, and fatal above a rate (contract C7).

A bad sample is one that reading again cannot mend: a corrupt image, a missing member, an empty caption, a
decompression bomb. Storage faults and changed shards are none: they never substitute a sample.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from pipeline.config.errors import DataError, MomeError

_MAX_REASON = 300  # characters of a parser's own words
MIN_SEEN = 100  # a rate over fewer samples says nothing


class BadSample(Exception):
    """One sample cannot be used; `stage` names what found it (members, caption, decode, …), `reason` says why."""

    def __init__(self, stage: str, reason: str):
        # Logs, reports and MLflow refuse lone surrogates; an address in memory is another for every reader.
        reason = re.sub(r" at 0x[0-9a-f]+", "", reason.encode("utf-8", "backslashreplace").decode())
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.stage, self.reason)


@contextmanager
def judging(stage: str) -> Iterator[None]:
    """Raise BadSample(stage, type: text) for any exception of judging one sample: parsers fail in every shape.

    BadSample passes as it is, and so does what is no fault of the sample: the package's own errors (StorageError,
    DataError, …) and MemoryError.
    """
    try:
        yield
    except Exception as error:
        raise judged(stage, error) from error.__cause__ if isinstance(error, BadSample) else error


def judged(stage: str, error: Exception) -> BadSample:
    """The BadSample that `judging` raises for an error. Raises the error where it is no fault of the sample."""
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (MomeError, MemoryError)):
        raise error
    return BadSample(stage, f"{type(error).__name__}: {error}"[:_MAX_REASON])


@dataclass(frozen=True)
class BadRecord:
    """One bad sample as the log shows it, and the key of the sample that took its place."""

    source: str
    shard: str
    key: str
    offset: int  # of the sample's first byte in the shard
    epoch: int
    step: int  # within the training stage
    place: int  # in the global batch
    stage: str
    reason: str
    replaced_by: str = ""

    def replaced_with(self, key: str) -> BadRecord:
        return replace(self, replaced_by=key)

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)


class Quarantine:
    """Counts of what was delivered: `seen` and `bad` samples per source.

    A bad sample counts in the place that planned it, once an epoch; a candidate that proves bad while another is
    being replaced is not counted again. So the counts of all ranks sum to the same at any world size.
    """

    def __init__(self, max_bad_rate: float):
        self.max_bad_rate = max_bad_rate
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self._new: list[BadRecord] = []

    def deliver(self, sources: Iterable[str], records: Iterable[BadRecord]) -> None:
        """Counts one batch's rows by source and its bad samples. Raises DataError when a source's rate is too high."""
        self.seen.update(sources)
        for record in records:
            self.bad[record.source] += 1
            self._new.append(record)
        for source in self.bad:
            self._check(source, MIN_SEEN)

    def finish(self) -> None:
        """The same check at the end of a stage, however few samples it read; one bad sample is then no rate yet."""
        for source in self.bad:
            if self.bad[source] > 1:
                self._check(source, 1)

    def drain(self) -> list[BadRecord]:
        """The records since the last call."""
        new, self._new = self._new, []
        return new

    def _check(self, source: str, min_seen: int) -> None:
        seen, bad = self.seen[source], self.bad[source]
        if seen < min_seen or bad <= self.max_bad_rate * seen:
            return
        last = next((r for r in reversed(self._new) if r.source == source), None)
        example = f" The last: {last.key} in {last.shard}, {last.stage}: {last.reason}." if last else ""
        raise DataError(
            f"source '{source}': {bad} of {seen} samples are bad ({bad / seen:.1%}), more than data.max_bad_rate "
            f"{self.max_bad_rate:.1%} allows.{example} Mend or rebuild its shards, or raise data.max_bad_rate."
        )
