"""The checkpoints of one run: saved asynchronously, verified when restored.

Training pauses only for the copy to host memory. A thread of each rank then writes the rank's file; that of rank 0
waits for the files of all ranks, commits, and applies the retention policy. The threads call no collective, because
nothing would order those relative to the trainer's: ranks report their files to rank 0 by small records in the store.
If a rank dies during this, the folder is never committed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.config.background import in_background
from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import NotFound, ObjectInfo, Storage, join
from pipeline.training.checkpoint.committed import Record, commit, read_manifest, seal, verify
from pipeline.training.checkpoint.retention import CheckpointInfo, Retention, folder_name, newest_first
from pipeline.training.checkpoint.serialization import HostCopy, SavedState, TensorFile
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment
from pipeline.training.ownership import Ownership

log = logging.getLogger(__name__)

_PART, _RECORD = "rank-{:05d}.safetensors", "rank-{:05d}.json"  # a rank's file, and its record for rank 0
_MIN_POLL, _MAX_POLL = 0.05, 2.0  # seconds between two queries for the other ranks' records
_MAX_LAG = 4.0  # ranks may take this multiple of rank 0's time, plus the storage's retry timeout


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's metadata: the progress of the run and what its state was made from."""

    url: str
    step: int  # global steps done
    stage: str
    stage_step: int  # steps done in the stage
    plan_digest: str
    data_counts: dict[str, float]  # of the stage so far, by metric
    time_account: dict[str, float] = field(default_factory=dict)  # seconds of the run so far, by phase
    spikes: dict[str, Any] = field(default_factory=dict)  # state of the SpikeGuard


class CheckpointStore:
    """Saves and restores the checkpoints of one run, by all its ranks together.

    `save`, `wait` and `latest` are collective. At most one save is in progress; its error, if any, is raised by the
    next `check`, `save` or `wait`.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        collectives: Collectives,
        config: CheckpointConfig,
        ownership: Ownership | None = None,
    ):
        """`ownership`: of the start that saves; without it the run must not have been claimed."""
        self.storage, self.url, self.collectives = storage, join(folder, "checkpoints"), collectives
        self.waited = 0.0  # seconds the last `save` waited for the previous one
        self.host_copy = HostCopy(collectives.device)
        self._in_progress: Future[None] | None = None
        self._abandoned = threading.Event()
        self._written: list[tuple[int, float]] = []
        self._ownership = ownership or Ownership(storage, folder, claim="")
        self.retention = Retention(storage, self.url, config, self._ownership)
        self._newest: CheckpointInfo | None = None  # set by `latest`

    def save(
        self,
        fragments: Iterable[Fragment],
        metadata: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> str:
        """Copy this rank's fragments and write them in the background. Returns the checkpoint's URL.

        `before_commit` is called on rank 0, by the thread that then commits. `metadata` holds "step", "stage" and the
        other fields of `Checkpoint`; its "metrics" are what `keep_best` compares.
        """
        url = join(self.url, self.collectives.broadcast_json(folder_name(metadata["step"], self._ownership.start)))
        started = time.perf_counter()
        self._finish()
        self.waited = time.perf_counter() - started
        file = TensorFile(self.host_copy.take(fragments))
        metadata = {**metadata, "world_size": self.collectives.world_size}
        self._in_progress = in_background(lambda: self._write(url, file, metadata, before_commit), "checkpoint")
        return url

    def is_written(self) -> bool:
        """Return whether this rank's thread has finished."""
        return self._in_progress is None or self._in_progress.done()

    def check(self) -> None:
        """Raise the error of the save in progress, if it has failed."""
        if self.is_written():
            self._finish()

    def wait(self) -> None:
        """Wait until the last save is committed on every rank."""
        self._finish()
        self.collectives.barrier()

    def written(self) -> list[tuple[int, float]]:
        """Return (step, seconds from the copy to the commit) of the saves that finished since the last call.

        On ranks other than 0 the time is that to the rank's own file.
        """
        finished, self._written = self._written, []
        return finished

    def close(self, seconds: float = 20.0) -> None:
        """Wait up to `seconds` for a save in progress, then abandon it. Its error is logged, not raised."""
        if self._in_progress is None:
            return
        try:
            self._in_progress.result(seconds)
        except TimeoutError:  # raised here, or by rank 0's wait for the other ranks
            self._abandoned.set()
            log.warning("the checkpoint in progress was abandoned: not written within %.0f s", seconds)
        except Exception as error:
            log.warning("the checkpoint in progress failed: %s", error)
        self._in_progress = None

    def _finish(self) -> None:
        if self._in_progress is not None:
            in_progress, self._in_progress = self._in_progress, None
            in_progress.result()

    def _write(
        self, url: str, file: TensorFile, metadata: Mapping[str, Any], before_commit: Callable[[], None]
    ) -> None:
        """Write this rank's file; on rank 0, wait for the others, commit, and apply the retention policy."""

        def read_part(start: int, stop: int) -> bytes:
            self._stop_if_abandoned()
            return file.read(start, stop)

        def seal_folder() -> None:
            """Raise Superseded, or StorageError if a later start has sealed the folder for removal."""
            self._ownership.check()
            if not seal(self.storage, url, f"committed by {self._ownership.start}"):
                self._ownership.check()
                raise StorageError(f"{url}: not committed: another attempt on this run is removing it")

        started = time.perf_counter()
        rank = self.collectives.rank
        with ThreadPoolExecutor(1, "checksum") as hashing:
            record = hashing.submit(file.record)
            self.storage.write_parts(join(url, _PART.format(rank)), file.size, read_part)
        if rank != 0:
            self.storage.write(join(url, _RECORD.format(rank)), json.dumps(record.result()).encode())
        else:
            records = {_PART.format(0): record.result()}
            records |= self._other_records(url, time.perf_counter() - started)
            self._stop_if_abandoned()  # `close` returns then, and the caller closes what `before_commit` uses
            self._ownership.check()
            before_commit()
            commit(self.storage, url, records, metadata, seal_folder)
            self.retention.apply(CheckpointInfo.of(url, metadata), records)
        self._written.append((metadata["step"], time.perf_counter() - started))

    def _stop_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise RuntimeError("the checkpoint was abandoned")

    def _other_records(self, url: str, own_seconds: float) -> dict[str, Record]:
        """Wait for the other ranks' file records; rank 0's own file took `own_seconds` to write."""

        def read(rank: int) -> Record | None:
            try:
                return json.loads(self.storage.read(join(url, _RECORD.format(rank))))
            except NotFound:
                return None

        missing = list(range(1, self.collectives.world_size))
        timeout = self.storage.config.retry_timeout_seconds + _MAX_LAG * own_seconds
        deadline, pause = time.monotonic() + timeout, _MIN_POLL
        records: dict[str, Record] = {}
        with ThreadPoolExecutor(8, "records") as pool:
            while missing:
                results = dict(zip(missing, pool.map(read, missing), strict=True))
                records |= {_PART.format(rank): record for rank, record in results.items() if record is not None}
                missing = [rank for rank, record in results.items() if record is None]
                if not missing:
                    break
                if time.monotonic() > deadline:
                    ranks = ", ".join(map(str, missing))
                    raise TimeoutError(
                        f"{url}: not committed: rank {ranks} wrote nothing within {timeout:.0f} s. "
                        "Check that the rank is alive and that every node sees the same folder."
                    )
                self._abandoned.wait(pause)
                self._stop_if_abandoned()
                pause = min(2 * pause, _MAX_POLL)
        return dict(sorted(records.items()))

    def latest(self) -> tuple[Checkpoint, SavedState] | None:
        """Return the newest complete checkpoint, verified and the same on every rank; damaged ones are logged."""
        # An attempt that this start supersedes may still commit one checkpoint and delete the one examined here. A
        # second search then finds that commit, after which the old attempt deletes nothing more.
        for _ in range(2):
            urls = newest_first(self.storage, self.url) if self.collectives.rank == 0 else None
            for url in self.collectives.broadcast_json(urls):
                manifest, files = self._verify(url)
                if manifest is not None:
                    names = {field.name for field in fields(Checkpoint)} & manifest.keys()
                    checkpoint = Checkpoint(**{name: manifest[name] for name in names} | {"url": url})
                    self._newest = CheckpointInfo.of(url, manifest)
                    return checkpoint, SavedState(self.storage, url, files, checkpoint.stage_step)
        return None

    def _verify(self, url: str) -> tuple[dict[str, Any] | None, dict[str, ObjectInfo]]:
        """Return the manifest, None if it or a file is damaged, and the verified version of every file.

        Each rank verifies a part of the files.
        """
        rank, world_size = self.collectives.rank, self.collectives.world_size
        manifest: dict[str, Any] | None = None
        if rank == 0:
            try:
                manifest = read_manifest(self.storage, url)
            except CheckpointError as error:
                log.warning("checkpoint skipped: %s", error)
        if (manifest := self.collectives.broadcast_json(manifest)) is None:
            return None, {}
        verified: dict[str, tuple[int, str | None]] = {}
        faults = []
        for name in sorted(manifest["files"])[rank::world_size]:
            try:
                info = verify(self.storage, url, name, manifest["files"][name])
                verified[name] = info.size, info.etag
            except CheckpointError as error:
                faults.append(str(error))
        results = self.collectives.gather_json((verified, faults))
        faults = [fault for _, part in results for fault in part]
        if rank == 0:
            for fault in faults:
                log.warning("checkpoint skipped: %s", fault)
        files = {name: ObjectInfo(*info) for part, _ in results for name, info in part.items()}
        return None if faults else manifest, files

    def remove_unfinished(self) -> None:
        """Remove what earlier attempts left unfinished. Call it after `latest` and before the first save."""
        if self.collectives.rank == 0:
            self.retention.apply(self._newest)
