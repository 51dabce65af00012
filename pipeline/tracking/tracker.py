"""Run tracking: an append-only local journal, which a separate process uploads to MLflow.

No call waits for a server (contract C6). Uploads need their own process, because mlflow holds the interpreter lock: as
a thread, its import made steps up to four times as long, and its work delayed single steps by 0.3 s.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import posixpath
import secrets
import time
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec

from pipeline.config.durable import write_durably
from pipeline.config.redaction import describe_error, redact
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.tracking import describe, locations
from pipeline.tracking import journal as records
from pipeline.tracking.uploader import Uploader

if TYPE_CHECKING:
    from pipeline.data.storage import Storage

logger = logging.getLogger("mome.tracking")

QUALITY_PREFIXES = ("train/", records.EVALUATION)  # prefixes of the metrics that are attached to saved weights
RECENT_STEPS = 256  # whose metrics are kept, with those of every evaluation, to annotate saved weights
P = ParamSpec("P")


class SavedWeights(NamedTuple):
    """Weights in the run's storage: URL, global step, stage index."""

    url: str
    step: int
    stage: int


class History:
    """State derived from a journal's records, both of earlier sessions and of this one.

    A point of a stage at or below the highest step of its key is a replay, and since a resumed run equals the
    uninterrupted run (C4), the first point counts; a rewind lowers the highest step. Points outside stages (evaluations
    of any checkpoint, in any order) are replays only if step and value are equal.
    """

    def __init__(self, journal: records.Journal):
        self.last_steps: defaultdict[int, dict[str, int]] = defaultdict(dict)  # stage -> key -> highest step
        self._outside_stages: set[tuple[str, int, float | str]] = set()
        self.recent: OrderedDict[int, list[records.Record]] = OrderedDict()  # metrics records by step
        self.evaluations: dict[int, list[records.Record]] = {}
        self.checkpoints: dict[str, int] = {}  # retained checkpoints: URL -> stage index
        self.origins: dict[int, str] = {}  # weights from which each stage last started
        self.stage_starts: Counter[int] = Counter()
        self.stage_keys: dict[int, dict[str, str]] = {}  # changeable config keys of each stage's last start
        self.training_sessions = 0  # sessions that began a stage; evaluations do not count
        for session in journal.sessions():
            has_trained = False
            for _, record in journal.records(session):
                self.observe(record)
                if record["kind"] == "stage":
                    stage, tags, has_trained = record["stage"], record["tags"], True
                    self.origins[stage] = tags.get("start_from", "random")
                    self.stage_starts[stage] += 1
                    self.stage_keys[stage] = {key: tags[key] for key in tags if key.startswith(describe.CONFIG_TAG)}
            self.training_sessions += has_trained

    def observe(self, record: records.Record) -> None:
        """Update points and checkpoints from a record."""
        kind, stage, step = record["kind"], record["stage"], record.get("step", 0)
        if kind == "metrics":
            self.keep_new(stage, step, record["values"])
            self.recent.setdefault(step, []).append(record)
            if any(key.startswith(records.EVALUATION) for key in record["values"]):
                self.evaluations.setdefault(step, []).append(record)
            if len(self.recent) > RECENT_STEPS:
                self.recent.popitem(last=False)
        elif kind == "rewind":
            self.last_steps[stage] = {key: min(last, step) for key, last in self.last_steps[stage].items()}
            for by_step in (self.recent, self.evaluations):
                for later in [other for other in by_step if other > step]:
                    by_step[later] = [point for point in by_step[later] if point["stage"] != stage]
        elif kind == "model" and record["role"] == records.CHECKPOINT:
            self.checkpoints[record["url"]] = stage
        elif kind == "model_gone":
            self.checkpoints.pop(record["url"], None)

    def keep_new(self, stage: int | None, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values that are not replays, and count them as recorded."""
        if stage is None:
            points = {(key, step, value) for key, value in values.items()} - self._outside_stages
            self._outside_stages |= points
            return {key: value for key, value in values.items() if (key, step, value) in points}
        last_steps = self.last_steps[stage]
        new = {key: value for key, value in values.items() if step > last_steps.get(key, -1)}
        last_steps.update(dict.fromkeys(new, step))
        return new


def log_exceptions(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Turn exceptions of a tracking method into warnings; do not call it if the tracker was not opened."""

    @functools.wraps(method)
    def guarded(self: Tracker, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            if self.is_recording:
                method(self, *args, **kwargs)
        except Exception as error:
            logger.warning("tracking: %s failed and was skipped: %s", method.__name__, describe_error(error))

    return guarded


class Tracker:
    """Records a run in rank 0; other ranks' `Tracker()` records nothing. Errors are only logged, except by `open`."""

    is_recording = False
    _config: RunConfig
    _journal: records.Journal
    _committed: records.CommittedJournal
    _history: History
    _writer: records.JournalWriter
    _uploader: Uploader
    _stage: int | None = None
    _has_trained = False  # True once this session has started a stage
    _last_time = 0  # of the last record, in milliseconds
    _replaying = False

    @classmethod
    def open(cls, config: RunConfig, storage: Storage, attempt_tags: Mapping[str, str] = {}) -> Tracker:
        """Open the journal, tag the parent run, and start the upload. Raises StorageError, TrackingError."""
        tracker = cls()
        tracker._config, tracker.is_recording = config, True
        tracker._journal = journal = records.Journal(locations.journal_folder(config.folder))
        tracker._committed = records.CommittedJournal(storage, config.folder)
        known = locations.read_run_id(config, storage)
        run = known or uuid.uuid4().hex
        if known is None:
            content = json.dumps({"run": run, "name": config.name}).encode()
            storage.write(f"{config.folder}/{locations.RUN_FILE}", content)
        with locations.journal_write_errors(journal):
            if any(record["run"] != run for record in journal.run_records()):
                aside = journal.folder.with_name(f"{journal.folder.name}.{secrets.token_hex(4)}.old")
                journal.folder.rename(aside)
                message = "the journal in %s belongs to an earlier run of this name and was moved to %s"
                logger.warning(message, journal.folder, aside)
            tracker._committed.restore(journal)
            was_lost = known is not None and not journal.sessions()
            tracker._history = History(journal)
            tracker._writer = records.JournalWriter(journal)
        params, changeable = describe.split_changeable(config.model_dump(mode="json"))
        marker = journal.folder / records.RESTORED
        tracker._append(
            "run", run=run, name=config.name, uri=redact(locations.tracking_uri(config)),
            experiment=locations.experiment_name(config), params=params, datasets=[],
            tags=describe.run_tags(config) | {key: str(value) for key, value in attempt_tags.items()} | changeable,
            server_has_more=marker.exists() or was_lost,  # it may hold later points than this journal
        )  # fmt: skip
        marker.unlink(missing_ok=True)
        tracker._uploader = Uploader(journal, tracker._writer, config)
        tracker.artifact("config.yaml", describe.config_yaml(config).encode())
        return tracker

    @log_exceptions
    def begin_stage(
        self, index: int, stage: StageConfig, tags: dict[str, str], datasets: list[records.Dataset]
    ) -> None:
        """Assign the following records to stage `index`, until `end_stage`. A stage that began before is resumed."""
        history, attempt = self._history, str(self._history.training_sessions + 1)
        params, changeable = describe.split_changeable(stage.model_dump(mode="json"), f"stages.{index}")
        previous = history.stage_keys.get(index, changeable)
        tags = {key: redact(str(value)) for key, value in tags.items()}
        tags = {"stage": stage.name, "stage_index": str(index)} | tags | changeable
        if "resumed_at" in tags:  # keep the original weights: the run named by `start_from` may have advanced since
            tags["start_from"] = history.origins.get(index, tags.get("start_from", "random"))
        origin = tags.get("start_from", "random")
        tags["mlflow.note.content"] = (
            f"**{stage.name}**: {', '.join(stage.objectives)} from {describe.sources_text(stage)}; "
            f"{stage.steps:,} steps of {stage.global_batch_size:,} samples. "
            f"Started from {'random weights' if origin == 'random' else origin}."
        )
        tags["attempt"] = attempt
        if starts := history.stage_starts[index]:
            tags["mome.restarts"] = str(starts)
        self._stage = None
        self.tag("attempt", attempt)
        if history.training_sessions:
            self.tag("mome.restarts", str(history.training_sessions))
        self._stage, self._has_trained, self._replaying = index, True, False
        self._append("stage", name=stage.name, params=params, tags=tags, datasets=datasets)
        if any(previous.get(key, value) != value for key, value in changeable.items()):
            # With another learning rate, for example, the repeated steps are not replays of the recorded ones.
            self.rewind(int(tags.get("resumed_at", self._config.stage_start(index))))
        history.stage_keys[index] = changeable

    @log_exceptions
    def rewind(self, step: int) -> None:
        """Void the stage's metrics beyond the global `step`, so that different ones can be recorded."""
        assert self._stage is not None
        highest = max(self._history.last_steps[self._stage].values(), default=-1)
        if highest > step:
            self._append("rewind", step=int(step))
            self._last_time += 1  # MLflow shows the later of two points of one step
            self.tag("mome.recorded_anew_from_step", str(step))
            self.tag("mome.recorded_anew_below_step", str(highest))

    @log_exceptions
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record one point per key at a global step. Points of replayed steps are dropped: the first ones count."""
        numbers = {describe.clean_key(key): float(value) for key, value in values.items()}
        encoded = {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
        highest = -1
        if self._stage is not None and not self._replaying:
            highest = max(self._history.last_steps[self._stage].values(), default=-1)
        new_values = self._history.keep_new(self._stage, step, encoded)
        if len(new_values) < len(encoded) and step <= highest:
            self._replaying = True
            self.tag("mome.resumed_at_step", str(step))
            self.tag("mome.resumed_below_step", str(highest))
        if new_values:
            self._append("metrics", step=int(step), values=new_values)

    @log_exceptions
    def tag(self, key: str, value: str) -> None:
        self._append("tag", key=describe.clean_key(key), value=str(value))

    @log_exceptions
    def artifact(self, name: str, content: str | Path | bytes) -> None:
        """Store bytes, or a copy of a local file, under `name`, which may contain folders ('report/index.html')."""
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        file = f"{hashlib.sha256(data).hexdigest()[:16]}/{posixpath.basename(name)}"
        if not records.ARTIFACT_NAME.match(name) or (path := self._journal.file(file)) is None:
            raise ValueError(f"{name!r} is not a valid artifact name, which is a relative path without '..'")
        if not path.exists():
            write_durably(path, data)
        self._append("artifact", name=name, file=file)

    @log_exceptions
    def log_checkpoints(self, checkpoints: Sequence[SavedWeights]) -> None:
        """Record the complete list of retained checkpoints; earlier ones missing from it are recorded as deleted."""
        known, current = set(self._history.checkpoints), {redact(weights.url): weights for weights in checkpoints}
        for url in known - current.keys():
            self._append("model_gone", stage=self._history.checkpoints[url], url=url)
        for url, weights in current.items():
            if url not in known:
                self.log_weights(weights, records.CHECKPOINT)

    @log_exceptions
    def log_weights(self, weights: SavedWeights, role: str = records.FINAL_WEIGHTS) -> None:
        """Record weights: by default a stage's final ones, from which a stage, an evaluation or an export starts."""
        url, step, stage = weights
        points = [
            {"stage": record["stage"], "key": key, "value": value, "at": record["at"]}
            for record in self._history.recent.get(step) or self._history.evaluations.get(step) or []
            if record["stage"] in (stage, None)
            for key, value in record["values"].items()
            if key.startswith(QUALITY_PREFIXES)
        ]
        self._append("model", stage=stage, step=step, url=redact(url), role=role, points=points)

    @log_exceptions
    def end_stage(self, status: records.Status = "FINISHED") -> None:
        self._append("stage_end", status=status)
        self._stage = None
        self._uploader.send("upload")

    @log_exceptions
    def finish(self, status: records.Status = "FINISHED") -> None:
        """End the run, and a stage that is still open, with `status`. `close` must still be called."""
        if self._stage is not None:
            self.end_stage(status)
        self._append("run_end", status=status)

    @log_exceptions
    def commit(self) -> None:
        """Make the journal as durable as the run's storage; before a checkpoint, whose restart then has every point."""
        self._writer.sync()
        self._committed.commit(self._journal)

    @log_exceptions
    def close(self, timeout: float | None = 20.0) -> None:
        """Upload the remaining records for at most `timeout` seconds; `mome sync` uploads the rest later.

        None stops at once, without final records, because another process now records this run. A run that never
        trained, such as an evaluation of imported weights, is finished here.
        """
        if timeout is not None:
            if not self._has_trained and not self._history.training_sessions:
                self.finish()
            self.commit()
        try:
            self._uploader.close(timeout)
        finally:
            self._writer.close()

    def _append(self, kind: str, **values: Any) -> None:
        self._last_time = max(time.time_ns() // 1_000_000, self._last_time)
        record = {"kind": kind, "at": self._last_time, "stage": self._stage, **values}
        self._writer.append(record)
        self._history.observe(record)
