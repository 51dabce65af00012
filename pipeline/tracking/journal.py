"""A run's journal: append-only JSON Lines files that survive crashes, and their copy in a remote run's storage.

Every process that records something about a run (training, a restart, an evaluation) appends to its own file, a
*session*; the sessions in order form the journal. With one writer per file, a crash can tear only the last line of a
session, no process repairs a file that another may be writing, and two nodes never append to copies of one file.

A record is {"kind": …, "at": milliseconds, "stage": index or null, …}. Kinds: run (first record of every session),
stage, metrics, rewind (voids a stage's later points), tag, artifact, model and model_gone (weights retained, and
deleted), stage_end, run_end. Numbers keep every bit; those that JSON lacks are strings ("nan", "inf", "-inf"). Records
are validated when read, because a journal may have been written by anybody.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Union

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from pipeline.config.background import PeriodicThread
from pipeline.config.durable import sync_folder, write_durably
from pipeline.config.urls import is_local

if TYPE_CHECKING:
    from pipeline.data.storage import Storage

logger = logging.getLogger("mome.tracking")

Record = dict[str, Any]
Segment = tuple[int, int, str]  # the bytes [start, end) of a session, and the name of the object that holds them

CHECKPOINT, FINAL_WEIGHTS = "checkpoint", "final_weights"  # roles in model records; final weights are never deleted
EVALUATION = "eval/"  # prefix of the metrics of held-out data
BEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0  # between heartbeats of a lease; since the last one of a dead process
_leased: set[Path] = set()  # files that this process uses
RESTORED = "restored"  # file of a journal in part downloaded, and continued by no run of this machine yet
UPLOAD_LOCK = "uploader.lock"  # file of a journal that is held while a process uploads it
RUN_ID = "[0-9A-Za-z_.-]{1,64}"
SESSION_NAME = r"(?P<session>[0-9]{6}-[0-9a-f]{1,32})"
# The second form: a local run's journal that was copied to the store as it is.
_SEGMENT = re.compile(SESSION_NAME + r"(?:\.(?P<start>[0-9]{12})-(?P<end>[0-9]{12}))?\.jsonl")
# Records of a stage, which evaluations do not have. It cannot match inside a string, where quotes are escaped.
_TRAINING = re.compile(rb'"stage":[0-9]')
# Files of artifacts, and their names in MLflow's artifact folder: relative paths without empty, '.' and '..' parts,
# because a journal's author must not be able to read or write files elsewhere on this machine.
ARTIFACT_FILE = re.compile(r"\A[0-9a-f]{16}/(?!\.{1,2}\Z)[^/\0]{1,255}\Z")
ARTIFACT_NAME = re.compile(r"\A(?!(?:.*/)?\.{0,2}(?:/|\Z))[^\0\\]{1,1000}\Z", re.DOTALL)

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Step = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Stage = Annotated[int, Field(ge=0, lt=10_000)]
_Number = float | Literal["nan", "inf", "-inf"]
Status = Literal["FINISHED", "FAILED", "KILLED"]
_Texts = dict[str, str]


class Dataset(TypedDict):
    """A dataset that a stage reads."""

    name: str  # of the source
    source: str  # URL of its shards
    digest: str  # of its manifest
    context: str


class _Point(TypedDict):
    stage: _Stage | None
    key: str
    value: _Number
    at: _Count


# Kinds of records and their fields, besides "kind" and "at".
_KINDS: dict[str, dict[str, Any]] = {
    "run": {
        "stage": _Stage | None, "params": _Texts, "tags": _Texts, "datasets": list[Dataset],
        "run": Annotated[str, Field(pattern=f"^{RUN_ID}$")],  # becomes part of an MLflow search filter
        "name": NotRequired[str], "uri": NotRequired[str], "experiment": NotRequired[str],
        "server_has_more": NotRequired[bool],
    },
    "stage": {"stage": _Stage, "name": str, "params": _Texts, "tags": _Texts, "datasets": list[Dataset]},
    "metrics": {"stage": _Stage | None, "step": _Step, "values": dict[str, _Number]},
    "rewind": {"stage": _Stage, "step": _Step},
    "tag": {"stage": _Stage | None, "key": str, "value": str},
    "artifact": {
        "stage": _Stage | None, "name": Annotated[str, Field(pattern=ARTIFACT_NAME)],
        "file": Annotated[str, Field(pattern=ARTIFACT_FILE)],
    },
    "model": {"stage": _Stage, "step": _Step, "url": str, "role": str, "points": list[_Point]},
    "model_gone": {"stage": _Stage | None, "url": str},
    "stage_end": {"stage": _Stage | None, "status": Status},
    "run_end": {"stage": _Stage | None, "status": Status},
}  # fmt: skip
_strict = with_config(ConfigDict(extra="allow", strict=True))
_RECORDS = [
    _strict(TypedDict(kind, {"kind": Literal[kind], "at": _Count, **fields}))  # type: ignore[operator]
    for kind, fields in _KINDS.items()
]
_RECORD: Any = Annotated[Union[*_RECORDS], Field(discriminator="kind")]
_VALIDATOR: TypeAdapter[Any] = TypeAdapter(_RECORD)


class InUse(Exception):
    """Another process is using the file."""


class Lease:
    """Marks a file, creating it if necessary, as used by this process until `close` or the process's death, else InUse.

    Without file locks (Lustre without `-o flock`, some NFS), which is logged, the owner touches a file next to it every
    few seconds instead, and counts as dead 60 s after the last touch.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.with_name(f"{path.name}.heartbeat")
        self._heartbeat: PeriodicThread | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or is_held(path):
                os.close(self._fd)
                raise InUse(str(path)) from None
            message = "%s: the file system has no file locks (%s); using heartbeat files instead"
            logger.warning(message, path.parent, error.strerror or error)
            self._beat()
            self._heartbeat = PeriodicThread(self._beat, BEAT_SECONDS, "mome-heartbeat")
            self._heartbeat.start()
        _leased.add(path)

    def close(self) -> None:
        """Sync what was written to the file, and let other processes use it."""
        _leased.discard(self._path)
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            if self._heartbeat is not None:
                self._heartbeat.stop()
                self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # a full disk may still accept the next heartbeat's timestamp
            self._file.touch()
            os.utime(self._file, (time.time(), time.time()))  # this machine's clock, not the file server's


def is_held(path: Path, elsewhere: bool = False) -> bool:
    """Return True while any process, or any other process if `elsewhere`, uses the file."""
    if path in _leased:
        return not elsewhere
    with contextlib.suppress(OSError):
        if abs(time.time() - path.with_name(f"{path.name}.heartbeat").stat().st_mtime) < DEAD_SECONDS:
            return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: NFS grants exclusive locks to writers only
        except OSError as error:  # any other: no locks on this file system, and no heartbeat
            return isinstance(error, BlockingIOError)
    return False


def parse_records(lines: Iterable[bytes], origin: str, offset: int = 0) -> Iterator[tuple[int, Record]]:
    """Yield (end offset, record) of a session's lines; an invalid line is logged and yielded with kind "damaged"."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record: Record = _VALIDATOR.validate_json(line)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            reason = ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
            logger.warning("%s: skipped the damaged record that ends at byte %d (%s)", origin, offset, reason)
            record = {"kind": "damaged", "stage": None}
        yield offset, record


@dataclass(frozen=True)
class Journal:
    """A folder of sessions, with the artifacts that their records name under `files/`."""

    folder: Path

    def sessions(self) -> list[Path]:
        """Return the files of the sessions, in order."""
        paths = (path for path in self.folder.glob("*.jsonl") if path.is_file())
        return sorted(path for path in paths if re.fullmatch(SESSION_NAME, path.stem))

    def file(self, name: str) -> Path | None:
        """Return the path of an artifact; None, with a warning, when it is not a regular file inside `files/`."""
        path = self.folder / "files" / name
        if ARTIFACT_FILE.match(name) and len(path.name.encode(errors="replace")) <= 255:  # the limit of file systems
            with contextlib.suppress(OSError, RuntimeError):  # a loop of symbolic links
                inside = path.resolve().is_relative_to(self.folder.resolve() / "files")
                if inside and (path.is_file() or not path.exists()):  # opening a named pipe would block
                    return path
        logger.warning("%s: skipped %r, which is not a file of this journal", self.folder, name[:200])
        return None

    def tail(self, session: Path, start: int) -> bytes:
        """Return the complete lines of a session from byte `start` on."""
        with session.open("rb") as file:
            file.seek(start)
            data = file.read()
        return data[: data.rfind(b"\n") + 1]

    def records(self, session: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield (end offset, record) of a session from byte `start` on; an unfinished last line is skipped."""
        with session.open("rb") as file:
            file.seek(start)
            yield from parse_records(file, str(session), start)

    def run_records(self) -> list[Record]:
        """Return the first record of every session, which identifies the run and its MLflow server."""
        firsts = (next(self.records(session), None) for session in self.sessions())
        return [first[1] for first in firsts if first is not None and first[1]["kind"] == "run"]


class JournalWriter(Lease):
    """Appends records to a new session: killing this process loses none, and after `sync` power failures neither."""

    def __init__(self, journal: Journal):
        (folder := journal.folder).mkdir(parents=True, exist_ok=True)
        self._folder, self._lock, self._pending, self._failing = folder, threading.Lock(), b"", False
        number = min(max((int(path.stem.split("-")[0]) for path in journal.sessions()), default=0) + 1, 999_999)
        super().__init__(folder / f"{number:06d}-{secrets.token_hex(4)}.jsonl")
        sync_folder(folder)

    def append(self, record: Record) -> None:
        """Append one record. On a full disk the record is kept in memory and written later; nothing is raised."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with self._lock:
            self._pending += line.encode(errors="replace") + b"\n"  # UTF-8 has no unpaired surrogates
            try:
                while self._pending:
                    self._pending = self._pending[os.write(self._fd, self._pending) :]
                self._failing = False
            except OSError as error:
                if not self._failing:
                    message = "cannot write the tracking journal in %s (%s); until it works, records are kept in memory"
                    logger.warning(message, self._folder, error)
                self._failing = True

    def sync(self) -> None:
        os.fsync(self._fd)


def committed_segments(store: Storage, url: str) -> dict[str, list[Segment]]:
    """Return the segments of each session's longest prefix, or the whole file of a local run that was copied there."""
    segments: list[tuple[str, Segment]] = []
    for name, info in store.list_info(url).items():
        if match := _SEGMENT.fullmatch(name):
            start, end = int(match["start"] or 0), int(match["end"] or info.size)
            if end - start == info.size:
                segments.append((match["session"], (start, end, name)))
            else:
                logger.warning("%s/%s: skipped, its size of %d bytes contradicts its name", url, name, info.size)
    chains: dict[str, list[Segment]] = {}
    for session, (start, end, name) in sorted(segments):
        reached = chains[session][-1][1] if session in chains else 0
        if start > reached:
            logger.warning("%s/%s: skipped, the segment before it is missing", url, name)
        elif end > reached:
            chains.setdefault(session, []).append((start, end, name))
    return chains


@dataclass
class CommittedJournal:
    """Commits a journal to the folder of its run and restores it from there; a local run's journal is there already.

    Each commit uploads the bytes that a session has grown by, as one object named for its byte range. Because a session
    only grows, overlapping ranges hold the same bytes: several processes may commit one session, and a commit whose
    response was lost may be repeated from any offset.
    """

    store: Storage
    run: str  # folder
    _ends: dict[str, int] = field(default_factory=dict)  # session -> number of committed bytes
    _files: set[str] = field(default_factory=set)  # committed artifacts
    _uncertain: bool = False  # a write failed but may have taken effect

    def restore(self, journal: Journal) -> None:
        """Download what `journal` lacks of the committed copy; drop training that another node's has replaced."""
        if is_local(self.run):
            return
        url = f"{self.run.rstrip('/')}/journal"
        segments = committed_segments(self.store, url)
        self._ends = {session: chain[-1][1] for session, chain in segments.items()}
        behind = []
        for session, end in self._ends.items():
            path = journal.folder / f"{session}.jsonl"
            if not path.exists() or (path.stat().st_size < end and not is_held(path)):  # held: it is being written
                behind.append(session)
        if not behind:
            return
        journal.folder.mkdir(parents=True, exist_ok=True)
        (journal.folder / RESTORED).touch()
        downloaded: dict[str, bytes] = {}
        for session in behind:
            prefix = bytearray()
            for start, end, name in segments[session]:
                segment = self.store.read(f"{url}/{name}")
                if len(segment) != end - start:
                    logger.warning("%s/%s changed while it was read; skipping the rest", url, name)
                    break
                prefix += segment[len(prefix) - start :]
            downloaded[session], self._ends[session] = bytes(prefix), len(prefix)
        if any(_TRAINING.search(data) for data in downloaded.values()):
            # The other node resumed from an earlier step and recorded these steps itself. Evaluations are kept.
            for path in journal.sessions():
                end = self._ends.get(path.stem, 0)
                if not is_held(path) and path.stat().st_size > end and _TRAINING.search(path.read_bytes()):
                    if end:
                        os.truncate(path, end)
                    else:
                        path.unlink()
        for session, data in downloaded.items():
            for _, record in parse_records(io.BytesIO(data), session):
                if record["kind"] == "artifact" and (artifact := journal.file(record["file"])) is not None:
                    source = f"{url}/files/{record['file']}"
                    if not artifact.exists() and not self.store.exists(source):
                        logger.warning("%s: skipped, this artifact of the journal is missing", source)
                        continue
                    if not artifact.exists():
                        write_durably(artifact, self.store.read(source))
                    self._files.add(record["file"])
            write_durably(journal.folder / f"{session}.jsonl", data)  # last, so that an interrupted restore is repeated

    def commit(self, journal: Journal) -> None:
        """Upload the complete records that are not committed yet, except of sessions that other processes write."""
        if is_local(self.run):
            return
        url = f"{self.run.rstrip('/')}/journal"
        if self._uncertain:
            self._ends = {session: chain[-1][1] for session, chain in committed_segments(self.store, url).items()}
        self._uncertain = True
        for session in journal.sessions():
            start = self._ends.get(session.stem, 0)
            if is_held(session, elsewhere=True) or not (data := journal.tail(session, start)):
                continue
            for _, record in parse_records(io.BytesIO(data), session.stem, start):
                if record["kind"] != "artifact" or (name := record["file"]) in self._files:
                    continue
                if (artifact := journal.file(name)) is not None:
                    try:
                        content = artifact.read_bytes()
                    except OSError as error:  # must not prevent the commit of the records
                        message = "the artifact %s cannot be read (%s); committing the journal without it"
                        logger.warning(message, artifact, error)
                        continue
                    self.store.write(f"{url}/files/{name}", content)
                    self._files.add(name)
            end = start + len(data)
            self.store.write(f"{url}/{session.stem}.{start:012d}-{end:012d}.jsonl", data)
            self._ends[session.stem] = end
        self._uncertain = False
