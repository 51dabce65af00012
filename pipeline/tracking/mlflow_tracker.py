"""Replays a run's journal into MLflow: one parent run a campaign, one child a stage, every point exactly once.

Run as a process (`python -m pipeline.tracking.mlflow_tracker FOLDER`) beside the trainer, or by `mome sync`.

Replaying is idempotent, so that a lost cursor or an answer that never arrived costs only time: runs are found by
tags that are set in the same request that creates them, params and tags say the same again, and MLflow's SQL store
drops points it has with the same key, step, value and timestamp. Only points that were journaled anew, after the
journal of their first recording was lost, have another timestamp; they are compared with what the server holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipeline.tracking.journal import EVALUATION, Journal, Record, complete_length, redact
from pipeline.tracking.mlflow_models import LoggedModels

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

T = TypeVar("T")
logger = logging.getLogger("mome.tracking")

POINTS_A_BATCH, PAIRS_A_BATCH = 1000, 100  # MLflow's limits
LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two attempts while the server is away
ORPHAN_SECONDS = 30.0  # to ship what a dead trainer left
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we retry; a request repeated inside the client could create a run twice
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


class Outage(Exception):
    """The server did not answer, or not as it should; the same request may succeed later."""


class Refused(Exception):
    """The server understood and refused; repeating the request is useless."""


class RunGone(Exception):
    """A run that had been shipped before is not there any more."""


class Cursor:
    """How far each session was shipped to one server. Losing it only means that records are sent again."""

    def __init__(self, folder: Path, uri: str):
        self._path = folder / f"cursor-{hashlib.sha256(redact(uri).encode()).hexdigest()[:8]}.json"
        self.offsets: dict[str, int] = {}
        self.marks: dict[str, dict[str, int]] = {}  # stage index -> key -> the step up to which the server had points
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads(self._path.read_text())
            self.offsets, self.marks = state["offsets"], state["marks"]

    def save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"offsets": self.offsets, "marks": self.marks}))
        os.replace(partial, self._path)

    def reset(self) -> None:
        self.offsets, self.marks = {}, {}
        self.save()


def num_pending(folder: Path, uri: str) -> int:
    """Bytes of the journal that were not shipped to `uri`."""
    journal, cursor = Journal(folder), Cursor(folder, uri)
    lengths = {session: complete_length(journal.path(session)) for session in journal.sessions()}
    return sum(max(length - cursor.offsets.get(session, 0), 0) for session, length in lengths.items())


@contextlib.contextmanager
def shipping_alone(folder: Path) -> Iterator[bool]:
    """Yields whether this process is the only one that ships this journal."""
    with (folder / "shipper.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class MlflowShipper:
    """Ships one journal to one MLflow server."""

    def __init__(self, folder: Path, uri: str, say: Callable[[str], None]):
        os.environ.update(CLIENT_ENVIRONMENT)  # before the first import of mlflow
        self._journal = Journal(folder)
        self._uri = uri
        self._say = say
        self._cursor = Cursor(folder, uri)
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._runs: dict[int | None, str] = {}  # stage index, or None for the parent -> run id
        self._logged_models: LoggedModels | None = None
        self._points: list[Metric] = []
        self._points_run = ""
        self.num_points = 0

    def ship(self) -> None:
        """Ship everything beyond the cursor, in order. Raises Outage; what was shipped until then stays shipped."""
        try:
            self._ship_or_begin_again()
        except (Refused, RunGone) as error:  # such as a deleted experiment: its owner can mend that
            raise Outage(str(error)) from error
        except OSError as error:
            raise Outage(f"{type(error).__name__}: {error}") from error

    def _ship_or_begin_again(self) -> None:
        try:
            self._ship()
        except RunGone:  # deleted, or another database: the whole journal is due
            self._client = self._logged_models = None
            self._runs = {}
            self._cursor.reset()
            self._ship()

    def _ship(self) -> None:
        self._points = []
        for session in self._journal.sessions():
            shipped = self._cursor.offsets.get(session, 0)
            for offset, record in self._journal.records(session, shipped):
                if record["kind"] == "metrics":
                    self._collect(record)
                    if len(self._points) < POINTS_A_BATCH:
                        continue
                    self._send_points()
                else:
                    self._send_points()
                    self._apply(record)
                self._advance(session, offset)
            if self._points:
                self._send_points()
                self._advance(session, offset)

    def _advance(self, session: str, offset: int) -> None:
        self._cursor.offsets[session] = offset
        self._cursor.save()

    def _collect(self, record: Record) -> None:
        from mlflow.entities import Metric

        run = self._run_of(record["stage"])
        if run != self._points_run:
            self._send_points()
            self._points_run = run
        held = self._cursor.marks.get(str(record["stage"]), {})
        for key, value in record["values"].items():
            if record["step"] > held.get(key, -1):
                of = self._models.at_step(record["step"]) if key.startswith(EVALUATION) else None
                self._points.append(Metric(key, float(value), record["at"], record["step"], model_id=of))

    def _send_points(self) -> None:
        points, self._points = self._points, []
        for start in range(0, len(points), POINTS_A_BATCH):
            batch = points[start : start + POINTS_A_BATCH]
            try:
                self._ask(self._connected().log_batch, self._points_run, metrics=batch)
            except Refused:  # one bad point must not take the others with it
                for point in batch:
                    self._unless_refused(self._connected().log_batch, self._points_run, metrics=[point])
            self.num_points += len(batch)

    def _apply(self, record: Record) -> None:
        kind, stage, client = record["kind"], record["stage"], self._connected()
        if kind == "campaign":
            self._begin_campaign(record)
        elif kind == "stage":
            self._begin_stage(record)
        elif kind == "tag":
            self._unless_refused(client.set_tag, self._run_of(stage), record["key"], record["value"][:LONGEST_TAG])
        elif kind == "artifact":
            folder = os.path.dirname(record["name"]) or None
            path = self._journal.file(record["file"])
            if path.exists():
                self._unless_refused(client.log_artifact, self._run_of(stage), str(path), folder)
            else:
                self._say(f"tracking: the artifact {record['name']} is missing from {path} and was left out")
        elif kind == "model":
            with self._refusals_told():
                self._log_model(record)
        elif kind == "model_gone":
            with self._refusals_told():
                self._models.remove(record["url"])
        elif kind in ("stage_end", "campaign_end"):
            run = self._run_of(stage)
            self._unless_refused(client.set_terminated, run, record["status"], record["at"])

    def _begin_campaign(self, record: Record) -> None:
        parent = self._find(None) or self._create(record, {"mome.role": "campaign"})
        self._describe(parent, record)
        if record["server_has_more"]:
            self._read_marks()

    def _begin_stage(self, record: Record) -> None:
        stage = record["stage"]
        parent = self._run_of(None)
        child = self._find(stage) or self._create(record, {"mome.role": "stage", "mlflow.parentRunId": parent})
        for run in (parent, child):
            self._ask(self._connected().update_run, run, status="RUNNING")
            self._add_datasets(run, record["datasets"])
        self._describe(child, record)
        origin = record["tags"].get("start_from")
        if origin not in (None, "random"):
            with self._refusals_told():
                made_by = self._models.start_from(origin, child)
                if made_by is not None:
                    self._ask(self._connected().set_tag, child, "start_from.run_id", made_by)

    def _log_model(self, record: Record) -> None:
        """Weights that are kept, with the points of their step, which the run has already at the same times."""
        from mlflow.entities import Metric

        run = self._run_of(record["stage"])
        stage = self._ask(self._connected().get_run, run).data.tags.get("stage", str(record["stage"]))
        model_id = self._models.log(record, run, stage)
        if model_id is None:
            return
        for of in (record["stage"], None):
            self._points_run = self._run_of(of)
            self._points = [
                Metric(point["key"], float(point["value"]), point["at"], record["step"], model_id=model_id)
                for point in record["points"]
                if point["stage"] == of
            ]
            self.num_points -= len(self._points)  # they were counted when they were shipped
            self._send_points()

    def _describe(self, run: str, record: Record) -> None:
        """Params and tags. A param that already has another value cannot change: it becomes a tag."""
        from mlflow.entities import Param, RunTag

        held = self._ask(self._connected().get_run, run).data.params
        params = {key: value[:LONGEST_PARAM] for key, value in record["params"].items()}
        tags = dict(record["tags"])
        tags |= {f"mome.changed.{key}": value for key, value in params.items() if held.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in held]
        pairs = [RunTag(key, str(value)[:LONGEST_TAG]) for key, value in tags.items()]
        for start in range(0, len(new), PAIRS_A_BATCH):
            self._unless_refused(self._connected().log_batch, run, params=new[start : start + PAIRS_A_BATCH])
        for start in range(0, len(pairs), PAIRS_A_BATCH):
            self._unless_refused(self._connected().log_batch, run, tags=pairs[start : start + PAIRS_A_BATCH])

    def _add_datasets(self, run: str, datasets: list[dict[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for item in datasets:
            kind = urlsplit(item["source"]).scheme or "local"
            source, profile = json.dumps({"uri": item["source"]}), json.dumps({"digest": item["digest"]})
            dataset = Dataset(item["name"], item["digest"][:LONGEST_DIGEST], kind, source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])]))
        if inputs:
            self._unless_refused(self._connected().log_inputs, run, inputs)

    def _read_marks(self) -> None:
        """Ask which points the server has: those journaled from here on may have been shipped before the loss."""
        for stage, run in self._children().items():
            marks = self._cursor.marks.setdefault(str(stage), {})
            for metric in self._ask(self._connected().get_run, run).data.to_proto().metrics:
                marks[metric.key] = max(metric.step, marks.get(metric.key, -1))

    def _run_of(self, stage: int | None) -> str:
        run = self._runs.get(stage) or self._find(stage)
        if run is None:
            raise RunGone(f"the run of {'the campaign' if stage is None else f'stage {stage}'} is not there any more")
        return run

    def _find(self, stage: int | None) -> str | None:
        which = "tags.`mome.role` = 'campaign'"
        if stage is not None:
            which = f"tags.`mome.role` = 'stage' and tags.stage_index = '{stage}'"
        runs = self._search(which)
        if not runs:
            return None
        self._runs[stage] = runs[0].info.run_id
        return self._runs[stage]

    def _children(self) -> dict[int, str]:
        runs = self._search("tags.`mome.role` = 'stage'")
        return {int(run.data.tags["stage_index"]): run.info.run_id for run in runs}

    def _search(self, which: str) -> list[Any]:
        client = self._connected()
        text = f"tags.`mome.run` = '{self._campaign['run']}' and {which}"
        return self._ask(client.search_runs, [self._experiment], filter_string=text, order_by=["start_time ASC"])

    def _create(self, record: Record, tags: dict[str, str]) -> str:
        """Create a run together with the tags it is found by: an answer that is lost then creates no second one."""
        tags = tags | {"mome.run": self._campaign["run"]}
        if record["stage"] is not None:
            tags["stage_index"] = str(record["stage"])
        create = self._connected().create_run
        run = self._ask(create, self._experiment, start_time=record["at"], tags=tags, run_name=record["name"])
        self._runs[record["stage"]] = run.info.run_id
        return run.info.run_id

    @property
    def _campaign(self) -> Record:
        """The first campaign record: a run stays in the experiment it began in."""
        return self._journal.campaigns()[0]

    @property
    def _models(self) -> LoggedModels:
        if self._logged_models is None:
            client = self._connected()
            self._logged_models = LoggedModels(self._ask, client, self._experiment, self._campaign, self._journal)
        return self._logged_models

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = self._ask(self._connect)
        return self._client

    def _connect(self) -> MlflowClient:
        client = connect(self._uri)
        self._experiment = experiment_id(client, self._uri, self._campaign["experiment"])
        return client

    def _unless_refused(self, action: Callable[..., object], *args: Any, **values: Any) -> None:
        with self._refusals_told():
            self._ask(action, *args, **values)

    @contextlib.contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            self._say(f"tracking: {redact(self._uri)} refused a record, which stays in the journal only: {error}")

    def _ask(self, action: Callable[..., T], *args: Any, **values: Any) -> T:
        """One request. Its failures become Outage, Refused or RunGone."""
        from mlflow.exceptions import MlflowException

        try:
            return action(*args, **values)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGone(str(error)) from error
            kind = Refused if error.error_code in REFUSED else Outage
            raise kind(str(error)) from error
        except Exception as error:  # connection, database and file faults of every library underneath
            raise Outage(f"{type(error).__name__}: {error}") from error


def connect(uri: str) -> MlflowClient:
    """An MLflow client. Creates or migrates an SQLite database, which takes seconds."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Of the experiment of that name, which is created where there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    return client.create_experiment(name, artifact_location=artifact_location(uri, name))


def artifact_location(uri: str, experiment: str) -> str | None:
    """Beside an SQLite database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / experiment).as_uri()


class Commands:
    """Lines from the process that started this one: 'ship', 'close SECONDS'.

    The end of input means that it died; so does another parent, where a child of its own keeps our input open.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._parent = os.getppid()
        self._buffer = b""
        self.deadline: float | None = None

    def wait(self, seconds: float) -> None:
        """Until a line comes, at most `seconds`."""
        if self.deadline is not None:
            time.sleep(max(0.0, min(seconds, 0.5, self.deadline - time.monotonic())))
        elif select.select([self._descriptor], [], [], seconds)[0]:
            data = os.read(self._descriptor, 65536)
            lines = (self._buffer + data).split(b"\n")
            self._buffer = lines.pop()
            closing = [line for line in lines if line.startswith(b"close ")]
            if closing or not data:
                self._close_in(float(closing[0].split()[1]) if closing else ORPHAN_SECONDS)
        elif os.getppid() != self._parent:
            self._close_in(ORPHAN_SECONDS)

    def _close_in(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def ship_until_closed(folder: Path, uri: str, every: float, commands: Commands, say: Callable[[str], None]) -> bool:
    """Ship again and again until told to close; True if nothing is left."""
    while True:
        with shipping_alone(folder) as alone:
            if alone:
                return _ship_repeatedly(folder, uri, every, commands, say)
        # The shipper of an earlier start or of an evaluation is at work: while it lives, it ships our records too.
        if commands.deadline is not None and (commands.late or not num_pending(folder, uri)):
            return not num_pending(folder, uri)
        commands.wait(1.0)


def _ship_repeatedly(folder: Path, uri: str, every: float, commands: Commands, say: Callable[[str], None]) -> bool:
    shipper, wait, away_since = MlflowShipper(folder, uri, say), FIRST_WAIT, None
    while True:
        closing = commands.deadline is not None
        try:
            shipper.ship()
        except Outage as error:
            if away_since is None:
                away_since = time.monotonic()
                say(f"tracking: {redact(uri)} takes no records; they are kept and sent later ({error})"[:500])
            commands.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        else:
            if away_since is not None:
                say(f"tracking: {redact(uri)} is back after {time.monotonic() - away_since:.0f} s; nothing was lost")
            wait, away_since = FIRST_WAIT, None
            if closing:
                return True
            commands.wait(every)
        if commands.late:
            return not num_pending(folder, uri)


def _speaker() -> Callable[[str], None]:
    """Says lines to the process that started this one; whatever else is printed goes to the log."""
    channel = os.dup(1)
    os.dup2(2, 1)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(channel, " ".join(line.split()).encode() + b"\n")

    return say


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def main() -> int:
    os.nice(10)  # the trainer comes first
    descriptor = sys.stdin.fileno()
    first = _read_line(descriptor)
    if not first:
        return 1
    settings = json.loads(first)
    folder = Path(sys.argv[1])
    done = ship_until_closed(folder, settings["uri"], settings["every"], Commands(descriptor), _speaker())
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
