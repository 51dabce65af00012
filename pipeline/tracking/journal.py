"""The journal of a run: what happened, in append-only JSON Lines files, kept through crashes and lost nodes.

Every process that records something about a run (training, a restart of it, an evaluation) appends to a file
of its own, a *session*; the sessions in order are the run's journal. One writer a file means that a crash can
only tear a session's last line, that nobody has to repair a file another process may be writing, and that two
nodes never append to two copies of one file.

What a record may hold: `pipeline.tracking.records`. How a journal is kept in a remote run's storage:
`pipeline.tracking.committed`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.durable import sync_folder
from pipeline.tracking.liveness import Lease
from pipeline.tracking.records import Record, decode, encode, is_file_name

logger = logging.getLogger("mome.tracking")

CHECKPOINT, HAND_OVER = "checkpoint", "hand_over"  # roles of weights in model records; hand-overs are never removed
RESTORED = "restored"  # a file of a journal that came from another node
EVALUATION = "eval/"  # begins the keys of what was measured on held-out data
SESSION_NAME = r"(?P<session>[0-9]{6}-[0-9a-f]{1,32})"
_BLOCK = 2**16


def read_records(path: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
    """The records from byte `start` on, each with the offset behind it; an unfinished last line is left alone."""
    with path.open("rb") as file:
        file.seek(start)
        yield from parse_records(file, str(path), start)


def parse_records(lines: Iterable[bytes], origin: str, offset: int = 0) -> Iterator[tuple[int, Record]]:
    """Yield the records of a session's lines, each with the offset behind it; a line that is none is reported."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record = decode(line)
        except ValueError as error:
            logger.warning("%s: the record that ends at byte %d is damaged and is left out (%s)", origin, offset, error)
            record = {"kind": "damaged", "stage": None}
        yield offset, record


def complete_length(path: Path) -> int:
    """Return the number of bytes up to the end of the last whole line, reading backwards from the end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - _BLOCK, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


class JournalWriter:
    """Appends to one session. A record is handed to the operating system at once, so that killing this process
    loses none; `sync` makes them survive the machine, and is called in batches, away from the training thread."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._lease = Lease(path)  # tells others that this session is alive (see `liveness`)
        sync_folder(path.parent)
        self._lock = threading.Lock()
        self._pending = b""
        self._failing = False

    def append(self, record: Record) -> None:
        """Append one record. A full disk does not raise: what did not fit is kept in memory and written later."""
        with self._lock:
            self._pending += encode(record)
            try:
                while self._pending:
                    self._pending = self._pending[os.write(self._fd, self._pending) :]
                self._failing = False
            except OSError as error:
                if not self._failing:
                    logger.warning(
                        "the tracking journal in %s cannot be written (%s); records are kept in memory until it can",
                        self._path.parent, error,
                    )  # fmt: skip
                self._failing = True

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._lease.release()


class Journal:
    """A folder of sessions, with the artifacts they name under `files/`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sessions(self) -> list[str]:
        names = (path.stem for path in self.folder.glob("*.jsonl") if path.is_file())
        return sorted(name for name in names if re.fullmatch(SESSION_NAME, name))

    def path(self, session: str) -> Path:
        return self.folder / f"{session}.jsonl"

    def file(self, name: str) -> Path | None:
        """Return the path of the artifact that a record calls `name`; None, reported, for one outside this folder."""
        if is_file_name(name) and self._is_inside(self.folder / "files" / name):
            return self.folder / "files" / name
        logger.warning("%s: the file %r lies outside this journal or is none; it is left out", self.folder, name[:200])
        return None

    def _is_inside(self, path: Path) -> bool:
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve() / "files")
            return inside and (path.is_file() or not path.exists())  # a pipe would be waited for
        except (OSError, RuntimeError):  # links that lead to themselves
            return False

    def records(self, session: str, start: int = 0) -> Iterator[tuple[int, Record]]:
        return read_records(self.path(session), start)

    def all_records(self) -> Iterator[Record]:
        """Every record of every session, in order."""
        for session in self.sessions():
            for _, record in self.records(session):
                yield record

    def campaigns(self) -> list[Record]:
        """The campaign record of every session, in order: which run this is, and where it is shown."""
        firsts = (next(self.records(session), None) for session in self.sessions())
        return [first[1] for first in firsts if first is not None and first[1]["kind"] == "campaign"]

    @property
    def was_restored(self) -> bool:
        """Whether some of it came from another node, if only for a report, and no run has gone on from that here."""
        return (self.folder / RESTORED).exists()

    def restored(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / RESTORED).touch()

    def goes_on(self) -> None:
        (self.folder / RESTORED).unlink(missing_ok=True)

    def start_session(self) -> JournalWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(session.split("-")[0]) for session in self.sessions()]
        number = min(max(numbers, default=0) + 1, 999_999)
        return JournalWriter(self.path(f"{number:06d}-{secrets.token_hex(4)}"))

    def discard(self) -> None:
        """Set the whole journal aside: it belongs to another run that had this name."""
        aside = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}.old")
        self.folder.rename(aside)
        logger.warning(
            "the journal in %s belongs to an earlier run of this name and was moved to %s", self.folder, aside
        )


class HighWater:
    """Which points the journal holds already, so that replayed steps are not recorded twice.

    A stage's points come in the order of their steps: whatever is at or below the highest step of its key is a
    replay, and since a resumed run is the uninterrupted run (C4) the first point stands; after a rewind, what follows
    is another run's. Points of the campaign (evaluations of any checkpoint, in any order) are replays only when step
    and value are the same.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[int, str], int] = {}
        self._campaign: set[tuple[str, int, float | str]] = set()

    def observe(self, record: Record) -> None:
        if record["kind"] == "metrics":
            self.fresh(record["stage"], record["step"], record["values"])
        elif record["kind"] == "rewind":
            self.rewind(record["stage"], record["step"])

    def rewind(self, stage: int, step: int) -> None:
        """Forget the points of a stage beyond `step`: they will be recorded anew, with other values."""
        self._steps = {key: min(last, step) if key[0] == stage else last for key, last in self._steps.items()}

    def fresh(self, stage: int | None, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """The values not yet recorded, which now count as recorded."""
        if stage is None:
            points = {(key, step, value) for key, value in values.items()} - self._campaign
            self._campaign |= points
            return {key: value for key, value in values.items() if (key, step, value) in points}
        fresh = {key: value for key, value in values.items() if step > self._steps.get((stage, key), -1)}
        self._steps.update(dict.fromkeys(((stage, key) for key in fresh), step))
        return fresh

    def of_stage(self, stage: int) -> int:
        """The highest step recorded of a stage; -1 when there is none."""
        return max((step for (index, _), step in self._steps.items() if index == stage), default=-1)
