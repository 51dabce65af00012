"""Clearing up among a run's checkpoints: those no longer wanted, and what attempts that died left unfinished.

One rank does it, beside training, and only while this start owns the run. It deletes what this start and earlier ones
wrote; what a later start wrote is never touched. A fault of the store is logged and not raised: it takes space, and no
run down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join, split
from pipeline.training.checkpoint.committed import (
    COMMIT,
    SEAL,
    Record,
    is_committed,
    read_manifest,
    seal,
    what_is_missing,
)
from pipeline.training.checkpoint.retention import NOBODY, Known, newest_first, remove, start_of, step_of, wanted
from pipeline.training.ownership import Ownership

log = logging.getLogger(__name__)


class Housekeeping:
    """Of the checkpoints in the folder `url`, for the start that owns the run."""

    def __init__(self, storage: Storage, url: str, config: CheckpointConfig, ownership: Ownership):
        self._storage, self._url, self._config, self._ownership = storage, url, config, ownership
        self._start = ownership.start or NOBODY
        self._known: dict[str, Known] = {}  # committed checkpoints whose manifests were read
        self._sealed: set[str] = set()  # folders that an earlier look found sealed and not committed
        self.kept: tuple[Known, ...] = ()  # those that there were after the last commit

    def at_start(self, newest: Known | None) -> None:
        """Remove what attempts before this one left; `newest` is the checkpoint that the run goes on from.

        Raises Superseded when a later start has the run.
        """
        with self._faults_logged():
            self._ownership.check()
            count = self._storage.abort_uploads(self._url, lambda name: self._is_ours(name.partition("/")[0]))
            if count:
                log.warning("%s: removed the parts of %d uploads that were never finished", self._url, count)
            if newest is not None:
                self._remove_leavings(newest)

    def after_commit(self, newest: Known, files: Mapping[str, Record]) -> None:
        """Retire what `newest`, just committed with these files, replaces.

        Raises StorageError when it is not whole: where the store creates objects in two steps, another attempt may have
        cleared its files away. Raises Superseded when a later start has the run; nothing is deleted then.
        """
        missing = ""
        with self._faults_logged():
            missing = what_is_missing(self._storage, newest.url, files)
            self._ownership.check()
            if not missing:
                self._known[newest.url] = newest
                self._retire(newest)
                self._remove_leavings(newest)
        if missing:
            self._storage.delete(join(newest.url, COMMIT))
            raise StorageError(f"{newest.url}: committed, and taken back: {missing}")

    def _retire(self, newest: Known) -> None:
        folders = newest_first(self._storage, self._url)
        committed = [self._read(url) for url in folders if is_committed(self._storage, url)]
        stay = wanted(committed, newest, self._config)
        for each in committed:
            if each.url not in stay and self._is_ours(split(each.url)[1]):
                remove(self._storage, each.url)
                self._known.pop(each.url)
        self.kept = tuple(each for each in committed if each.url in stay)
        best = self._config.keep_best
        if best is not None and best.metric not in newest.metrics:
            known = ", ".join(sorted(newest.metrics)) or "none"
            log.warning("checkpoint.keep_best.metric: '%s' is not recorded here; recorded: %s", best.metric, known)

    def _remove_leavings(self, newest: Known) -> None:
        """Of attempts that never committed, at steps that a committed checkpoint has reached."""
        for url in newest_first(self._storage, self._url):
            name = split(url)[1]
            if _step(url) > newest.step or not self._is_ours(name) or is_committed(self._storage, url):
                continue
            if start_of(name) in (self._start, NOBODY) or url in self._sealed:
                self._clear(url)
                self._sealed.discard(url)
            else:  # its writer may be alive, and about to commit: the seal decides, and stays for one more checkpoint
                if seal(self._storage, url, f"given up by {self._start}"):
                    self._clear(url, keep=SEAL)
                self._sealed.add(url)

    def _clear(self, url: str, keep: str | None = None) -> None:
        self._storage.abort_uploads(url)
        remove(self._storage, url, keep)
        log.warning("%s: removed: it was never finished", url)

    def _is_ours(self, name: str) -> bool:
        """Whether a folder is a checkpoint of this start or of an earlier one, which this start has superseded."""
        return step_of(name) is not None and start_of(name) <= self._start

    def _read(self, url: str) -> Known:
        """What retention asks of a checkpoint; of a damaged one, its step."""
        if url not in self._known:
            try:
                manifest = read_manifest(self._storage, url)
                missing = what_is_missing(self._storage, url, manifest["files"])
                self._known[url] = replace(Known.of(url, manifest), is_whole=not missing)
            except CheckpointError:
                self._known[url] = Known(url, _step(url), is_whole=False)
        return self._known[url]

    @contextmanager
    def _faults_logged(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            log.warning("%s: older checkpoints or leavings could not be removed: %s", self._url, error)


def _step(url: str) -> int:
    step = step_of(split(url)[1])
    assert step is not None, f"{url} is no checkpoint's"
    return step
