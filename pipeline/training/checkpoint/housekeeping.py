"""Clearing up among a run's checkpoints: those no longer wanted, and what attempts that died left unfinished.

One rank does it, beside training. What fails is told and not raised: it takes space, and no run down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, split
from pipeline.training.checkpoint.committed import is_committed, read_manifest
from pipeline.training.checkpoint.retention import Known, newest_first, remove, step_of, wanted

log = logging.getLogger(__name__)


class Housekeeping:
    """Of the checkpoints in the folder `url`."""

    def __init__(self, storage: Storage, url: str, config: CheckpointConfig):
        self._storage, self._url, self._config = storage, url, config
        self._known: dict[str, Known] = {}  # committed checkpoints whose manifests were read
        self.kept: tuple[Known, ...] = ()  # those that there were after the last commit

    def at_start(self, newest: Known | None) -> None:
        """Remove what attempts before this one left; `newest` is the checkpoint that the run goes on from."""
        with self._told_not_raised():
            if count := self._storage.abandon_uploads(self._url):
                log.warning("%s: removed the parts of %d uploads that were never finished", self._url, count)
        if newest is not None:
            self._remove_leavings(newest)

    def after_commit(self, newest: Known) -> None:
        self._known[newest.url] = newest
        self._retire(newest)
        self._remove_leavings(newest)

    def _retire(self, newest: Known) -> None:
        with self._told_not_raised():
            folders = newest_first(self._storage, self._url)
            committed = [self._read(url) for url in folders if is_committed(self._storage, url)]
            stay = wanted(committed, newest, self._config)
            for each in committed:
                if each.url not in stay:
                    remove(self._storage, each.url)
                    self._known.pop(each.url)
            self.kept = tuple(each for each in committed if each.url in stay)
        best = self._config.keep_best
        if best is not None and best.metric not in newest.metrics:
            known = ", ".join(sorted(newest.metrics)) or "none"
            log.warning("checkpoint.keep_best.metric: '%s' is not recorded here; recorded: %s", best.metric, known)

    def _remove_leavings(self, newest: Known) -> None:
        """Of attempts that never committed, at steps that a committed checkpoint has reached.

        What lies beyond may be the work of another attempt that is still alive.
        """
        with self._told_not_raised():
            for url in newest_first(self._storage, self._url):
                if _step(url) <= newest.step and not is_committed(self._storage, url):
                    self._storage.abandon_uploads(url)
                    remove(self._storage, url)
                    log.warning("%s: removed: it was never finished", url)

    def _read(self, url: str) -> Known:
        """What retention asks of a checkpoint; of a damaged one, its step."""
        if url not in self._known:
            try:
                self._known[url] = Known.of(url, read_manifest(self._storage, url))
            except CheckpointError:
                self._known[url] = Known(url, _step(url))
        return self._known[url]

    @contextmanager
    def _told_not_raised(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            log.warning("%s: older checkpoints or leavings could not be removed: %s", self._url, error)


def _step(url: str) -> int:
    step = step_of(split(url)[1])
    assert step is not None, f"{url} is no checkpoint's"
    return step
