"""A finished or running run, read from its folder: config, journal, time account, restarts, quarantine.

Neither weights nor data nor an MLflow server are needed. For a remote folder the committed journal is read.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.config.stored import RecordedLocation, parse_config, stored_config
from pipeline.data.storage import Storage, join
from pipeline.tracking.journal import EVALUATION, Journal, Record
from pipeline.tracking.lease import is_held
from pipeline.tracking.locations import read_journal
from pipeline.training import goodput
from pipeline.training.prepare import RUN_FILE

MAX_SECONDS = 1e12  # of one phase; more is damage

log = logging.getLogger(__name__)

Values = dict[str, Any]


@dataclass(frozen=True)
class MetricPoint:
    """Metrics that were recorded together."""

    at: int  # milliseconds since 1970
    step: int  # global
    values: dict[str, float]


@dataclass
class StageRecord:
    """A stage's records from all sessions."""

    name: str
    points: list[MetricPoint] = field(default_factory=list)
    starts: list[Record] = field(default_factory=list)  # its `stage` records, one per start
    tags: dict[str, str] = field(default_factory=dict)  # the last value of each
    status: str = ""  # empty while the stage is running or after it was interrupted

    @property
    def reached(self) -> int | None:
        """The highest recorded step. A checkpoint's points are recorded late, after those of later steps."""
        return max((point.step for point in self.points), default=None)

    @property
    def samples_per_second(self) -> float | None:
        """The median throughput."""
        speeds = [value for _, _, value in self.series("perf/samples_per_s")]
        return statistics.median(speeds) if speeds else None

    def last(self, metric: str) -> float | None:
        return next((p.values[metric] for p in reversed(self.points) if metric in p.values), None)

    def series(self, metric: str) -> list[tuple[int, int, float]]:
        """Return (milliseconds, step, value) of one metric."""
        return [(p.at, p.step, p.values[metric]) for p in self.points if metric in p.values]


@dataclass(frozen=True)
class Session:
    """The first and last record of a process that trained, in milliseconds, and its tags."""

    start: int
    end: int
    tags: dict[str, str]


@dataclass(frozen=True)
class Tag:
    """A tag of the run or of a stage at the time it was set."""

    at: int
    step: int | None  # the last step recorded before
    stage: str | None
    key: str
    value: str


@dataclass(frozen=True)
class RunFolder:
    """A run. `values` is the config as stored; `config` is what this machine may act on (`stored_config`)."""

    folder: str
    storage: Storage  # the caller's
    config: RunConfig
    recorded: RecordedLocation
    values: Values
    run: str  # value of the MLflow tag `mome.run`; empty before the first start
    stages: list[StageRecord]
    sessions: list[Session]
    tags: list[Tag]
    evaluations: list[MetricPoint]  # of any checkpoint, in the order in which they were made
    status: str  # FINISHED, FAILED or KILLED; empty while the last process has not ended
    is_live: bool  # a process on this machine is writing the journal
    seconds: dict[str, float]  # by phase (`pipeline.training.goodput`); empty if unknown

    @property
    def name(self) -> str:
        """The run's name in its config; the folder may have been renamed."""
        return str(self.values["name"])

    def recorded_config(self) -> RunConfig:
        """Return the config as stored, for display."""
        return parse_config(json.dumps(self.values), join(self.folder, RUN_FILE))

    @property
    def reached(self) -> int:
        """The highest recorded global step."""
        return max((stage.reached or 0 for stage in self.stages), default=0)

    @property
    def num_restarts(self) -> int:
        return max(len(self.sessions) - 1, 0)

    @property
    def goodput(self) -> float | None:
        """The fraction of all time that was spent in steps that were kept."""
        total = sum(self.seconds.values())
        return self.seconds["training"] / total if total else None

    def restarts(self) -> list[Values]:
        """Return {time, cause, message} of every restart that the driver recorded, in order."""
        return list(self._objects("restarts", ".json", time=(int, float), cause=str, message=str))

    def quarantined(self) -> list[Values]:
        """Return a record of every replaced bad sample, in order."""
        texts = dict.fromkeys(("source", "shard", "key", "stage", "reason"), str)
        return list(self._objects("quarantine", ".jsonl", offset=int, **texts))

    def _objects(self, folder: str, suffix: str, **types: Any) -> Iterator[Values]:
        """Yield the JSON objects in a folder's files (one per line in .jsonl) that have values of these types."""
        url = join(self.folder, folder)
        for name in self.storage.list(url):
            if not name.endswith(suffix):
                continue
            data = self.storage.read(join(url, name))
            for line in data.splitlines() if suffix == ".jsonl" else [data]:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                if isinstance(values, dict) and all(isinstance(values.get(k), kind) for k, kind in types.items()):
                    yield values
                else:
                    log.warning("%s/%s: skipped a damaged record", url, name)


def open_run(run: str, storage: Storage | None = None) -> RunFolder:
    """Read the run in folder `run` (path or URL) through `storage` (default: one configured by the environment).

    Raises ConfigError if there is no readable run.
    """
    folder = run.rstrip("/")
    storage = storage or Storage()
    url = join(folder, RUN_FILE)
    if not storage.exists(url):
        raise ConfigError(f"{run}: no run there (no {RUN_FILE} in it); give the folder of a run, <output>/<name>")
    try:
        values = json.loads(storage.read(url))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{url}: not JSON ({error}); the run's folder is damaged") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{url}: expected a config, got {type(values).__name__}; the run's folder is damaged")
    config, recorded = stored_config(values, url, folder)
    journal, reader = _read_journal(storage, config, folder)
    return RunFolder(
        folder=folder,
        storage=storage,
        config=config,
        recorded=recorded,
        values=values,
        run=reader.run,
        stages=reader.stages,
        sessions=reader.sessions,
        tags=reader.tags,
        evaluations=reader.evaluations,
        status=reader.status,
        is_live=any(is_held(journal.path(session)) for session in journal.sessions()),
        seconds=_seconds(storage, folder),
    )


def _seconds(storage: Storage, folder: str) -> dict[str, float]:
    """Return the seconds of each phase; {} if there is no valid time account."""
    record = goodput.read_record(storage, folder)
    seconds = record.get("seconds") if isinstance(record, dict) else None
    if not isinstance(seconds, dict) or "training" not in seconds:
        return {}
    return seconds if all(isinstance(v, int | float) and 0 <= v < MAX_SECONDS for v in seconds.values()) else {}


def stages_of(config: RunConfig, storage: Storage) -> list[StageRecord]:
    """Return the records of each stage of a run, which are empty if there is no journal."""
    return _read_journal(storage, config, config.folder)[1].stages


def _read_journal(storage: Storage, config: RunConfig, folder: str) -> tuple[Journal, _JournalReader]:
    journal, reader = read_journal(folder, storage), _JournalReader(config)
    known = (None, *range(len(config.stages)))  # the journal may be another run's, with more stages
    for session in journal.sessions():
        records = (record for _, record in journal.records(session))
        reader.read_session([r for r in records if r["kind"] != "damaged" and r["stage"] in known])
    return journal, reader


class _JournalReader:
    """Collects a journal's records by stage."""

    def __init__(self, config: RunConfig):
        self.stages = [StageRecord(stage.name) for stage in config.stages]
        self.sessions: list[Session] = []
        self.tags: list[Tag] = []
        self.evaluations: list[MetricPoint] = []
        self.run = ""
        self.status = ""
        self._step: int | None = None  # the last one recorded in this session

    def read_session(self, records: list[Record]) -> None:
        self._step = None
        if any(record["kind"] == "stage" for record in records):
            self.sessions.append(Session(records[0]["at"], records[-1]["at"], records[0].get("tags", {})))
            self.status = ""
        for record in records:
            stage = None if record["stage"] is None else self.stages[record["stage"]]
            kind = record["kind"]
            if kind == "run":
                self.run = record["run"]
            elif kind == "run_end":
                self.status = record["status"]
            elif kind == "metrics":
                self._add_point(record, stage)
            elif kind == "tag":
                name = None if stage is None else stage.name
                self.tags.append(Tag(record["at"], self._step, name, record["key"], record["value"]))
            if stage is not None:
                self._add_to_stage(kind, record, stage)

    def _add_to_stage(self, kind: str, record: Record, stage: StageRecord) -> None:
        if kind == "stage":
            stage.starts.append(record)
            stage.tags.update(record["tags"])
        elif kind == "tag":
            stage.tags[record["key"]] = record["value"]
        elif kind == "stage_end":
            stage.status = record["status"]
        elif kind == "rewind":  # points beyond its step are void
            void = {id(point) for point in stage.points if point.step > record["step"]}
            stage.points = [point for point in stage.points if id(point) not in void]
            self.evaluations = [point for point in self.evaluations if id(point) not in void]

    def _add_point(self, record: Record, stage: StageRecord | None) -> None:
        # float() also decodes "nan" and "inf", which the journal stores as strings.
        point = MetricPoint(record["at"], record["step"], {name: float(v) for name, v in record["values"].items()})
        if stage is not None:
            stage.points.append(point)
            self._step = point.step
        if any(name.startswith(EVALUATION) for name in point.values):
            self.evaluations.append(point)
