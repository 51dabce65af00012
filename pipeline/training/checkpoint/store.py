"""The checkpoints of one run: saved beside training, found again whole, kept and swept away as the config says.

Training stops for the copy to the host's memory. A thread of each rank then writes the rank's file; that of rank 0
waits until every rank's is there, commits, and clears up. The thread calls no collective, whose order among the
trainer's own nothing would fix: ranks tell rank 0 of their files by small records in the store. If any of them dies
meanwhile, the folder is never committed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.background import in_background
from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import NotFound, ObjectInfo, Storage, join
from pipeline.training.checkpoint.committed import Record, commit, read_manifest, seal, verify
from pipeline.training.checkpoint.host_copy import HostCopy
from pipeline.training.checkpoint.housekeeping import Housekeeping
from pipeline.training.checkpoint.retention import Known, folder_name, newest_first
from pipeline.training.checkpoint.saved_state import SavedState
from pipeline.training.checkpoint.tensor_file import TensorFile
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment
from pipeline.training.ownership import Ownership

log = logging.getLogger(__name__)

_FIRST_LOOK, _LONGEST_LOOK = 0.05, 2.0  # seconds between two looks for the other ranks' records
_LAG = 4.0  # a rank may take so many times as long as rank 0 did, and the store's deadline besides


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: the global step reached, and what the state was made from."""

    url: str
    step: int  # global steps done
    stage: str
    stage_step: int  # steps done in the stage
    plan_digest: str
    world_size: int
    zero_stage: int
    data_counts: dict[str, float]  # of the stage so far, by metric: samples read and found bad
    time_account: dict[str, float] = field(default_factory=dict)  # seconds of the run so far, by kind
    spikes: dict[str, Any] = field(default_factory=dict)  # see `spikes.SpikeGuard`


class CheckpointStore:
    """The checkpoints of one run, written and read by all its ranks together.

    `save`, `wait` and `latest` are collective. At most one save is under way. What goes wrong with it beside training
    is raised, as the error that it is, by the next `check`, `save` or `wait`.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        collectives: Collectives,
        config: CheckpointConfig,
        ownership: Ownership | None = None,
    ):
        """`ownership`: of the start that saves; without it nobody may have claimed the run."""
        self.storage = storage
        self.url = join(folder, "checkpoints")
        self.collectives = collectives
        self.config = config
        self.waited = 0.0  # seconds that the last `save` waited for the one before it
        self._copy = HostCopy(collectives.device)
        self._under_way: Future[None] | None = None
        self._abandoned = threading.Event()
        self._written: list[tuple[int, float]] = []
        self._ownership = ownership or Ownership(storage, folder, claim="")
        self._housekeeping = Housekeeping(storage, self.url, config, self._ownership)
        self._newest: Known | None = None  # that `latest` found

    # ---- saving

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Takes the memory that saves will need, so that the first does not stop training for longer than the next."""
        self._copy.reserve(fragments)

    def save(
        self,
        fragments: Iterable[Fragment],
        metadata: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> str:
        """Copy this rank's fragments; they are written and committed beside what follows. Returns the URL to be.

        `before_commit` is called on rank 0, by the thread that then commits. `metadata` says "step", "stage" and what
        else `Checkpoint` holds; its "metrics" are what `keep_best` compares.
        """
        name = self.collectives.broadcast_json(folder_name(metadata["step"], self._ownership.start))
        url = join(self.url, name)
        started = time.perf_counter()
        self._finish()
        self.waited = time.perf_counter() - started
        file = TensorFile(self._copy.take(fragments))
        metadata = {**metadata, "world_size": self.collectives.world_size}
        self._under_way = in_background(lambda: self._write(url, file, metadata, before_commit), "checkpoint")
        return url

    def check(self) -> None:
        """Raises what the save under way has died of, if it has."""
        if self.is_written():
            self._finish()

    def is_written(self) -> bool:
        """Whether this rank's thread has nothing left to do."""
        return self._under_way is None or self._under_way.done()

    def wait(self) -> None:
        """Returns when the last save is committed, on every rank."""
        self._finish()
        self.collectives.barrier()

    def written(self) -> list[tuple[int, float]]:
        """(step, seconds from the copy to the commit, or on other ranks to the file) of saves that ended."""
        ended, self._written = self._written, []
        return ended

    def kept(self) -> tuple[Known, ...]:
        """On rank 0, the run's checkpoints as the last commit left them; nothing before it."""
        return self._housekeeping.kept

    def close(self, seconds: float = 20.0) -> None:
        """End the thread: a save under way is given so long, then abandoned. What it raises is told, not raised."""
        if self._under_way is None:
            return
        try:
            self._under_way.result(seconds)
        except TimeoutError:  # of this waiting, or of rank 0's for the others
            self._abandoned.set()
            log.warning("the checkpoint being written was given up: it was not finished %.0f s after the run", seconds)
        except Exception as error:
            log.warning("the checkpoint being written was lost: %s", error)
        self._under_way = None

    def _finish(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    # ---- in the thread

    def _write(
        self, url: str, file: TensorFile, metadata: Mapping[str, Any], before_commit: Callable[[], None]
    ) -> None:
        started = time.perf_counter()
        rank = self.collectives.rank
        with ThreadPoolExecutor(1, "checksum") as hashing:
            record = hashing.submit(file.record)
            self.storage.write_parts(join(url, _part_name(rank)), file.size, self._unless_abandoned(file.read))
        if rank != 0:
            self.storage.write(join(url, _record_name(rank)), json.dumps(record.result()).encode())
        else:
            records = {_part_name(0): record.result()}
            records |= self._other_records(url, time.perf_counter() - started)
            self._stop_if_abandoned()  # who abandons it then closes what `before_commit` uses
            self._ownership.check()
            before_commit()
            commit(self.storage, url, records, metadata, lambda: self._seal(url))
            self._housekeeping.after_commit(Known.of(url, metadata), records)
        self._written.append((metadata["step"], time.perf_counter() - started))

    def _seal(self, url: str) -> None:
        """Raises Superseded, or StorageError when a later start has given the folder up."""
        self._ownership.check()
        if not seal(self.storage, url, f"committed by {self._ownership.start}"):
            self._ownership.check()
            raise StorageError(f"{url}: not committed: another attempt on this run has given it up")

    def _unless_abandoned(self, read: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        def part(start: int, stop: int) -> bytes:
            self._stop_if_abandoned()
            return read(start, stop)

        return part

    def _stop_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise RuntimeError("the checkpoint was given up")

    def _other_records(self, url: str, own_seconds: float) -> dict[str, Record]:
        """What the other ranks wrote, once they all did; rank 0's own file took `own_seconds`."""
        missing = list(range(1, self.collectives.world_size))
        patience = self.storage.config.retry_timeout_seconds + _LAG * own_seconds
        deadline, pause = time.monotonic() + patience, _FIRST_LOOK
        records: dict[str, Record] = {}
        with ThreadPoolExecutor(8, "records") as pool:
            while missing:
                found = dict(zip(missing, pool.map(lambda rank: self._record(url, rank), missing), strict=True))
                records |= {_part_name(rank): record for rank, record in found.items() if record is not None}
                missing = [rank for rank, record in found.items() if record is None]
                if missing and time.monotonic() > deadline:
                    ranks = ", ".join(map(str, missing))
                    raise TimeoutError(
                        f"{url}: not committed: rank {ranks} wrote nothing in {patience:.0f} s. "
                        "Is it alive, and is that folder the same on every node?"
                    )
                if missing:
                    self._abandoned.wait(pause)
                    self._stop_if_abandoned()
                pause = min(2 * pause, _LONGEST_LOOK)
        return dict(sorted(records.items()))

    def _record(self, url: str, rank: int) -> Record | None:
        try:
            return json.loads(self.storage.read(join(url, _record_name(rank))))
        except NotFound:
            return None

    # ---- finding

    def latest(self) -> tuple[Checkpoint, SavedState] | None:
        """The newest whole checkpoint, verified; a damaged one is told and passed over. The same on every rank."""
        # An attempt that this start supersedes may commit one more and retire what is looked at here: a second look
        # then finds its commit, and by then it deletes nothing any more.
        return self._newest_whole() or self._newest_whole()

    def _newest_whole(self) -> tuple[Checkpoint, SavedState] | None:
        first = self.collectives.rank == 0
        for url in self.collectives.broadcast_json(newest_first(self.storage, self.url) if first else None):
            manifest = self.collectives.broadcast_json(self._manifest(url) if first else None)
            files = None if manifest is None else self._verify(url, manifest["files"])
            if files is not None:
                names = ("step", "stage", "stage_step", "plan_digest", "world_size", "zero_stage", "data_counts")
                guards = {name: manifest.get(name, {}) for name in ("time_account", "spikes")}
                checkpoint = Checkpoint(url=url, **{name: manifest[name] for name in names}, **guards)
                self._newest = Known.of(url, manifest)
                return checkpoint, SavedState(self.storage, url, files, checkpoint.stage_step)
        return None

    def _manifest(self, url: str) -> dict[str, Any] | None:
        try:
            return read_manifest(self.storage, url)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
            return None

    def _verify(self, url: str, records: Mapping[str, Record]) -> dict[str, ObjectInfo] | None:
        """Every file's verified version, or None where one is damaged. Each rank reads its share of the files."""
        rank, world_size = self.collectives.rank, self.collectives.world_size
        found: dict[str, ObjectInfo] = {}
        faults = []
        for name in sorted(records)[rank::world_size]:
            try:
                found[name] = verify(self.storage, url, name, records[name])
            except CheckpointError as error:
                faults.append(str(error))
        shares = self.collectives.gather_json(({name: (i.size, i.etag) for name, i in found.items()}, faults))
        faults = [fault for _, part in shares for fault in part]
        if rank == 0:
            for fault in faults:
                log.warning("checkpoint passed over: %s", fault)
        return None if faults else {name: ObjectInfo(*info) for part, _ in shares for name, info in part.items()}

    def clear_up(self) -> None:
        """Remove what attempts before this one left unfinished. To be called after `latest`, before the first save."""
        if self.collectives.rank == 0:
            self._housekeeping.at_start(self._newest)


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _record_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
