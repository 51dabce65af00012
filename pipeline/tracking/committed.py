"""The journal's copy in a remote run's storage, from which a restart on another node continues.

Each commit uploads the bytes that a session has grown by, as one object named for its byte range. Because a session
only grows, overlapping ranges hold the same bytes: several processes may commit one session, and a commit whose
response was lost may be repeated from any offset.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.durable import write_durably
from pipeline.tracking.journal import SESSION_NAME, Journal, complete_length, parse_records
from pipeline.tracking.lease import is_held, is_held_elsewhere

logger = logging.getLogger("mome.tracking")

_SEGMENT = re.compile(SESSION_NAME + r"\.(?P<start>[0-9]{12})-(?P<end>[0-9]{12})\.jsonl")
_WHOLE = re.compile(SESSION_NAME + r"\.jsonl")  # a local run's journal that was copied to the store as it is
# Records of a stage, which evaluations do not have. It cannot match inside a string, where quotes are escaped.
_TRAINING = re.compile(rb'"stage":[0-9]')


class Store(Protocol):
    """The object store operations that the journal uses (implemented by `pipeline.data.storage.Storage`)."""

    def read(self, url: str) -> bytes: ...
    def write(self, url: str, data: bytes) -> None: ...
    def list_info(self, url: str) -> Mapping[str, Any]: ...  # values have a `size` in bytes
    def exists(self, url: str) -> bool: ...


@dataclass(frozen=True, order=True)
class JournalSegment:
    """The bytes [start, end) of a session, committed as one object called `name`."""

    start: int
    end: int
    name: str


def committed_segments(store: Store, url: str) -> dict[str, list[JournalSegment]]:
    """Return, for each session, the segments that cover its longest available prefix; neighbours may overlap.

    A session can also be one whole file, if a local run's folder was copied to the store.
    """
    segments: list[tuple[str, JournalSegment]] = []
    for name, info in store.list_info(url).items():
        if match := _SEGMENT.fullmatch(name):
            segment = JournalSegment(int(match["start"]), int(match["end"]), name)
            if segment.end - segment.start != info.size:
                logger.warning("%s/%s: skipped, its size of %d bytes contradicts its name", url, name, info.size)
                continue
        elif match := _WHOLE.fullmatch(name):
            segment = JournalSegment(0, info.size, name)
        else:
            continue
        segments.append((match["session"], segment))
    chains: dict[str, list[JournalSegment]] = {}
    for session, segment in sorted(segments):
        end = chains[session][-1].end if session in chains else 0
        if segment.start > end:
            logger.warning("%s/%s: skipped, the segment before it is missing", url, segment.name)
        elif segment.end > end:
            chains.setdefault(session, []).append(segment)
    return chains


class CommittedJournal:
    """Commits a journal to the run's storage and restores it from there."""

    def __init__(self, store: Store, url: str):
        self._store = store
        self._url = url
        self._ends: dict[str, int] = {}  # session -> number of committed bytes
        self._files: set[str] = set()  # committed artifacts
        self._uncertain = False  # a write failed but may have taken effect

    def restore(self, journal: Journal) -> bool:
        """Download what `journal` lacks of the committed copy; return True if anything was missing.

        If another node has trained in the meantime, this node's uncommitted training records are removed: the other
        node resumed from an earlier step and recorded those steps itself.
        """
        segments = committed_segments(self._store, self._url)
        self._ends = {session: chain[-1].end for session, chain in segments.items()}
        behind = []
        for session, end in self._ends.items():
            path = journal.path(session)
            if not path.exists() or (path.stat().st_size < end and not is_held(path)):  # held: it is being written
                behind.append(session)
        if not behind:
            return False
        journal.folder.mkdir(parents=True, exist_ok=True)
        journal.restored.touch()
        downloaded = {session: self._read(segments[session]) for session in behind}
        self._ends |= {session: len(data) for session, data in downloaded.items()}
        if any(_TRAINING.search(data) for data in downloaded.values()):
            for session in journal.sessions():  # evaluations are kept, because they are never recorded again
                path, end = journal.path(session), self._ends.get(session, 0)
                if not is_held(path) and path.stat().st_size > end and _TRAINING.search(path.read_bytes()):
                    if end:
                        os.truncate(path, end)
                    else:
                        path.unlink()
        for session, data in downloaded.items():
            for _, record in parse_records(io.BytesIO(data), session):
                if record["kind"] == "artifact":
                    self._download_file(journal, record["file"])
            write_durably(journal.path(session), data)  # last, so that an interrupted restore is repeated
        return True

    def _read(self, chain: list[JournalSegment]) -> bytes:
        """Return a session's bytes, up to the first segment whose size differs from the listing."""
        parts: list[bytes] = []
        end = 0
        for segment in chain:
            data = self._store.read(f"{self._url}/{segment.name}")
            if len(data) != segment.end - segment.start:
                logger.warning("%s/%s changed while it was read; skipping the rest", self._url, segment.name)
                break
            parts.append(data[end - segment.start :])
            end = segment.end
        return b"".join(parts)

    def _download_file(self, journal: Journal, name: str) -> None:
        path, url = journal.file(name), f"{self._url}/files/{name}"
        if path is None:
            return
        if not path.exists():
            if not self._store.exists(url):
                logger.warning("%s: skipped, this artifact of the journal is missing", url)
                return
            write_durably(path, self._store.read(url))
        self._files.add(name)

    def commit(self, journal: Journal) -> None:
        """Upload all complete records that are not committed yet, each after the artifact that it names.

        Sessions that another living process is writing are skipped; that process commits them.
        """
        if self._uncertain:
            segments = committed_segments(self._store, self._url)
            self._ends = {session: chain[-1].end for session, chain in segments.items()}
        self._uncertain = True
        for session in journal.sessions():
            path, start = journal.path(session), self._ends.get(session, 0)
            if path.stat().st_size <= start or is_held_elsewhere(path) or (end := complete_length(path)) <= start:
                continue
            for _, record in journal.records(session, start):
                if record["kind"] == "artifact":
                    self._upload_file(journal, record["file"])
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
            self._store.write(f"{self._url}/{session}.{start:012d}-{end:012d}.jsonl", data)
            self._ends[session] = end
        self._uncertain = False

    def _upload_file(self, journal: Journal, name: str) -> None:
        path = journal.file(name)
        if path is None or name in self._files:
            return
        try:
            data = path.read_bytes()
        except OSError as error:  # must not prevent the commit of the records
            logger.warning("the artifact %s cannot be read (%s); committing the journal without it", path, error)
            return
        self._store.write(f"{self._url}/files/{name}", data)
        self._files.add(name)
