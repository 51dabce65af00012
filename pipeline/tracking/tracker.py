"""Tracking as the rest of the code sees it: appending to a local journal, which another process ships to MLflow.

Nothing here waits for a server (contract C6). `metrics` is one line appended to a file; the shipper is a process
of its own (`mlflow_process`) because the import of mlflow and its Python work, run as a thread of the trainer,
take the interpreter lock from it: measured, steps four times as long while mlflow is imported, and single steps
0.3 s late. As a process it costs them nothing.

Faults of tracking are told in one warning line and never raised, except by `Tracker.open`, which runs before
training starts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import posixpath
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec

from pipeline.config.durable import write_durably
from pipeline.config.redaction import describe_error, redact
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.tracking.committed import CommittedJournal, Store
from pipeline.tracking.describe import (
    CONFIG_TAG,
    clean_key,
    environment_tags,
    note_of_run,
    note_of_stage,
    recipe_hash,
    resolved_config,
    split_changeable,
)
from pipeline.tracking.journal import (
    CHECKPOINT,
    EVALUATION,
    HAND_OVER,
    HighWater,
    Journal,
    JournalWriter,
)
from pipeline.tracking.places import (
    RUN_FILE,
    committed_journal,
    experiment_of,
    journal_folder,
    run_of,
    tracking_uri,
    writing,
)
from pipeline.tracking.recorder import DatasetInput, Kept, Status
from pipeline.tracking.records import Record, check_artifact_name, encode_number
from pipeline.tracking.shipper import Shipper

logger = logging.getLogger("mome.tracking")

OF_WEIGHTS = ("train/", EVALUATION)  # begin the keys that say how good weights are
P = ParamSpec("P")


def _told_not_raised(method: Callable[P, None]) -> Callable[P, None]:
    """Tracking never stops training: whatever goes wrong becomes a warning."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:  # any fault at all
            logger.warning("tracking: %s failed and was passed over: %s", method.__name__, describe_error(error))

    return guarded


class RecentPoints:
    """The points of the last steps and of every evaluation, as they were recorded: what kept weights are told with."""

    _STEPS = 256

    def __init__(self) -> None:
        self._recent: OrderedDict[int, list[Record]] = OrderedDict()
        self._evaluations: dict[int, list[Record]] = {}

    def observe(self, record: Record) -> None:
        if record["kind"] == "rewind":
            self._rewind(record["stage"], record["step"])
        if record["kind"] != "metrics":
            return
        step = record["step"]
        self._recent.setdefault(step, []).append(record)
        if any(key.startswith(EVALUATION) for key in record["values"]):
            self._evaluations.setdefault(step, []).append(record)
        if len(self._recent) > self._STEPS:
            self._recent.popitem(last=False)

    def _rewind(self, stage: int, step: int) -> None:
        for points in (self._recent, self._evaluations):
            for later in [key for key in points if key > step]:
                points[later] = [record for record in points[later] if record["stage"] != stage]

    def at(self, step: int, stage: int) -> list[dict[str, Any]]:
        """What is known of the weights of a global step: each point's stage (or None), key, value and time."""
        records = self._recent.get(step) or self._evaluations.get(step) or []
        return [
            {"stage": record["stage"], "key": key, "value": value, "at": record["at"]}
            for record in records
            if record["stage"] in (stage, None)
            for key, value in record["values"].items()
            if key.startswith(OF_WEIGHTS)
        ]


class History:
    """What the sessions before this one recorded."""

    def __init__(self, journal: Journal):
        self.seen = HighWater()
        self.points = RecentPoints()
        self.checkpoints: dict[str, int] = {}  # those that are kept: URL -> the index of their stage
        self.origins: dict[int, str] = {}  # what each stage started from when it last began anew
        self.stage_starts: dict[int, int] = {}
        self.stage_keys: dict[int, dict[str, str]] = {}  # the changeable keys with which each stage last began
        self.training_sessions = 0  # those that began a stage; an evaluation begins none
        for session in journal.sessions():
            begun = self._observe(journal, session)
            self.training_sessions += begun > 0

    def _observe(self, journal: Journal, session: str) -> int:
        begun = 0
        for _, record in journal.records(session):
            self.seen.observe(record)
            self.points.observe(record)
            if record["kind"] == "model" and record["role"] == CHECKPOINT:
                self.checkpoints[record["url"]] = record["stage"]
            elif record["kind"] == "model_gone":
                self.checkpoints.pop(record["url"], None)
            elif record["kind"] == "stage":
                begun += 1
                self.origins[record["stage"]] = record["tags"].get("start_from", "random")
                self.stage_starts[record["stage"]] = self.stage_starts.get(record["stage"], 0) + 1
                self.stage_keys[record["stage"]] = _keys_of(record["tags"])
        return begun


def _keys_of(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key.startswith(CONFIG_TAG)}


class Tracker:
    """Records one process's part of a run. Made by `Tracker.open`; the first rank of training has one."""

    def __init__(self, config: RunConfig, journal: Journal, writer: JournalWriter, history: History, shipper: Shipper):
        self._config = config
        self._journal = journal
        self._writer = writer
        self._seen = history.seen
        self._history = history
        self._shipper = shipper
        self._committed: CommittedJournal | None = None
        self._stage: int | None = None
        self._trained = False  # a stage was begun
        self._last = 0  # time of the last record
        self._replaying = False

    @classmethod
    def open(cls, config: RunConfig, storage: Store, attempt_tags: dict[str, str] | None = None) -> Tracker:
        """Continue the run's journal, or begin it, and start shipping it.

        `attempt_tags` describe this start (world size, attempt, submission id, …) and are put on the parent run.
        Raises StorageError or TrackingError when the run's folder cannot be reached or the journal's not be written.
        """
        journal = Journal(journal_folder(config.folder))
        committed = committed_journal(config.folder, storage)
        run, known = _run_id(config, storage)
        with writing(journal):
            if any(campaign["run"] != run for campaign in journal.campaigns()):
                journal.discard()
            if committed is not None:
                committed.restore(journal)
            lost = known and not journal.sessions()
            history = History(journal)
            writer = journal.start_session()
        tags = environment_tags() | {key: str(value) for key, value in (attempt_tags or {}).items()}
        writer.append(_campaign_record(config, run, tags, server_has_more=journal.was_restored or lost))
        journal.goes_on()
        tracker = cls(config, journal, writer, history, Shipper(journal, writer, config))
        tracker._committed = committed
        tracker.artifact("config.yaml", resolved_config(config).encode())
        return tracker

    @_told_not_raised
    def begin_stage(self, index: int, stage: StageConfig, tags: dict[str, str], datasets: list[DatasetInput]) -> None:
        """What follows belongs to stage `index`, until `end_stage`. A stage begun before is continued."""
        values = stage.model_dump(mode="json")
        params, changing = split_changeable(values, f"stages.{index}")
        before = self._history.stage_keys.get(index, changing)
        which = {"stage": stage.name, "stage_index": str(index)}
        tags = which | {key: redact(str(value)) for key, value in tags.items()} | changing
        if "resumed_at" in tags:  # a run that was started from may have gone on since
            tags["start_from"] = self._history.origins.get(index, tags.get("start_from", "random"))
        tags["mlflow.note.content"] = note_of_stage(stage, tags.get("start_from", "random"))
        tags["attempt"] = str(self._history.training_sessions + 1)
        if starts := self._history.stage_starts.get(index, 0):
            tags["mome.restarts"] = str(starts)
        self._stage = None
        self.tag("attempt", str(self._history.training_sessions + 1))
        if self._history.training_sessions:
            self.tag("mome.restarts", str(self._history.training_sessions))
        self._stage, self._trained = index, True
        self._replaying = False
        inputs = [asdict(dataset) for dataset in datasets]
        self._append("stage", name=stage.name, params=params, tags=tags, datasets=inputs)
        if any(before.get(key, value) != value for key, value in changing.items()):  # another rate: another run
            self.rewind(int(tags.get("resumed_at", self._config.stage_start(index))))
        self._history.stage_keys[index] = changing

    @_told_not_raised
    def rewind(self, step: int) -> None:
        """The stage goes back to the global `step`, and from there another way than before: record it anew."""
        assert self._stage is not None
        highest = self._seen.of_stage(self._stage)
        if highest <= step:
            return
        record = self._append("rewind", step=int(step))
        self._last += 1  # of two points of one step, MLflow shows the later one
        self._seen.observe(record)
        self._history.points.observe(record)
        self.tag("mome.recorded_anew_from_step", str(step))
        self.tag("mome.recorded_anew_below_step", str(highest))

    @_told_not_raised
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One point a key at the global optimiser step. Replayed steps are left out: the first points stand."""
        encoded = {clean_key(key): encode_number(value) for key, value in values.items()}
        highest = self._seen.of_stage(self._stage) if self._stage is not None and not self._replaying else -1
        fresh = self._seen.fresh(self._stage, step, encoded)
        if len(fresh) < len(encoded) and step <= highest:
            self._replaying = True
            self.tag("mome.resumed_at_step", str(step))
            self.tag("mome.resumed_below_step", str(highest))
        if fresh:
            self._history.points.observe(self._append("metrics", step=int(step), values=fresh))

    @_told_not_raised
    def tag(self, key: str, value: str) -> None:
        self._append("tag", key=clean_key(key), value=str(value))

    @_told_not_raised
    def artifact(self, name: str, content: str | Path | bytes) -> None:
        """Keep bytes, or a copy of a local file, under `name` (may hold folders: 'report/index.html')."""
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        check_artifact_name(name)
        file = f"{hashlib.sha256(data).hexdigest()[:16]}/{posixpath.basename(name)}"
        path = self._journal.file(file)
        if path is None:
            raise ValueError(f"{name!r} cannot be the name of an artifact")
        if not path.exists():
            write_durably(path, data)
        self._append("artifact", name=name, file=file)

    @_told_not_raised
    def keeps(self, checkpoints: Sequence[Kept]) -> None:
        """The run's checkpoints as they now are: of those before, the ones that are not named are gone."""
        known, now = self._history.checkpoints, {redact(each.url): each for each in checkpoints}
        for url in known.keys() - now.keys():
            self._append("model_gone", stage=known.pop(url), url=url)
        for url, each in now.items():
            if url not in known:
                self._append_model(each, CHECKPOINT)
                known[url] = each.stage

    @_told_not_raised
    def hands_over(self, weights: Kept) -> None:
        """The stage's own weights, which the next one, an evaluation or an export starts from."""
        self._append_model(weights, HAND_OVER)

    def _append_model(self, kept: Kept, role: str) -> None:
        points = self._history.points.at(kept.step, kept.stage)
        self._append("model", stage=kept.stage, step=kept.step, url=redact(kept.url), role=role, points=points)

    @_told_not_raised
    def end_stage(self, status: Status = "FINISHED") -> None:
        self._append("stage_end", status=status)
        self._stage = None
        self._shipper.wake()

    @_told_not_raised
    def finish(self, status: Status = "FINISHED") -> None:
        """The campaign is over, and so, with the same status, is a stage still open. `close` is still due."""
        if self._stage is not None:
            self.end_stage(status)
        self._append("campaign_end", status=status)

    @_told_not_raised
    def commit(self, step: int) -> None:
        """Make the journal so far as durable as the run's storage; call before the checkpoint of `step` is committed,
        so that a restart from that checkpoint, on any node, has every point up to it."""
        self._writer.sync()
        if self._committed is not None:
            self._committed.commit(self._journal)

    @_told_not_raised
    def close(self, timeout: float = 20.0) -> None:
        """Ship what is left, for at most `timeout` seconds; `mome sync` ships the rest later.

        What never trained, such as an evaluation of imported weights, ends here: no training will end it.
        """
        if not self._trained and not self._history.training_sessions:
            self.finish()
        self.commit(-1)
        try:
            self._shipper.close(timeout)
        finally:
            self._writer.close()

    @_told_not_raised
    def abandon(self) -> None:
        """Stop at once, without last words, instead of `close`: another process records this run now."""
        self._shipper.abandon()
        self._writer.close()

    def _append(self, kind: str, **values: Any) -> Record:
        self._last = max(_now(), self._last)
        record = {"kind": kind, "at": self._last, "stage": self._stage, **values}
        self._writer.append(record)
        return record


def _now() -> int:
    return time.time_ns() // 1_000_000


def _run_id(config: RunConfig, storage: Store) -> tuple[str, bool]:
    """The run's id, kept in its folder from its first start on, and whether there was one already."""
    known = run_of(config, storage)
    if known is not None:
        return known, True
    run = uuid.uuid4().hex
    storage.write(f"{config.folder}/{RUN_FILE}", json.dumps({"run": run, "name": config.name}).encode())
    return run, False


def _campaign_record(config: RunConfig, run: str, tags: dict[str, str], server_has_more: bool) -> Record:
    """`server_has_more`: this journal was lost here, and the server may have later points than what is left of it."""
    params, changing = split_changeable(config.model_dump(mode="json"))
    uri = redact(tracking_uri(config))
    own = {"recipe_hash": recipe_hash(config), "mlflow.note.content": redact(note_of_run(config))}
    return {
        "kind": "campaign", "at": _now(), "stage": None, "run": run, "name": config.name, "uri": uri,
        "experiment": experiment_of(config), "params": params, "tags": tags | own | changing, "datasets": [],
        "server_has_more": server_has_more,
    }  # fmt: skip
