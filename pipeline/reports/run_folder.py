"""A run as its folder tells it, finished or not: its config, its journal, its account of time, its restarts.

Nothing here needs the run's weights, its data or its MLflow server; of a remote folder the committed journal is read.
"""

from __future__ import annotations

import json
import logging
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

LONGEST_SECONDS = 1e12
RESTARTS = "restarts"
QUARANTINE = "quarantine"

log = logging.getLogger(__name__)

Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Metrics recorded at once."""

    at: int  # milliseconds since 1970
    step: int  # global
    values: dict[str, float]


@dataclass
class StageRecord:
    """What the journal holds of one stage, over all its sessions."""

    name: str
    points: list[Point] = field(default_factory=list)
    begun: list[Record] = field(default_factory=list)  # its `stage` records, one for each time it was taken up
    tags: dict[str, str] = field(default_factory=dict)  # the last value of each
    status: str = ""  # of its last end; empty while it goes on, or where it was cut off

    @property
    def reached(self) -> int | None:
        """The highest step. Points of a checkpoint come when it is written, after those of later steps."""
        return max((point.step for point in self.points), default=None)

    def last(self, metric: str) -> float | None:
        return next((p.values[metric] for p in reversed(self.points) if metric in p.values), None)

    def series(self, metric: str) -> list[tuple[int, int, float]]:
        """(milliseconds, step, value) of one metric."""
        return [(p.at, p.step, p.values[metric]) for p in self.points if metric in p.values]


@dataclass(frozen=True)
class Session:
    """One process that trained: from its first record to its last."""

    start: int
    end: int
    first_step: int | None  # that it recorded
    tags: dict[str, str]


@dataclass(frozen=True)
class Tag:
    """A tag as it was set, on the run or on one of its stages."""

    at: int
    step: int | None  # the last one recorded before
    stage: str | None
    key: str
    value: str


@dataclass(frozen=True)
class RunFolder:
    """One run. `values` is the config as it was kept, `config` what this machine may act on (`stored_config`)."""

    folder: str
    storage: Storage  # the caller's
    config: RunConfig
    recorded: RecordedLocation
    values: Values
    run: str  # MLflow's name of the parent run's place in the journal; empty before its first start
    stages: list[StageRecord]
    sessions: list[Session]
    tags: list[Tag]
    evaluations: list[Point]  # of any checkpoint, in the order they were made
    status: str  # of the last process that trained: FINISHED, FAILED, KILLED; empty while none has ended
    is_live: bool  # some process of this machine is writing its journal
    time: Values | None  # as `pipeline.training.goodput` keeps it

    @property
    def name(self) -> str:
        """The name that the run was given; its folder may have got another."""
        return str(self.values["name"])

    def recorded_config(self) -> RunConfig:
        """The config as it was kept, to be shown."""
        return parse_config(json.dumps(self.values), join(self.folder, RUN_FILE))

    @property
    def reached(self) -> int:
        """The highest global step that was recorded."""
        return max((stage.reached or 0 for stage in self.stages), default=0)

    def restarts(self) -> list[Values]:
        """{time, cause, message} of what Ray Train was told, in order."""
        return list(self._objects(RESTARTS, ".json", time=(int, float), cause=str, message=str))

    def quarantined(self) -> list[Values]:
        """Every bad sample that was replaced, in the order they were met."""
        texts = dict.fromkeys(("source", "shard", "key", "stage", "reason"), str)
        return list(self._objects(QUARANTINE, ".jsonl", offset=int, **texts))

    def _objects(self, folder: str, suffix: str, **types: Any) -> Iterator[Values]:
        """The JSON objects in the files of a folder, one a line or a file; those without such values are left out."""
        place = join(self.folder, folder)
        for name in self.storage.list(place):
            if not name.endswith(suffix):
                continue
            data = self.storage.read(join(place, name))
            for line in data.splitlines() if suffix == ".jsonl" else [data]:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                if isinstance(values, dict) and all(isinstance(values.get(k), kind) for k, kind in types.items()):
                    yield values
                else:
                    log.warning("%s/%s: a damaged record is left out", place, name)


def open_run(run: str, storage: Storage | None = None) -> RunFolder:
    """The run in folder `run` (path or URL), read through `storage`, which is the caller's; else the environment's.

    Raises ConfigError, naming it, where there is none that can be read.
    """
    folder = run.rstrip("/")
    storage = storage or Storage()
    values = _values(run, folder, storage)
    config, recorded = stored_config(values, join(folder, RUN_FILE), folder)
    journal, read = _read_journal(storage, config, folder)
    return RunFolder(
        folder=folder,
        storage=storage,
        config=config,
        recorded=recorded,
        values=values,
        run=read.run,
        stages=read.stages,
        sessions=read.sessions,
        tags=read.tags,
        evaluations=read.evaluations,
        status=read.status,
        is_live=any(is_held(journal.path(session)) for session in journal.sessions()),
        time=_account(storage, folder),
    )


def _account(storage: Storage, folder: str) -> Values | None:
    """The account of time; None where there is none, or none that can be understood."""
    found = goodput.read_record(storage, folder)
    seconds = found.get("seconds") if isinstance(found, dict) else None
    if not isinstance(seconds, dict) or "training" not in seconds:
        return None
    return found if all(isinstance(v, int | float) and 0 <= v < LONGEST_SECONDS for v in seconds.values()) else None


def stages_of(config: RunConfig, storage: Storage) -> list[StageRecord]:
    """What was recorded of each stage of a run; nothing where there is no journal."""
    return _read_journal(storage, config, config.folder)[1].stages


def _read_journal(storage: Storage, config: RunConfig, folder: str) -> tuple[Journal, _Reading]:
    journal = read_journal(folder, storage)
    read = _Reading(config)
    for session in journal.sessions():
        read.session([record for _, record in journal.records(session) if _is_known(record, config)])
    return journal, read


def _values(run: str, folder: str, storage: Storage) -> Values:
    url = join(folder, RUN_FILE)
    if not storage.exists(url):
        raise ConfigError(f"{run}: no run there (no {RUN_FILE} in it); give the folder of a run, <output>/<name>")
    try:
        values = json.loads(storage.read(url))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{url}: not JSON ({error}); the run's folder is damaged") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{url}: expected a config, got {type(values).__name__}; the run's folder is damaged")
    return values


def _is_known(record: Record, config: RunConfig) -> bool:
    """Whether a record is whole, and of a stage that the run has."""
    return record["kind"] != "damaged" and (record["stage"] is None or record["stage"] < len(config.stages))


class _Reading:
    """Sorts a journal's records by what they tell."""

    def __init__(self, config: RunConfig):
        self.stages = [StageRecord(stage.name) for stage in config.stages]
        self.sessions: list[Session] = []
        self.tags: list[Tag] = []
        self.evaluations: list[Point] = []
        self.run = ""
        self.status = ""
        self._step: int | None = None  # the last one recorded in this session

    def session(self, records: list[Record]) -> None:
        """One process's records, the first of which says what it was."""
        self._step = None
        steps = [r["step"] for r in records if r["kind"] == "metrics" and r["stage"] is not None]
        if any(record["kind"] == "stage" for record in records):
            first = steps[0] if steps else None
            self.sessions.append(Session(records[0]["at"], records[-1]["at"], first, records[0].get("tags", {})))
            self.status = ""
        for record in records:
            stage = record["stage"]
            if stage is None or stage < len(self.stages):  # a journal may be another run's, or anybody's
                self._record(record, None if stage is None else self.stages[stage])

    def _record(self, record: Record, stage: StageRecord | None) -> None:
        kind = record["kind"]
        if kind == "run":
            self.run = record["run"]
        elif kind == "run_end":
            self.status = record["status"]
        elif kind == "metrics":
            self._point(record, stage)
        elif kind == "tag":
            self.tags.append(
                Tag(record["at"], self._step, None if stage is None else stage.name, record["key"], record["value"])
            )
        if stage is None:
            return
        if kind == "stage":
            stage.begun.append(record)
            stage.tags.update(record["tags"])
        elif kind == "tag":
            stage.tags[record["key"]] = record["value"]
        elif kind == "stage_end":
            stage.status = record["status"]
        elif kind == "rewind":  # what was recorded beyond its step is void
            void = {id(point) for point in stage.points if point.step > record["step"]}
            stage.points = [point for point in stage.points if id(point) not in void]
            self.evaluations = [point for point in self.evaluations if id(point) not in void]

    def _point(self, record: Record, stage: StageRecord | None) -> None:
        # The journal keeps numbers that JSON does not know as words.
        point = Point(record["at"], record["step"], {name: float(v) for name, v in record["values"].items()})
        if stage is not None:
            stage.points.append(point)
            self._step = point.step
        if any(name.startswith(EVALUATION) for name in point.values):
            self.evaluations.append(point)
