"""The copy of a journal in a remote run's storage: what a restart on another node continues from.

Each commit uploads what a session has grown by, as one object that is named for its range of bytes. Since a session
only grows, ranges that overlap hold the same bytes: several processes may commit one session, and a commit whose
answer was lost may be repeated from anywhere.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.durable import write_durably
from pipeline.tracking.journal import (
    SESSION_NAME,
    Journal,
    complete_length,
    parse_records,
    read_records,
)
from pipeline.tracking.liveness import is_held, is_held_elsewhere
from pipeline.tracking.records import Record

logger = logging.getLogger("mome.tracking")

_SEGMENT = re.compile(SESSION_NAME + r"\.(?P<start>[0-9]{12})-(?P<end>[0-9]{12})\.jsonl")
_WHOLE = re.compile(SESSION_NAME + r"\.jsonl")  # as a journal lies in a local run's folder, which somebody copied

_OF_A_STAGE = re.compile(rb'"stage":[0-9]')  # quotes inside a text are escaped


class Sized(Protocol):
    @property
    def size(self) -> int: ...


class Store(Protocol):
    """What the journal needs of an object store (`pipeline.data.storage.Storage` has it)."""

    def read(self, url: str) -> bytes: ...
    def write(self, url: str, data: bytes) -> None: ...
    def list_info(self, url: str) -> Mapping[str, Sized]: ...
    def exists(self, url: str) -> bool: ...


@dataclass(frozen=True)
class Segment:
    """The bytes [start, end) of a session, committed as one object of that name."""

    name: str
    start: int
    end: int


def committed_segments(store: Store, url: str) -> dict[str, list[Segment]]:
    """Return per session the segments that cover its longest prefix in `url`; neighbours may overlap.

    A session may also lie there as one file: a run's folder was copied to the store.
    """
    segments: dict[str, list[Segment]] = {}
    for name, info in store.list_info(url).items():
        if match := _SEGMENT.fullmatch(name):
            segment = Segment(name, int(match["start"]), int(match["end"]))
            if segment.end - segment.start != info.size:
                logger.warning("%s/%s has %d bytes, not those of its name, and is left out", url, name, info.size)
                continue
        elif match := _WHOLE.fullmatch(name):
            segment = Segment(name, 0, info.size)
        else:
            continue
        segments.setdefault(match["session"], []).append(segment)
    chains = {session: _chain(url, found) for session, found in sorted(segments.items())}
    return {session: chain for session, chain in chains.items() if chain}


def _chain(url: str, segments: list[Segment]) -> list[Segment]:
    chain: list[Segment] = []
    end = 0
    for segment in sorted(segments, key=lambda segment: (segment.start, segment.end)):
        if segment.start > end:
            logger.warning("%s/%s does not follow the segments before it and is left out", url, segment.name)
        elif segment.end > end:
            chain.append(segment)
            end = segment.end
    return chain


class CommittedJournal:
    """The committed copy of one journal, and how far this process knows it to reach."""

    def __init__(self, store: Store, url: str):
        self._store = store
        self._url = url
        self._ends: dict[str, int] = {}  # session -> bytes that are committed
        self._files: set[str] = set()  # artifacts that are committed
        self._uncertain = False  # a write failed, and may have taken effect

    def restore(self, journal: Journal) -> bool:
        """Bring `journal` up to the committed copy; True if something of it was not here.

        If another node trained meanwhile, what this node's training never committed is void: the other node resumed
        before it, and recorded those steps itself.
        """
        segments = committed_segments(self._store, self._url)
        self._ends = {session: chain[-1].end for session, chain in segments.items()}
        behind = [session for session, end in self._ends.items() if _is_behind(journal.path(session), end)]
        if not behind:
            return False
        journal.restored()
        downloaded = {session: self._read(segments[session]) for session in behind}
        self._ends |= {session: len(data) for session, data in downloaded.items()}
        if any(_trains(data) for data in downloaded.values()):
            for session in journal.sessions():
                self._cut(journal.path(session), self._ends.get(session, 0))
        for session, data in downloaded.items():
            self._download_files(journal, session, data)
            write_durably(journal.path(session), data)  # last: a restore that is interrupted is begun again
        return True

    def commit(self, journal: Journal) -> None:
        """Upload every whole record that was not committed yet, and the artifacts they name before them.

        Sessions that another living process writes are left to it.
        """
        if self._uncertain:
            segments = committed_segments(self._store, self._url)
            self._ends = {session: chain[-1].end for session, chain in segments.items()}
        self._uncertain = True
        for session in journal.sessions():
            path, start = journal.path(session), self._ends.get(session, 0)
            if _size(path) <= start or is_held_elsewhere(path) or (end := complete_length(path)) <= start:
                continue
            for name in _artifact_names(read_records(path, start)):
                self._upload_file(journal, name)
            data = _read_range(path, start, end)
            self._store.write(f"{self._url}/{session}.{start:012d}-{end:012d}.jsonl", data)
            self._ends[session] = end
        self._uncertain = False

    def _upload_file(self, journal: Journal, name: str) -> None:
        path = journal.file(name)
        if path is None or name in self._files:
            return
        try:
            data = path.read_bytes()
        except OSError as error:  # the records that name it matter more
            logger.warning("the artifact %s cannot be read (%s) and is left out of the committed journal", path, error)
            return
        self._store.write(f"{self._url}/files/{name}", data)
        self._files.add(name)

    def _cut(self, path: Path, end: int) -> None:
        """Take back what was recorded beyond `end` by training; nobody records an evaluation again."""
        if is_held(path) or _size(path) <= end or not _trains(path.read_bytes()):
            return
        if end:
            os.truncate(path, end)
        else:
            path.unlink()

    def _read(self, chain: list[Segment]) -> bytes:
        """Return the bytes of a session, up to the first segment that is not what the listing said."""
        parts: list[bytes] = []
        end = 0
        for segment in chain:
            data = self._store.read(f"{self._url}/{segment.name}")
            if len(data) != segment.end - segment.start:
                logger.warning("%s/%s changed while it was read; what follows is left out", self._url, segment.name)
                break
            parts.append(data[end - segment.start :])
            end = segment.end
        return b"".join(parts)

    def _download_files(self, journal: Journal, session: str, data: bytes) -> None:
        for name in _artifact_names(parse_records(io.BytesIO(data), session)):
            path, url = journal.file(name), f"{self._url}/files/{name}"
            if path is None:
                continue
            if not path.exists():
                if not self._store.exists(url):
                    logger.warning("%s: an artifact of the journal is missing and is left out", url)
                    continue
                write_durably(path, self._store.read(url))
            self._files.add(name)


def _is_behind(path: Path, end: int) -> bool:
    """Return True for a session of which less than `end` bytes is here; one that is being written never is."""
    return not path.exists() or (_size(path) < end and not is_held(path))


def _trains(session: bytes) -> bool:
    """Return True for the bytes of a session with records of a stage; an evaluation has none."""
    return _OF_A_STAGE.search(session) is not None


def _artifact_names(records: Iterable[tuple[int, Record]]) -> list[str]:
    return [record["file"] for _, record in records if record["kind"] == "artifact"]


def _size(path: Path) -> int:
    return path.stat().st_size


def _read_range(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
