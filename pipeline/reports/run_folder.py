"""A finished or running run, read from its folder: config, journal, time account, restarts, quarantine.

Neither weights nor data nor an MLflow server are needed. For a remote folder the committed journal is read.
"""

import json
import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.config.errors import ConfigError
from pipeline.config.load import RecordedLocation, stored_config
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.storage import Storage, join
from pipeline.tracking.journal import EVALUATION, Record, is_held
from pipeline.tracking.locations import read_journal
from pipeline.training import goodput
from pipeline.training.prepare import RUN_FILE

MAX_SECONDS = 1e12  # of one phase; more is damage
# Folders of records of training, with the types of their values.
RESTARTS: tuple[str, Mapping[str, Any]] = ("restarts", {"time": (int, float), "cause": str, "message": str})
_BAD_SAMPLE = {"source": str, "shard": str, "key": str, "offset": int, "stage": str, "reason": str}
QUARANTINE: tuple[str, Mapping[str, Any]] = ("quarantine", _BAD_SAMPLE)

log = logging.getLogger(__name__)


class MetricPoint(NamedTuple):
    """Metrics that were recorded together."""

    at: int  # milliseconds since 1970
    step: int  # global
    values: dict[str, float]


@dataclass
class StageRecord:
    """A stage's records from all sessions."""

    config: StageConfig
    first_step: int  # the global step at which it starts
    points: list[MetricPoint] = field(default_factory=list)
    starts: list[Record] = field(default_factory=list)  # its `stage` records, one per start
    tags: dict[str, str] = field(default_factory=dict)  # the last value of each
    status: str = ""  # empty while the stage is running or after it was interrupted
    reached: int = 0  # the highest recorded step; a checkpoint's points are recorded late, after those of later steps
    samples_per_second: float | None = None  # the median
    last: dict[str, float] = field(default_factory=dict)  # the last value of each metric

    def series(self, metric: str) -> list[tuple[int, int, float]]:
        """Return (milliseconds, step, value) of one metric."""
        return [(p.at, p.step, p.values[metric]) for p in self.points if metric in p.values]


class Session(NamedTuple):
    """The first and last record of a process that trained, in milliseconds, and its tags."""

    start: int
    end: int
    tags: dict[str, str]


class Tag(NamedTuple):
    """A tag of the run or of a stage at the time it was set."""

    at: int
    step: int | None  # the last step recorded before
    stage: str | None
    key: str
    value: str


@dataclass
class JournalContents:
    """The records of a run's journal, by stage."""

    stages: list[StageRecord]
    sessions: list[Session] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    evaluations: list[MetricPoint] = field(default_factory=list)  # of any checkpoint, in the order they were made
    run: str = ""  # value of the MLflow tag `mome.run`; empty before the first start
    status: str = ""  # FINISHED, FAILED or KILLED; empty while the last process has not ended
    is_live: bool = False  # a process on this machine is writing the journal


@dataclass(kw_only=True)
class RunFolder(JournalContents):
    """A run. `values` is the config as stored; `config` is what this machine may act on (`stored_config`)."""

    name: str  # in its config; the folder may have been renamed
    folder: str
    storage: Storage  # the caller's
    config: RunConfig
    recorded: RecordedLocation
    values: dict[str, Any]
    reached: int  # the highest recorded global step
    num_restarts: int
    seconds: dict[str, float]  # by phase (`pipeline.training.goodput`); empty if unknown
    goodput: float | None  # the fraction of all time that was spent in steps that were kept

    def records(self, folder: str, types: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects in a folder's files (one per line in .jsonl) that have values of these types."""
        for name in self.storage.list(join(self.folder, folder)):
            if not name.endswith((".json", ".jsonl")):
                continue
            data = self.storage.read(join(self.folder, folder, name))
            for line in data.splitlines() if name.endswith(".jsonl") else [data]:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                if isinstance(values, dict) and all(isinstance(values.get(k), kind) for k, kind in types.items()):
                    yield values
                else:
                    log.warning("%s/%s: skipped a damaged record", join(self.folder, folder), name)


def open_run(run: str, storage: Storage | None = None) -> RunFolder:
    """Read the run in folder `run` (path or URL; default storage: from the environment); raise ConfigError if none."""
    folder, storage = run.rstrip("/"), storage or Storage()
    url = join(folder, RUN_FILE)
    if not storage.exists(url):
        raise ConfigError(f"{run}: no run there (no {RUN_FILE} in it); give the folder of a run, <output>/<name>")
    try:
        values = json.loads(storage.read(url))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{url}: not JSON ({error}); the run's folder is damaged") from error
    config, recorded = stored_config(values, url, folder)
    account = goodput.read_record(storage, folder)
    seconds = account.get("seconds") if isinstance(account, dict) else None
    if not (
        isinstance(seconds, dict)
        and "training" in seconds
        and all(isinstance(v, int | float) and 0 <= v < MAX_SECONDS for v in seconds.values())
    ):
        seconds = {}
    total, contents = sum(seconds.values()), read_records(config, storage)
    return RunFolder(
        **vars(contents), name=str(values["name"]), folder=folder, storage=storage, config=config, recorded=recorded,
        values=values, reached=max((stage.reached for stage in contents.stages), default=0),
        num_restarts=max(len(contents.sessions) - 1, 0), seconds=seconds,
        goodput=seconds["training"] / total if total else None,
    )  # fmt: skip


def read_records(config: RunConfig, storage: Storage) -> JournalContents:
    """Collect the records of a run's journal by stage, without damaged ones; empty if there is no journal."""
    journal = read_journal(config.folder, storage)
    stages = [StageRecord(stage, config.stage_start(index)) for index, stage in enumerate(config.stages)]
    contents = JournalContents(stages)
    known = (None, *range(len(stages)))  # the journal may be another run's, with more stages
    for session in journal.sessions():
        contents.is_live |= is_held(session)
        records = [record for _, record in journal.records(session)]
        records = [record for record in records if record["kind"] != "damaged" and record["stage"] in known]
        if any(record["kind"] == "stage" for record in records):
            contents.sessions.append(Session(records[0]["at"], records[-1]["at"], records[0].get("tags", {})))
            contents.status = ""
        step: int | None = None  # the last one recorded in this session
        for record in records:
            stage = None if record["stage"] is None else stages[record["stage"]]
            match record["kind"]:
                case "run":
                    contents.run = record["run"]
                case "run_end":
                    contents.status = record["status"]
                case "stage" if stage is not None:
                    stage.starts.append(record)
                    stage.tags.update(record["tags"])
                case "stage_end" if stage is not None:
                    stage.status = record["status"]
                case "tag":
                    name = None if stage is None else stage.config.name
                    contents.tags.append(Tag(record["at"], step, name, record["key"], record["value"]))
                    if stage is not None:
                        stage.tags[record["key"]] = record["value"]
                case "metrics":
                    # float() also decodes "nan" and "inf", which the journal stores as strings.
                    values = {metric: float(value) for metric, value in record["values"].items()}
                    point = MetricPoint(record["at"], record["step"], values)
                    if stage is not None:
                        stage.points.append(point)
                        step = point.step
                    if any(metric.startswith(EVALUATION) for metric in values):
                        contents.evaluations.append(point)
                case "rewind" if stage is not None:  # points beyond its step are void
                    void = {id(point) for point in stage.points if point.step > record["step"]}
                    stage.points = [point for point in stage.points if id(point) not in void]
                    contents.evaluations = [point for point in contents.evaluations if id(point) not in void]
    for stage in stages:
        for point in stage.points:
            stage.last |= point.values
        stage.reached = max((point.step for point in stage.points), default=0)
        if speeds := [value for _, _, value in stage.series("perf/samples_per_s")]:
            stage.samples_per_second = statistics.median(speeds)
    return contents
