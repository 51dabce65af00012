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
from typing import TYPE_CHECKING

from pipeline.config.durable import write_durably
from pipeline.config.urls import is_local
from pipeline.tracking.journal import SESSION_NAME, Journal, parse_records
from pipeline.tracking.lease import is_held

if TYPE_CHECKING:
    from pipeline.data.storage import Storage

logger = logging.getLogger("mome.tracking")

# The second form: a local run's journal that was copied to the store as it is.
_SEGMENT = re.compile(SESSION_NAME + r"(?:\.(?P<start>[0-9]{12})-(?P<end>[0-9]{12}))?\.jsonl")
# Records of a stage, which evaluations do not have. It cannot match inside a string, where quotes are escaped.
_TRAINING = re.compile(rb'"stage":[0-9]')

Segment = tuple[int, int, str]  # the bytes [start, end) of a session, and the name of the object that holds them


def committed_segments(store: Storage, url: str) -> dict[str, list[Segment]]:
    """Return, for each session, the segments that cover its longest available prefix; neighbours may overlap.

    A session can also be one whole file, if a local run's folder was copied to the store.
    """
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


class CommittedJournal:
    """Commits a journal to the run's `folder` and restores it from there; a local run's journal is there already."""

    def __init__(self, store: Storage, folder: str):
        self._store = store
        self._url = None if is_local(folder) else f"{folder.rstrip('/')}/journal"
        self._ends: dict[str, int] = {}  # session -> number of committed bytes
        self._files: set[str] = set()  # committed artifacts
        self._uncertain = False  # a write failed but may have taken effect

    def restore(self, journal: Journal) -> None:
        """Download what `journal` lacks of the committed copy.

        If another node has trained in the meantime, this node's uncommitted training records are removed: the other
        node resumed from an earlier step and recorded those steps itself.
        """
        if (url := self._url) is None:
            return
        segments = committed_segments(self._store, url)
        self._ends = {session: chain[-1][1] for session, chain in segments.items()}
        behind = []
        for session, end in self._ends.items():
            path = journal.path(session)
            if not path.exists() or (path.stat().st_size < end and not is_held(path)):  # held: it is being written
                behind.append(session)
        if not behind:
            return
        journal.folder.mkdir(parents=True, exist_ok=True)
        journal.restored.touch()
        downloaded: dict[str, bytes] = {}
        for session in behind:
            prefix = bytearray()
            for start, end, name in segments[session]:
                segment = self._store.read(f"{url}/{name}")
                if len(segment) != end - start:
                    logger.warning("%s/%s changed while it was read; skipping the rest", url, name)
                    break
                prefix += segment[len(prefix) - start :]
            downloaded[session], self._ends[session] = bytes(prefix), len(prefix)
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
                if record["kind"] == "artifact" and (artifact := journal.file(record["file"])) is not None:
                    source = f"{url}/files/{record['file']}"
                    if not artifact.exists() and not self._store.exists(source):
                        logger.warning("%s: skipped, this artifact of the journal is missing", source)
                        continue
                    if not artifact.exists():
                        write_durably(artifact, self._store.read(source))
                    self._files.add(record["file"])
            write_durably(journal.path(session), data)  # last, so that an interrupted restore is repeated

    def commit(self, journal: Journal) -> None:
        """Upload all complete records that are not committed yet, each after the artifact that it names.

        Sessions that another living process is writing are skipped; that process commits them.
        """
        if (url := self._url) is None:
            return
        if self._uncertain:
            self._ends = {session: chain[-1][1] for session, chain in committed_segments(self._store, url).items()}
        self._uncertain = True
        for session in journal.sessions():
            start = self._ends.get(session, 0)
            if is_held(journal.path(session), elsewhere=True) or not (data := journal.tail(session, start)):
                continue
            for _, record in parse_records(io.BytesIO(data), session, start):
                if record["kind"] != "artifact" or (name := record["file"]) in self._files:
                    continue
                if (artifact := journal.file(name)) is not None:
                    try:
                        content = artifact.read_bytes()
                    except OSError as error:  # must not prevent the commit of the records
                        message = "the artifact %s cannot be read (%s); committing the journal without it"
                        logger.warning(message, artifact, error)
                        continue
                    self._store.write(f"{url}/files/{name}", content)
                    self._files.add(name)
            end = start + len(data)
            self._store.write(f"{url}/{session}.{start:012d}-{end:012d}.jsonl", data)
            self._ends[session] = end
        self._uncertain = False
