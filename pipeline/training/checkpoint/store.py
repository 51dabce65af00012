"""The checkpoints of one run: saved asynchronously, verified when restored; and the callback that saves them.

Training pauses only for the copy to host memory. A thread of each rank then writes the rank's file; that of rank 0
waits for all files, commits, and applies the retention policy. The threads call no collective, because nothing would
order those relative to the trainer's: ranks report their files to rank 0 by small records in the store.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config.background import in_background
from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import ObjectInfo, Storage, join
from pipeline.tracking.tracker import SavedWeights
from pipeline.training.callbacks import Callback, StageResult, StepEvent
from pipeline.training.checkpoint import committed
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, NO_START, SEAL, Checkpoint, Record
from pipeline.training.checkpoint.serialization import HostCopy, SavedState, TensorFile
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment
from pipeline.training.metrics import total_data_counts
from pipeline.training.ownership import Ownership

if TYPE_CHECKING:
    from pipeline.training.loop import StageState

log = logging.getLogger(__name__)

_PART, _RECORD = "rank-{:05d}.safetensors", "rank-{:05d}.json"  # a rank's file, and its record for rank 0
_FILE = re.compile(rf"rank-\d{{5,}}\.(safetensors|json)|{'|'.join(map(re.escape, (MANIFEST, SEAL, COMMIT)))}")
_MIN_POLL, _MAX_POLL = 0.05, 2.0  # seconds between two queries for the other ranks' records
_MAX_LAG = 4.0  # ranks may take this multiple of rank 0's time, plus the storage's retry timeout


class CheckpointStore:
    """Saves and restores the checkpoints of one run; `save`, `wait` and `latest` are collective.

    At most one save is in progress; its error is raised by the next `check`, `save` or `wait`.
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
        self.host_copy = HostCopy(collectives.device)
        self.waited = 0.0  # seconds the last `save` waited for the previous one
        # (step, seconds from the copy to the commit) of finished saves; on ranks other than 0, to the rank's own file.
        self.written: list[tuple[int, float]] = []
        self._in_progress: Future[None] | None = None
        self._abandoned = threading.Event()
        self._ownership = ownership or Ownership(storage, folder, claim="")
        self.kept: tuple[Checkpoint, ...] = ()  # as of the last commit
        self._config, self._start = config, self._ownership.start or NO_START
        self._known: dict[str, Checkpoint] = {}  # committed checkpoints whose manifests were read
        self._sealed: set[str] = set()  # uncommitted folders that were sealed at an earlier checkpoint

    def save(
        self,
        fragments: Iterable[Fragment],
        metadata: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> str:
        """Copy this rank's fragments, write them in the background, and return the checkpoint's URL.

        `before_commit` is called by the thread that commits, on rank 0. `metadata` has the fields of `Checkpoint`.
        """
        # Names of one step and start are ordered by time.
        start = "" if self._ownership.start is None else f"{self._ownership.start}-"
        name = f"step-{metadata['step']:08d}.{start}{time.time_ns() // 1_000_000:x}"
        url = join(self.url, self.collectives.broadcast(name))
        started = time.perf_counter()
        self._finish()
        self.waited = time.perf_counter() - started
        file = TensorFile(self.host_copy.take(fragments))
        metadata = {**metadata, "world_size": self.collectives.world_size}
        self._in_progress = in_background(lambda: self._write(url, file, metadata, before_commit), "checkpoint")
        return url

    def check(self) -> bool:
        """Return whether this rank's thread has finished; raise the error of its save, if that has failed."""
        if self._in_progress is not None and not self._in_progress.done():
            return False
        self._finish()
        return True

    def wait(self) -> None:
        """Wait until the last save is committed on every rank."""
        self._finish()
        self.collectives.barrier()

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

        started, rank = time.perf_counter(), self.collectives.rank
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
            committed.commit(self.storage, url, records, metadata, self._ownership)
            self.clean(Checkpoint.of(url, metadata), records)
        self.written.append((metadata["step"], time.perf_counter() - started))

    def _stop_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise RuntimeError("the checkpoint was abandoned")

    def _other_records(self, url: str, own_seconds: float) -> dict[str, Record]:
        """Wait for the other ranks' file records; rank 0's own file took `own_seconds` to write."""
        ranks = range(1, self.collectives.world_size)
        timeout = self.storage.config.retry_timeout_seconds + _MAX_LAG * own_seconds
        deadline, pause = time.monotonic() + timeout, _MIN_POLL
        while ranks:
            names = set(self.storage.list(url))
            missing = [rank for rank in ranks if _RECORD.format(rank) not in names]
            if not missing:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{url}: not committed: rank {', '.join(map(str, missing))} wrote nothing within {timeout:.0f} s. "
                    "Check that the rank is alive and that every node sees the same folder."
                )
            self._abandoned.wait(pause)
            self._stop_if_abandoned()
            pause = min(2 * pause, _MAX_POLL)
        with ThreadPoolExecutor(8, "records") as pool:
            records = pool.map(self.storage.read, [join(url, _RECORD.format(rank)) for rank in ranks])
            return {_PART.format(rank): json.loads(data) for rank, data in zip(ranks, records, strict=True)}

    def latest(self) -> tuple[Checkpoint, SavedState] | None:
        """Return the newest complete checkpoint, verified and the same on every rank; damaged ones are logged."""
        # An attempt that this start supersedes may still commit one checkpoint and delete the one examined here. A
        # second search then finds that commit, after which the old attempt deletes nothing more.
        for _ in range(2):
            urls = list(committed.newest_first(self.storage, self.url)) if self.collectives.rank == 0 else None
            for url in self.collectives.broadcast(urls):
                manifest, files = self._verify(url)
                if manifest is not None:
                    return Checkpoint.of(url, manifest), SavedState(self.storage, url, files, manifest["stage_step"])
        return None

    def _verify(self, url: str) -> tuple[dict[str, Any] | None, dict[str, ObjectInfo]]:
        """Return the manifest, None if it or a file is damaged, and every file's version; ranks share the files."""
        rank, world_size = self.collectives.rank, self.collectives.world_size
        manifest: dict[str, Any] | None = None
        if rank == 0:
            try:
                manifest = committed.read_manifest(self.storage, url)
            except CheckpointError as error:
                log.warning("checkpoint skipped: %s", error)
        if (manifest := self.collectives.broadcast(manifest)) is None:
            return None, {}
        verified: dict[str, ObjectInfo] = {}
        faults = []
        for name in sorted(manifest["files"])[rank::world_size]:
            try:
                verified[name] = committed.verify(self.storage, url, name, manifest["files"][name])
            except CheckpointError as error:
                faults.append(str(error))
        results = self.collectives.gather_objects((verified, faults))
        faults = [fault for _, part in results for fault in part]
        if rank == 0:
            for fault in faults:
                log.warning("checkpoint skipped: %s", fault)
        return None if faults else manifest, {name: info for part, _ in results for name, info in part.items()}

    def clean(self, newest: Checkpoint | None, files: Mapping[str, Record] | None = None) -> None:
        """Remove the checkpoints that `newest`, just committed with `files`, makes obsolete, and unfinished ones.

        Without `files`, at the start of a run, remove only what earlier attempts left unfinished up to `newest`. Called
        on rank 0; never touches what a later start wrote. Storage failures are logged: they cost space only. Raises
        StorageError if the new checkpoint is incomplete: on a store that creates objects in two steps, another attempt
        may have deleted its files. Raises Superseded, having deleted nothing, if a later start owns the run.
        """
        missing = ""
        try:
            if newest is not None and files is not None:
                missing = committed.describe_missing(self.storage, newest.url, files)
            self._ownership.check()
            if files is None:  # those of this start's folders and of folders it has superseded
                count = self.storage.abort_uploads(
                    self.url,
                    lambda name: (
                        (key := committed.parse_name(name.partition("/")[0])) is not None and key[1] <= self._start
                    ),
                )
                if count:
                    log.warning("%s: aborted %d unfinished multipart uploads of earlier attempts", self.url, count)
            if newest is not None and not missing:
                if files is not None:
                    self._remove_obsolete(newest)
                for url, (step, start, _) in committed.newest_first(self.storage, self.url).items():
                    if step > newest.step or start > self._start or committed.is_committed(self.storage, url):
                        continue
                    # Another start may be about to commit: the seal decides, and is kept until the next checkpoint.
                    is_final = start in (self._start, NO_START) or url in self._sealed
                    if is_final or committed.seal(self.storage, url, f"given up by {self._start}"):
                        self.storage.abort_uploads(url)
                        self._remove(url, keep=None if is_final else SEAL)
                        log.warning("%s: removed an unfinished checkpoint", url)
                    self._sealed = self._sealed - {url} if is_final else self._sealed | {url}
        except StorageError as error:
            log.warning("%s: obsolete or unfinished checkpoints could not be removed: %s", self.url, error)
        if newest is not None and missing:
            self.storage.delete(join(newest.url, COMMIT))
            raise StorageError(f"{newest.url}: the commit was withdrawn: {missing}")

    def _remove_obsolete(self, newest: Checkpoint) -> None:
        self._known[newest.url] = newest
        keys = committed.newest_first(self.storage, self.url)
        urls = [url for url in keys if committed.is_committed(self.storage, url)]
        for url in (url for url in urls if url not in self._known):
            try:
                manifest = committed.read_manifest(self.storage, url)
                missing = committed.describe_missing(self.storage, url, manifest["files"])
                self._known[url] = replace(Checkpoint.of(url, manifest), is_complete=not missing)
            except CheckpointError:
                self._known[url] = Checkpoint(url, keys[url][0], is_complete=False)
        kept = committed.select_kept([self._known[url] for url in urls], newest, self._config)
        for url in urls:
            if url not in kept and keys[url][1] <= self._start:
                self._remove(url)
                self._known.pop(url)
        self.kept = tuple(self._known[url] for url in urls if url in kept)
        if (best := self._config.keep_best) is not None and best.metric not in newest.metrics:
            recorded = ", ".join(sorted(newest.metrics)) or "none"
            log.warning("checkpoint.keep_best.metric: '%s' is not recorded; available: %s", best.metric, recorded)

    def _remove(self, url: str, keep: str | None = None) -> None:
        """Delete a checkpoint's files except `keep`, COMMIT.json first: no partly deleted one looks complete."""
        self.storage.delete(join(url, COMMIT))
        names = self.storage.list(url)
        if foreign := [name for name in names if not _FILE.fullmatch(name)]:
            log.warning("%s: not removed, because it contains other files: %s", url, ", ".join(foreign))
        if spared := {*foreign, keep} & set(names):
            for name in sorted(set(names) - spared):
                self.storage.delete(join(url, name))
        else:
            self.storage.delete(url)


class Checkpointer(Callback):
    """Saves every `checkpoint.every` steps and on preemption, with the journal and the list of bad samples."""

    def on_stage_start(self, start: int) -> None:
        if self.state.stage.run.checkpoint.every < self.state.stage.steps - start:
            self.state.checkpoints.host_copy.reserve(self.state.engine.fragments())

    def after_step(self, event: StepEvent) -> None:
        num_steps, state, stage, context = event.step + 1, self.state, self.state.stage, self.state.context
        if stage.is_checkpoint_step(event.step) or (event.preempted and num_steps < stage.steps):
            step = stage.first_step + num_steps
            with context.supervisor.during("checkpoint", step - 1):
                started = time.perf_counter()
                quarantine = context.collectives.gather_objects(state.loader.quarantined())

                def before_commit() -> None:
                    self._write_quarantine(step, quarantine)
                    context.tracker.commit()

                metadata = checkpoint_metadata(state, num_steps) | {
                    "data_counts": total_data_counts(state.loader, state.data_counts, context.collectives),
                    "metrics": state.metrics,
                    "shapes": state.shapes,
                }
                state.checkpoints.save(state.engine.fragments(), metadata, before_commit)
                stall = time.perf_counter() - started
                context.tracker.metrics(step, {"ckpt/stall_s": stall, "ckpt/wait_s": state.checkpoints.waited})
                self._record_finished_saves()
                if event.preempted:
                    state.checkpoints.wait()
        state.checkpoints.check()

    def on_stage_end(self, result: StageResult) -> None:
        """Wait for the save in progress, so that a rollback does not depend on how fast the store is."""
        state, context = self.state, self.state.context
        step = state.stage.first_step + result.num_steps
        context.supervisor.enter("checkpoint", step)
        state.checkpoints.wait()
        self._record_finished_saves()
        if result.num_steps == state.stage.steps:
            if context.collectives.rank == 0:
                context.ownership.check()
            self._write_quarantine(step, context.collectives.gather_objects(state.loader.quarantined()))

    def _record_finished_saves(self) -> None:
        """Record how long finished saves took and which checkpoints the run now keeps."""
        state, tracker = self.state, self.state.context.tracker
        finished = [state.checkpoints.written.pop(0) for _ in range(len(state.checkpoints.written))]
        for step, seconds in finished:
            tracker.metrics(step, {"ckpt/write_s": seconds})
        if finished:
            names = [stage.name for stage in state.stage.run.stages]
            kept = [own for own in state.checkpoints.kept if own.stage]
            tracker.log_checkpoints([SavedWeights(own.url, own.step, names.index(own.stage)) for own in kept])

    def _write_quarantine(self, step: int, records_by_rank: list[list[dict[str, Any]]]) -> None:
        """Write the bad samples that any rank replaced to the run's folder as JSON lines, on rank 0."""
        stage, context = self.state.stage, self.state.context
        records = [record for records in records_by_rank for record in records]
        if records and context.collectives.rank == 0:
            lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()
            name = f"quarantine/{stage.index}-{stage.name}-{step:08d}.jsonl"
            context.storage.write(url := join(stage.run.folder, name), lines)
            context.tracker.artifact(name, lines)
            log.warning("%d bad samples were replaced; see %s", len(records), url)


def checkpoint_metadata(state: StageState, num_steps: int) -> dict[str, Any]:
    """Return the metadata that checkpoints and final weights share, after `num_steps` steps of the stage."""
    stage = state.stage
    return {
        "step": stage.first_step + num_steps,
        "stage": stage.name,
        "stage_step": num_steps,
        "plan_digest": state.loader.digest,
        "zero_stage": stage.run.engine.zero_stage,
        "config": stage.run.model_dump(mode="json"),
        "time_account": state.context.supervisor.goodput.seconds(),
        "spikes": state.spikes.state(),
    }
