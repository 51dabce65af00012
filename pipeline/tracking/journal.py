"""The journal of a run: what happened, in append-only JSON Lines files, kept through crashes and lost nodes.

Every process that records something about a run (training, a restart of it, an evaluation) appends to a file
of its own, a *session*; the sessions in order are the run's journal. One writer a file means that a crash can
only tear a session's last line, that nobody has to repair a file another process may be writing, and that two
nodes never append to two copies of one file.

A record is one line: {"kind": …, "at": milliseconds, "stage": index or null, …}. Kinds: campaign (first record
of every session), stage, metrics, tag, artifact, model and model_gone (weights that are kept, and are no longer),
stage_end, campaign_end. Numbers keep every bit; those that JSON does not know are strings ("nan", "inf", "-inf").
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("mome.tracking")

Record = dict[str, Any]
CHECKPOINT, HAND_OVER = "checkpoint", "hand_over"  # roles of weights in model records; hand-overs are never removed
RESTORED = "restored"  # a file of a journal that came from another node
EVALUATION = "eval/"  # begins the keys of what was measured on held-out data
_SESSION = r"(?P<session>\d{6}-[0-9a-f]+)"
_SEGMENT = re.compile(_SESSION + r"\.(?P<start>\d{12})-(?P<end>\d{12})\.jsonl")
_WHOLE = re.compile(_SESSION + r"\.jsonl")  # as a journal lies in a local run's folder, which somebody copied


class Sized(Protocol):
    @property
    def size(self) -> int: ...


class Store(Protocol):
    """What the journal needs of an object store (`pipeline.data.storage.Storage` has it)."""

    def read(self, url: str) -> bytes: ...
    def write(self, url: str, data: bytes) -> None: ...
    def list_info(self, url: str) -> Mapping[str, Sized]: ...
    def exists(self, url: str) -> bool: ...


def encode_number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def encode(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_records(path: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
    """The records from byte `start` on, each with the offset behind it; an unfinished last line is left alone."""
    offset = start
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                logger.warning("%s: the record that ends at byte %d is damaged and is left out", path, offset)
                record = {"kind": "damaged", "stage": None}
            yield offset, record


def redact(text: str) -> str:
    """Any `user:password@` in URLs is removed: what is recorded is read by many."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def complete_length(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    data = path.read_bytes()
    return data.rfind(b"\n") + 1


class JournalWriter:
    """Appends to one session. A record is handed to the operating system at once, so that killing this process
    loses none; `sync` makes them survive the machine, and is called in batches, away from the training thread."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # tells others that this session is alive (see `is_live`)
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


def is_live(path: Path) -> bool:
    """True while some process writes this session."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class Journal:
    """A folder of sessions, with the artifacts they name under `files/`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sessions(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.jsonl"))

    def path(self, session: str) -> Path:
        return self.folder / f"{session}.jsonl"

    def file(self, name: str) -> Path:
        """Where the artifact that a record calls `name` lies."""
        return self.folder / "files" / name

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
        return JournalWriter(self.path(f"{max(numbers, default=0) + 1:06d}-{secrets.token_hex(4)}"))

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
    replay, and since a resumed run is the uninterrupted run (C4) the first point stands. Points of the campaign
    (evaluations of any checkpoint, in any order) are replays only when step and value are the same.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[int, str], int] = {}
        self._campaign: set[tuple[str, int, float | str]] = set()

    def observe(self, record: Record) -> None:
        if record["kind"] == "metrics":
            self.fresh(record["stage"], record["step"], record["values"])

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


@dataclass(frozen=True)
class Segment:
    """The bytes [start, end) of a session, committed as one object of that name."""

    name: str
    start: int
    end: int


def committed_segments(store: Store, url: str) -> dict[str, list[Segment]]:
    """Per session what was committed to `url`, from its first byte on without a gap.

    A session may also lie there as one file: a run's folder was copied to the store.
    """
    found: dict[str, list[Segment]] = {}
    for name, info in sorted(store.list_info(url).items()):
        if match := _SEGMENT.fullmatch(name):
            segment = Segment(name, int(match["start"]), int(match["end"]))
        elif match := _WHOLE.fullmatch(name):
            segment = Segment(name, 0, info.size)
        else:
            continue
        segments = found.setdefault(match["session"], [])
        if segment.start == (segments[-1].end if segments else 0):
            segments.append(segment)
        else:
            logger.warning("%s/%s does not follow the segment before it and was left out", url, name)
    return {session: segments for session, segments in found.items() if segments}


class CommittedJournal:
    """The copy of a journal in the run's storage: what a restart on another node continues from."""

    def __init__(self, store: Store, url: str):
        self._store = store
        self._url = url
        self._ends: dict[str, int] = {}
        self._files: set[str] = set()

    def restore(self, journal: Journal) -> bool:
        """Bring `journal` up to the committed copy; True if something of it was not here.

        In that case another node went on with this run. Whatever this node never committed is then void: that
        node resumed before it, and recorded those steps itself.
        """
        segments = committed_segments(self._store, self._url)
        self._ends = {session: committed[-1].end for session, committed in segments.items()}
        missing = [s for s, end in self._ends.items() if not journal.path(s).exists() or _size(journal.path(s)) < end]
        if not missing:
            return False
        journal.restored()
        for session in journal.sessions():
            self._cut(journal.path(session), self._ends.get(session, 0))
        for session in missing:
            self._download(journal, session, segments[session])
        return True

    def commit(self, journal: Journal) -> None:
        """Upload every whole record that was not committed yet, and the artifacts they name before them."""
        for session in journal.sessions():
            start, end = self._ends.get(session, 0), complete_length(journal.path(session))
            if end <= start:
                continue
            for name in _artifact_names(journal, session, start):
                if name not in self._files:
                    self._store.write(f"{self._url}/files/{name}", journal.file(name).read_bytes())
                    self._files.add(name)
            data = _read_range(journal.path(session), start, end)
            self._store.write(f"{self._url}/{session}.{start:012d}-{end:012d}.jsonl", data)
            self._ends[session] = end

    def _cut(self, path: Path, end: int) -> None:
        if is_live(path) or _size(path) <= end:
            return
        if end:
            os.truncate(path, end)
        else:
            path.unlink()

    def _download(self, journal: Journal, session: str, segments: list[Segment]) -> None:
        data = b"".join(self._store.read(f"{self._url}/{segment.name}") for segment in segments)
        journal.folder.mkdir(parents=True, exist_ok=True)
        write_whole(journal.path(session), data)
        for name in _artifact_names(journal, session):
            if not journal.file(name).exists():
                write_whole(journal.file(name), self._store.read(f"{self._url}/files/{name}"))
            self._files.add(name)


def _artifact_names(journal: Journal, session: str, start: int = 0) -> list[str]:
    return [r["file"] for _, r in journal.records(session, start) if r["kind"] == "artifact"]


def _size(path: Path) -> int:
    return path.stat().st_size


def _read_range(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_bytes(data)
    os.replace(partial, path)
