"""Retention: which checkpoints are kept, and the deletion of the others and of what dead attempts left unfinished.

One rank does it, in the background, and only while its start owns the run. It touches only names that this package
gives, and never what a later start wrote. A storage failure is logged and not raised: it costs space only.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join, split
from pipeline.training.checkpoint import committed
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, SEAL, Record
from pipeline.training.ownership import Ownership, Start

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"step-(\d{8,})\.(?:(\d{4,}-[0-9a-f]{8})-)?([0-9a-f]+)")
_FILE = re.compile(rf"rank-\d{{5,}}\.(safetensors|json)|{'|'.join(map(re.escape, (MANIFEST, SEAL, COMMIT)))}")
NO_START = Start(0, "")  # of folders whose name has no start: they were not written by a run


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint by its manifest: the progress of the run and what its state was made from."""

    url: str
    step: int  # global steps done
    stage: str = ""
    stage_step: int = 0  # steps done in the stage
    plan_digest: str = ""
    data_counts: dict[str, float] = field(default_factory=dict)  # of the stage so far, by metric
    time_account: dict[str, float] = field(default_factory=dict)  # seconds of the run so far, by phase
    spikes: dict[str, Any] = field(default_factory=dict)  # state of the SpikeGuard
    metrics: dict[str, float] = field(default_factory=dict)  # that it was saved with
    is_complete: bool = True  # as far as the manifest and the files' sizes show

    @classmethod
    def of(cls, url: str, metadata: Mapping[str, Any]) -> Checkpoint:
        names = {field.name for field in fields(cls)} & metadata.keys()
        return cls(**{name: metadata[name] for name in names} | {"url": url})


def parse_name(name: str) -> tuple[int, Start, int] | None:
    """Return (global step, start, time) of a checkpoint folder's name, in which order they sort; None for others."""
    match = _FOLDER.fullmatch(name)
    return match and (int(match[1]), Start.parse(match[2]) if match[2] else NO_START, int(match[3], 16))


def newest_first(storage: Storage, url: str) -> list[str]:
    """Return the URLs of the checkpoints in `url`, committed or not: latest step first, then latest start and time."""
    names = (name.rstrip("/") for name in storage.list(url))
    keys = sorted(((key, name) for name in names if (key := parse_name(name))), reverse=True)
    return [join(url, name) for _, name in keys]


def select_kept(checkpoints: Iterable[Checkpoint], newest: Checkpoint, config: CheckpointConfig) -> set[str]:
    """Return the URLs to keep: the last `keep`, one every `keep_every` steps, and the best of each stage.

    `newest` replaces others of its step: the state is the same, and an older one may be the damaged checkpoint that the
    run fell back from. An incomplete checkpoint does not count as one of those kept.
    """
    others = [checkpoint for checkpoint in checkpoints if checkpoint.step != newest.step and checkpoint.is_complete]
    ordered = sorted([*others, newest], key=lambda checkpoint: checkpoint.step, reverse=True)
    kept = {newest.url, *(checkpoint.url for checkpoint in ordered[: config.keep])}
    if config.keep_every is not None:
        kept |= {checkpoint.url for checkpoint in ordered if checkpoint.step % config.keep_every == 0}
    if config.keep_best is not None:
        metric, sign = config.keep_best.metric, 1 if config.keep_best.mode == "max" else -1
        measured = [own for own in reversed(ordered) if not math.isnan(own.metrics.get(metric, math.nan))]
        best: dict[str, Checkpoint] = {}  # by stage, the latest of equals
        for own in measured:
            if own.stage not in best or sign * own.metrics[metric] >= sign * best[own.stage].metrics[metric]:
                best[own.stage] = own
        kept |= {own.url for own in best.values()}
    return kept


class Retention:
    """Applies the retention policy to the checkpoints in the folder `url`, for the start that owns the run."""

    def __init__(self, storage: Storage, url: str, config: CheckpointConfig, ownership: Ownership):
        self._storage, self._url, self._config, self._ownership = storage, url, config, ownership
        self._start = ownership.start or NO_START
        self._read: dict[str, Checkpoint] = {}  # committed checkpoints whose manifests were read
        self._sealed: set[str] = set()  # uncommitted folders that were sealed at an earlier checkpoint
        self.kept: tuple[Checkpoint, ...] = ()  # as of the last commit

    def apply(self, newest: Checkpoint | None, files: Mapping[str, Record] | None = None) -> None:
        """Remove the checkpoints that `newest`, just committed with `files`, makes obsolete, and unfinished ones.

        Without `files`, at the start of a run, remove what earlier attempts left unfinished; `newest` is then the
        checkpoint from which the run resumes. Raises StorageError if the new checkpoint is incomplete: on a store that
        creates objects in two steps, another attempt may have deleted its files. Raises Superseded, having deleted
        nothing, if a later start owns the run.
        """
        missing = ""
        try:
            if newest is not None and files is not None:
                missing = committed.describe_missing(self._storage, newest.url, files)
            self._ownership.check()
            if files is None:
                count = self._storage.abort_uploads(self._url, lambda name: self._is_ours(name.partition("/")[0]))
                if count:
                    log.warning("%s: aborted %d unfinished multipart uploads of earlier attempts", self._url, count)
            if newest is not None and not missing:
                if files is not None:
                    self._remove_obsolete(newest)
                self._remove_partial(newest)
        except StorageError as error:
            log.warning("%s: obsolete or unfinished checkpoints could not be removed: %s", self._url, error)
        if newest is not None and missing:
            self._storage.delete(join(newest.url, COMMIT))
            raise StorageError(f"{newest.url}: the commit was withdrawn: {missing}")

    def _remove_obsolete(self, newest: Checkpoint) -> None:
        self._read[newest.url] = newest
        urls = [url for url in newest_first(self._storage, self._url) if committed.is_committed(self._storage, url)]
        for url in (url for url in urls if url not in self._read):
            try:
                manifest = committed.read_manifest(self._storage, url)
                missing = committed.describe_missing(self._storage, url, manifest["files"])
                self._read[url] = replace(Checkpoint.of(url, manifest), is_complete=not missing)
            except CheckpointError:
                step, _, _ = parse_name(split(url)[1]) or (0, NO_START, 0)
                self._read[url] = Checkpoint(url, step, is_complete=False)
        kept = select_kept([self._read[url] for url in urls], newest, self._config)
        for url in urls:
            if url not in kept and self._is_ours(split(url)[1]):
                self._remove(url)
                self._read.pop(url)
        self.kept = tuple(self._read[url] for url in urls if url in kept)
        best = self._config.keep_best
        if best is not None and best.metric not in newest.metrics:
            recorded = ", ".join(sorted(newest.metrics)) or "none"
            log.warning("checkpoint.keep_best.metric: '%s' is not recorded; available: %s", best.metric, recorded)

    def _remove_partial(self, newest: Checkpoint) -> None:
        """Remove folders of attempts that never committed, at steps up to that of a committed checkpoint."""
        for url in newest_first(self._storage, self._url):
            step, start, _ = parse_name(split(url)[1]) or (0, NO_START, 0)
            if step > newest.step or start > self._start or committed.is_committed(self._storage, url):
                continue
            # Another start's writer may be about to commit: the seal decides, and is kept until the next checkpoint.
            is_final = start in (self._start, NO_START) or url in self._sealed
            if is_final or committed.seal(self._storage, url, f"given up by {self._start}"):
                self._storage.abort_uploads(url)
                self._remove(url, keep=None if is_final else SEAL)
                log.warning("%s: removed an unfinished checkpoint", url)
            self._sealed = self._sealed - {url} if is_final else self._sealed | {url}

    def _remove(self, url: str, keep: str | None = None) -> None:
        """Delete a checkpoint's files except `keep`, COMMIT.json first: no partly deleted one looks complete."""
        self._storage.delete(join(url, COMMIT))
        names = self._storage.list(url)
        if foreign := [name for name in names if not _FILE.fullmatch(name)]:
            log.warning("%s: not removed, because it contains other files: %s", url, ", ".join(foreign))
        if spared := {*foreign, keep} & set(names):
            for name in sorted(set(names) - spared):
                self._storage.delete(join(url, name))
        else:
            self._storage.delete(url)

    def _is_ours(self, name: str) -> bool:
        """Return whether a folder is a checkpoint of this start or of one it has superseded."""
        key = parse_name(name)
        return key is not None and key[1] <= self._start
