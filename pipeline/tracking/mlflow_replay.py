"""Replays a run's journal into MLflow: one parent run a campaign, one child a stage, every point exactly once.

Replaying is idempotent, so that a lost cursor or an answer that never arrived costs only time: runs are found by
tags that are set in the same request that creates them, params and tags say the same again, and MLflow's SQL store
drops points it has with the same key, step, value and timestamp. Only points that were journaled anew, after the
journal of their first recording was lost, have another timestamp; they are compared with what the server holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.config.durable import write_durably
from pipeline.config.redaction import describe_error, redact
from pipeline.tracking.journal import EVALUATION, Journal, complete_length
from pipeline.tracking.liveness import InUse, Lease
from pipeline.tracking.mlflow_client import Outage, Refused, RunGone, ask, connect, experiment_id, prepare_client
from pipeline.tracking.mlflow_models import LoggedModels
from pipeline.tracking.records import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

POINTS_A_BATCH, PAIRS_A_BATCH = 1000, 100  # MLflow's limits
LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36


class _State(TypedDict):
    offsets: dict[str, Annotated[int, Field(ge=0)]]
    marks: dict[str, dict[str, int]]
    run: NotRequired[str]
    experiment: NotRequired[str]


_STATE = TypeAdapter(_State)


class Cursor:
    """How far each session was shipped to one server. Losing it only means that records are sent again."""

    def __init__(self, folder: Path, uri: str):
        self._path = folder / f"cursor-{hashlib.sha256(redact(uri).encode()).hexdigest()[:8]}.json"
        self.offsets: dict[str, int] = {}
        self.marks: dict[str, dict[str, int]] = {}  # stage index -> key -> the step up to which the server had points
        self.run, self.experiment = "", ""  # MLflow's ids of the campaign's run there
        with contextlib.suppress(OSError, ValueError):  # a ValidationError is one
            state = _STATE.validate_json(self._path.read_bytes())
            self.offsets, self.marks = state["offsets"], state["marks"]
            self.run, self.experiment = state.get("run", ""), state.get("experiment", "")

    def offset(self, journal: Journal, session: str) -> int:
        """Return the byte from which a session is still to be shipped: all of it, when what is known cannot be true."""
        offset = self.offsets.get(session, 0)
        if offset == 0:
            return 0
        with journal.path(session).open("rb") as file:
            file.seek(offset - 1)
            return offset if file.read(1) == b"\n" else 0

    def save(self) -> None:
        state = {"offsets": self.offsets, "marks": self.marks, "run": self.run, "experiment": self.experiment}
        write_durably(self._path, json.dumps(state).encode())

    def reset(self) -> None:
        self.offsets, self.marks, self.run, self.experiment = {}, {}, "", ""
        self.save()


def shipped_to(folder: Path, uri: str) -> tuple[str, str] | None:
    """Return MLflow's ids (run, experiment) of a journal's campaign at `uri`; None where this machine knows none."""
    cursor = Cursor(folder, uri)
    known = re.fullmatch(r"[0-9a-f]{32}", cursor.run) and re.fullmatch(r"\d{1,32}", cursor.experiment)
    return (cursor.run, cursor.experiment) if known else None


def num_pending(folder: Path, uri: str) -> int:
    """Bytes of the journal that were not shipped to `uri`."""
    journal, cursor = Journal(folder), Cursor(folder, uri)
    return sum(
        complete_length(journal.path(session)) - cursor.offset(journal, session) for session in journal.sessions()
    )


@contextlib.contextmanager
def shipping_alone(folder: Path) -> Iterator[bool]:
    """Yields whether this process is the only one that ships this journal."""
    try:
        lease = Lease(folder / "shipper.lock")
    except InUse:
        yield False
        return
    try:
        yield True
    finally:
        lease.release()


class MlflowShipper:
    """Ships one journal to one MLflow server."""

    def __init__(self, folder: Path, uri: str, say: Callable[[str], None]):
        prepare_client()
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
            raise Outage(describe_error(error)) from error

    def _ship_or_begin_again(self) -> None:
        try:
            self._ship()
        except RunGone:  # removed for good, or another database: the whole journal is due
            self._client = self._logged_models = None
            self._runs = {}
            self._cursor.reset()
            self._ship()

    def _ship(self) -> None:
        self._points = []
        for session in self._journal.sessions():
            shipped = self._cursor.offset(self._journal, session)
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
        self._cursor.run, self._cursor.experiment = self._runs.get(None, self._cursor.run), self._experiment
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
                ask(self._connected().log_batch, self._points_run, metrics=batch)
            except Refused:  # one bad point must not take the others with it
                self._stop_if_deleted()
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
        elif kind == "rewind":
            marks = self._cursor.marks.get(str(stage), {})
            marks.update({key: min(step, record["step"]) for key, step in marks.items()})
        elif kind == "artifact":
            folder = os.path.dirname(record["name"]) or None
            path = self._journal.file(record["file"])
            if path is None:
                self._say(f"tracking: the artifact {record['name']} lies outside the journal and was left out")
            elif path.exists():
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
        if record.get("server_has_more", False):
            self._read_marks()

    def _begin_stage(self, record: Record) -> None:
        stage = record["stage"]
        parent = self._run_of(None)
        child = self._find(stage) or self._create(record, {"mome.role": "stage", "mlflow.parentRunId": parent})
        for run in (parent, child):
            ask(self._connected().update_run, run, status="RUNNING")
            self._add_datasets(run, record["datasets"])
        self._describe(child, record)
        origin = record["tags"].get("start_from")
        if origin not in (None, "random"):
            with self._refusals_told():
                made_by = self._models.start_from(origin, child)
                if made_by is not None:
                    ask(self._connected().set_tag, child, "start_from.run_id", made_by)

    def _log_model(self, record: Record) -> None:
        """Weights that are kept, with the points of their step, which the run has already at the same times."""
        from mlflow.entities import Metric

        run = self._run_of(record["stage"])
        stage = ask(self._connected().get_run, run).data.tags.get("stage", str(record["stage"]))
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

        held = ask(self._connected().get_run, run).data.params
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
            for metric in ask(self._connected().get_run, run).data.to_proto().metrics:
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
            self._stop_if_deleted(*self._search(which, deleted=True))
            return None
        self._runs[stage] = runs[0].info.run_id
        return self._runs[stage]

    def _children(self) -> dict[int, str]:
        runs = self._search("tags.`mome.role` = 'stage'")
        return {int(run.data.tags["stage_index"]): run.info.run_id for run in runs}

    def _search(self, which: str, deleted: bool = False) -> list[Any]:
        from mlflow.entities import ViewType

        client, view = self._connected(), ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        text = f"tags.`mome.run` = '{self._campaign['run']}' and {which}"
        return ask(client.search_runs, [self._experiment], text, view, order_by=["start_time ASC"])

    def _create(self, record: Record, tags: dict[str, str]) -> str:
        """Create a run together with the tags it is found by: an answer that is lost then creates no second one."""
        tags = tags | {"mome.run": self._campaign["run"]}
        if record["stage"] is not None:
            tags["stage_index"] = str(record["stage"])
        create = self._connected().create_run
        run = ask(create, self._experiment, start_time=record["at"], tags=tags, run_name=record.get("name"))
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
            self._logged_models = LoggedModels(client, self._experiment, self._campaign, self._journal)
        return self._logged_models

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = ask(self._connect)
        return self._client

    def _connect(self) -> MlflowClient:
        client = connect(self._uri)
        self._experiment = experiment_id(client, self._uri, self._campaign.get("experiment", "Default"))
        return client

    def _stop_if_deleted(self, *runs: Any) -> None:
        """Raise Outage where a run or its experiment is deleted: both can be restored, and then take what is kept."""
        client = self._connected()
        known = runs or [ask(client.get_run, run) for run in self._runs.values()]
        experiment = ask(client.get_experiment, self._experiment)
        deleted = [f"its run {run.info.run_id}" for run in known if run.info.lifecycle_stage == "deleted"]
        if experiment.lifecycle_stage == "deleted":
            deleted = [f"its experiment {experiment.name}"]
        if deleted:
            raise Outage(f"{deleted[0]} is deleted: restore it, or remove it for good with `mlflow gc`")

    def _unless_refused(self, action: Callable[..., object], *args: Any, **values: Any) -> None:
        with self._refusals_told():
            ask(action, *args, **values)

    @contextlib.contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            self._stop_if_deleted()
            self._say(f"tracking: {redact(self._uri)} refused a record, which stays in the journal only: {error}")
