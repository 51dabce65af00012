"""A run's journal: append-only JSON Lines files that survive crashes and lost nodes.

Every process that records something about a run (training, a restart, an evaluation) appends to its own file, a
*session*; the sessions in order form the journal. With one writer per file, a crash can tear only the last line of a
session, no process repairs a file that another may be writing, and two nodes never append to copies of one file.

A record is {"kind": …, "at": milliseconds, "stage": index or null, …}. Kinds: run (first record of every session),
stage, metrics, rewind (voids a stage's later points), tag, artifact, model and model_gone (weights retained, and
deleted), stage_end, run_end. Numbers keep every bit; those that JSON lacks are strings ("nan", "inf", "-inf"). Records
are validated when read, because a journal may have been written by anybody.

`pipeline.tracking.committed` copies the journal into a remote run's storage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from pipeline.config.durable import sync_folder
from pipeline.tracking.lease import Lease

logger = logging.getLogger("mome.tracking")

Record = dict[str, Any]

CHECKPOINT, FINAL_WEIGHTS = "checkpoint", "final_weights"  # roles in model records; final weights are never deleted
EVALUATION = "eval/"  # prefix of the metrics of held-out data
RUN_ID = "[0-9A-Za-z_.-]{1,64}"
SESSION_NAME = r"(?P<session>[0-9]{6}-[0-9a-f]{1,32})"
# Files of artifacts, and their names in MLflow's artifact folder: relative paths without empty, '.' and '..' parts,
# because a journal's author must not be able to read or write files elsewhere on this machine.
ARTIFACT_FILE = re.compile(r"\A[0-9a-f]{16}/(?!\.{1,2}\Z)[^/\0]{1,255}\Z")
ARTIFACT_NAME = re.compile(r"\A(?!(?:.*/)?\.{0,2}(?:/|\Z))[^\0\\]{1,1000}\Z", re.DOTALL)

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Step = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Stage = Annotated[int, Field(ge=0, lt=10_000)]
_Number = float | Literal["nan", "inf", "-inf"]
_Status = Literal["FINISHED", "FAILED", "KILLED"]
_Texts = dict[str, str]


class _Dataset(TypedDict):
    name: str
    source: str
    digest: str
    context: str


class _Point(TypedDict):
    stage: _Stage | None
    key: str
    value: _Number
    at: _Count


# Kinds of records and their fields, besides "kind" and "at".
_KINDS: dict[str, dict[str, Any]] = {
    "run": {
        "stage": _Stage | None, "params": _Texts, "tags": _Texts, "datasets": list[_Dataset],
        "run": Annotated[str, Field(pattern=f"^{RUN_ID}$")],  # becomes part of an MLflow search filter
        "name": NotRequired[str], "uri": NotRequired[str], "experiment": NotRequired[str],
        "server_has_more": NotRequired[bool],
    },
    "stage": {"stage": _Stage, "name": str, "params": _Texts, "tags": _Texts, "datasets": list[_Dataset]},
    "metrics": {"stage": _Stage | None, "step": _Step, "values": dict[str, _Number]},
    "rewind": {"stage": _Stage, "step": _Step},
    "tag": {"stage": _Stage | None, "key": str, "value": str},
    "artifact": {
        "stage": _Stage | None, "name": Annotated[str, Field(pattern=ARTIFACT_NAME)],
        "file": Annotated[str, Field(pattern=ARTIFACT_FILE)],
    },
    "model": {"stage": _Stage, "step": _Step, "url": str, "role": str, "points": list[_Point]},
    "model_gone": {"stage": _Stage | None, "url": str},
    "stage_end": {"stage": _Stage | None, "status": _Status},
    "run_end": {"stage": _Stage | None, "status": _Status},
}  # fmt: skip
_strict = with_config(ConfigDict(extra="allow", strict=True))
_RECORDS = [
    _strict(TypedDict(kind, {"kind": Literal[kind], "at": _Count, **fields}))  # type: ignore[operator]
    for kind, fields in _KINDS.items()
]
_RECORD: Any = Annotated[Union[*_RECORDS], Field(discriminator="kind")]
_VALIDATOR: TypeAdapter[Any] = TypeAdapter(_RECORD)


def encode(record: Record) -> bytes:
    """Return the record's line. Unpaired surrogates, which UTF-8 cannot encode, become question marks."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return line.encode(errors="replace") + b"\n"


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


class Journal:
    """A folder of sessions, with the artifacts that their records name under `files/`."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Marker: part was downloaded from the run's storage, and no run has continued it on this machine.
        self.restored = folder / "restored"
        self.upload_lock = folder / "uploader.lock"  # held while a process uploads the journal

    def sessions(self) -> list[str]:
        names = (path.stem for path in self.folder.glob("*.jsonl") if path.is_file())
        return sorted(name for name in names if re.fullmatch(SESSION_NAME, name))

    def path(self, session: str) -> Path:
        return self.folder / f"{session}.jsonl"

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

    def tail(self, session: str, start: int) -> bytes:
        """Return the complete lines of a session from byte `start` on."""
        with self.path(session).open("rb") as file:
            file.seek(start)
            data = file.read()
        return data[: data.rfind(b"\n") + 1]

    def records(self, session: str, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield (end offset, record) of a session from byte `start` on; an unfinished last line is skipped."""
        with self.path(session).open("rb") as file:
            file.seek(start)
            yield from parse_records(file, str(self.path(session)), start)

    def all_records(self) -> Iterator[Record]:
        """Yield the records of all sessions in order."""
        for session in self.sessions():
            for _, record in self.records(session):
                yield record

    def run_records(self) -> list[Record]:
        """Return the first record of every session, which identifies the run and its MLflow server."""
        firsts = (next(self.records(session), None) for session in self.sessions())
        return [first[1] for first in firsts if first is not None and first[1]["kind"] == "run"]


class JournalWriter:
    """Appends records to a new session of a journal.

    `append` hands a record to the operating system at once, so that killing this process loses none. `sync` makes the
    records survive a power failure; it is called periodically, outside the training thread.
    """

    def __init__(self, journal: Journal):
        self._folder = journal.folder
        self._folder.mkdir(parents=True, exist_ok=True)
        number = min(max((int(name.split("-")[0]) for name in journal.sessions()), default=0) + 1, 999_999)
        path = journal.path(f"{number:06d}-{secrets.token_hex(4)}")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._lease = Lease(path)  # shows other processes that this session is being written
        sync_folder(self._folder)
        self._lock = threading.Lock()
        self._pending = b""
        self._failing = False

    def append(self, record: Record) -> None:
        """Append one record. On a full disk the record is kept in memory and written later; nothing is raised."""
        with self._lock:
            self._pending += encode(record)
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

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._lease.close()
