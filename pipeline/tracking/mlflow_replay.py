"""Upload of a run's journal to MLflow: one parent run, one child run per stage, every point exactly once.

The upload is idempotent, so that a lost cursor or response costs only time. Runs are found by tags that are set in the
request that creates them, repeated params and tags have the same values, and MLflow's SQL store drops points that it
has with the same key, step, value and timestamp. Points that were recorded again, after the journal with their first
recording was lost, have other timestamps; they are compared with the steps that the server holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, PrivateAttr

from pipeline.config.durable import write_durably
from pipeline.config.redaction import describe_error, redact
from pipeline.tracking.journal import EVALUATION, Journal, Record, complete_length
from pipeline.tracking.lease import InUse, Lease
from pipeline.tracking.mlflow_models import LoggedModels
from pipeline.tracking.mlflow_server import (
    RequestRejected,
    RunNotFound,
    ServerUnavailable,
    connect,
    experiment_id,
    prepare_client,
    request,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_BATCH_POINTS, MAX_BATCH_PAIRS = 1000, 100  # MLflow's limits
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters


class Cursor(BaseModel):
    """Position up to which each session was uploaded to one server. If it is lost, records are sent again."""

    offsets: dict[str, Annotated[int, Field(ge=0)]] = {}
    marks: dict[str, dict[str, int]] = {}  # stage index -> key -> last step that the server already had
    run: str = ""  # MLflow's id of the parent run
    experiment: str = ""
    _path: Path = PrivateAttr()

    @classmethod
    def load(cls, folder: Path, uri: str) -> Cursor:
        path, cursor = folder / f"cursor-{hashlib.sha256(redact(uri).encode()).hexdigest()[:8]}.json", cls()
        with contextlib.suppress(OSError, ValueError):  # includes ValidationError
            cursor = cls.model_validate_json(path.read_bytes())
        cursor._path = path
        return cursor

    def save(self) -> None:
        write_durably(self._path, self.model_dump_json().encode())

    def offset(self, journal: Journal, session: str) -> int:
        """Return the byte from which to continue a session; 0 if the stored offset is not the end of a record."""
        offset = self.offsets.get(session, 0)
        if offset == 0:
            return 0
        with journal.path(session).open("rb") as file:
            file.seek(offset - 1)
            return offset if file.read(1) == b"\n" else 0


def uploaded_run(folder: Path, uri: str) -> tuple[str, str] | None:
    """Return MLflow's ids (run, experiment) of a journal's run at `uri`; None if this machine did not upload it."""
    cursor = Cursor.load(folder, uri)
    is_valid = re.fullmatch(r"[0-9a-f]{32}", cursor.run) and re.fullmatch(r"\d{1,32}", cursor.experiment)
    return (cursor.run, cursor.experiment) if is_valid else None


def pending_bytes(folder: Path, uri: str) -> int:
    """Return the number of bytes of the journal that were not uploaded to `uri`."""
    journal, cursor = Journal(folder), Cursor.load(folder, uri)
    return sum(complete_length(journal.path(name)) - cursor.offset(journal, name) for name in journal.sessions())


@contextlib.contextmanager
def exclusive_upload(folder: Path) -> Iterator[bool]:
    """Yield True while this process holds the journal's upload lock, False if another process does."""
    try:
        lease = Lease(folder / "uploader.lock")
    except InUse:
        yield False
        return
    try:
        yield True
    finally:
        lease.release()


class MlflowUploader:
    """Uploads one journal to one MLflow server. `report` receives messages for the user."""

    def __init__(self, folder: Path, uri: str, report: Callable[[str], None]):
        prepare_client()
        self._journal, self._uri, self._report = Journal(folder), uri, report
        self._cursor = Cursor.load(folder, uri)
        self._experiment = ""
        self._runs: dict[int | None, str] = {}  # stage index (None: the parent) -> MLflow run id
        self._points: list[Metric] = []
        self._points_run = ""
        self.num_points = 0

    @cached_property
    def _client(self) -> MlflowClient:
        client = request(connect, self._uri)
        name = request(lambda: self._run_record.get("experiment", "Default"))  # a damaged journal is tried again
        self._experiment = request(experiment_id, client, self._uri, name)
        return client

    @cached_property
    def _models(self) -> LoggedModels:
        return LoggedModels(self._client, self._experiment, self._run_record, self._journal)

    @property
    def _run_record(self) -> Record:
        """The journal's first run record; a run stays in the experiment in which it started."""
        return self._journal.run_records()[0]

    def upload(self) -> None:
        """Upload everything beyond the cursor, in order. Raises ServerUnavailable; the cursor keeps the progress."""
        try:
            try:
                self._upload_records()
            except RunNotFound:  # permanently deleted, or another database: upload the whole journal again
                for name in ("_client", "_models"):
                    vars(self).pop(name, None)
                self._runs = {}
                self._cursor.offsets, self._cursor.marks, self._cursor.run, self._cursor.experiment = {}, {}, "", ""
                self._cursor.save()
                self._upload_records()
        except (RequestRejected, RunNotFound) as error:  # such as a deleted experiment, which can be restored
            raise ServerUnavailable(str(error)) from error
        except OSError as error:
            raise ServerUnavailable(describe_error(error)) from error

    def _upload_records(self) -> None:
        self._points = []
        for session in self._journal.sessions():
            start = self._cursor.offset(self._journal, session)
            for offset, record in self._journal.records(session, start):
                if record["kind"] == "metrics":
                    self._collect_points(record)
                    if len(self._points) < MAX_BATCH_POINTS:
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

    def _collect_points(self, record: Record) -> None:
        from mlflow.entities import Metric

        run = self._run_id(record["stage"])
        if run != self._points_run:
            self._send_points()
            self._points_run = run
        marks, step = self._cursor.marks.get(str(record["stage"]), {}), record["step"]
        evaluations = {key for key in record["values"] if key.startswith(EVALUATION)}
        evaluated = self._models.at_step(step) if evaluations else None
        for key, value in record["values"].items():
            if step > marks.get(key, -1):
                model_id = evaluated if key in evaluations else None
                self._points.append(Metric(key, float(value), record["at"], step, model_id=model_id))

    def _send_points(self) -> None:
        points, self._points = self._points, []
        for start in range(0, len(points), MAX_BATCH_POINTS):
            batch = points[start : start + MAX_BATCH_POINTS]
            try:
                request(self._client.log_batch, self._points_run, metrics=batch)
            except RequestRejected:  # send the points one by one, so that one invalid point does not lose the others
                self._raise_if_deleted()
                for point in batch:
                    self._send(self._client.log_batch, self._points_run, metrics=[point])
            self.num_points += len(batch)

    def _apply(self, record: Record) -> None:
        """Upload one record other than metrics."""
        kind, stage, client = record["kind"], record["stage"], self._client
        if kind == "run":
            parent = self._find_run(None) or self._create_run(record, {"mome.role": "run"})
            self._log_params_and_tags(parent, record)
            if record.get("server_has_more", False):
                # Points up to each metric's last step on the server may have been uploaded before.
                for run in self._search_runs("tags.`mome.role` = 'stage'"):
                    marks = self._cursor.marks.setdefault(str(int(run.data.tags["stage_index"])), {})
                    for metric in request(client.get_run, run.info.run_id).data.to_proto().metrics:
                        marks[metric.key] = max(metric.step, marks.get(metric.key, -1))
        elif kind == "stage":
            self._begin_stage(record)
        elif kind == "tag":
            self._send(client.set_tag, self._run_id(stage), record["key"], record["value"][:MAX_TAG])
        elif kind == "rewind":
            marks = self._cursor.marks.get(str(stage), {})
            marks.update({key: min(step, record["step"]) for key, step in marks.items()})
        elif kind == "artifact":
            path = self._journal.file(record["file"])
            if path is None:
                self._report(f"tracking: skipped the artifact {record['name']}, whose file is not in the journal")
            elif path.exists():
                folder = os.path.dirname(record["name"]) or None
                self._send(client.log_artifact, self._run_id(stage), str(path), folder)
            else:
                self._report(f"tracking: skipped the artifact {record['name']}, because {path} is missing")
        elif kind == "model":
            with self._rejections_reported():
                self._log_model(record)
        elif kind == "model_gone":
            with self._rejections_reported():
                self._models.remove(record["url"])
        elif kind in ("stage_end", "run_end"):
            self._send(client.set_terminated, self._run_id(stage), record["status"], record["at"])

    def _begin_stage(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, stage, parent = self._client, record["stage"], self._run_id(None)
        child = self._find_run(stage) or self._create_run(record, {"mome.role": "stage", "mlflow.parentRunId": parent})
        datasets = []
        for item in record["datasets"]:
            kind = urlsplit(item["source"]).scheme or "local"
            source, profile = json.dumps({"uri": item["source"]}), json.dumps({"digest": item["digest"]})
            dataset = Dataset(item["name"], item["digest"][:MAX_DIGEST], kind, source, profile=profile)
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])]))
        for run in (parent, child):
            request(client.update_run, run, status="RUNNING")
            if datasets:
                self._send(client.log_inputs, run, datasets)
        self._log_params_and_tags(child, record)
        origin = record["tags"].get("start_from")
        if origin not in (None, "random"):
            with self._rejections_reported():
                origin_run = self._models.start_from(origin, child)
                if origin_run is not None:
                    request(client.set_tag, child, "start_from.run_id", origin_run)

    def _log_model(self, record: Record) -> None:
        """Log saved weights together with the points of their step, which the run already has with the same times."""
        from mlflow.entities import Metric

        run = self._run_id(record["stage"])
        stage = request(self._client.get_run, run).data.tags.get("stage", str(record["stage"]))
        model_id = self._models.log(record, run, stage)
        if model_id is None:
            return
        for point_stage in (record["stage"], None):
            self._points_run = self._run_id(point_stage)
            self._points = [
                Metric(point["key"], float(point["value"]), point["at"], record["step"], model_id=model_id)
                for point in record["points"]
                if point["stage"] == point_stage
            ]
            self.num_points -= len(self._points)  # already counted when the run's points were sent
            self._send_points()

    def _log_params_and_tags(self, run: str, record: Record) -> None:
        """Log params and tags. A param that already has another value is immutable and becomes a tag."""
        from mlflow.entities import Param, RunTag

        existing = request(self._client.get_run, run).data.params
        params = {key: value[:MAX_PARAM] for key, value in record["params"].items()}
        tags = dict(record["tags"])
        tags |= {f"mome.changed.{key}": value for key, value in params.items() if existing.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in existing]
        pairs = [RunTag(key, str(value)[:MAX_TAG]) for key, value in tags.items()]
        for start in range(0, len(new), MAX_BATCH_PAIRS):
            self._send(self._client.log_batch, run, params=new[start : start + MAX_BATCH_PAIRS])
        for start in range(0, len(pairs), MAX_BATCH_PAIRS):
            self._send(self._client.log_batch, run, tags=pairs[start : start + MAX_BATCH_PAIRS])

    def _run_id(self, stage: int | None) -> str:
        """Return the MLflow run id of a stage, or of the parent run for None. Raises RunNotFound."""
        run = self._runs.get(stage) or self._find_run(stage)
        if run is None:
            raise RunNotFound(f"the {'parent run' if stage is None else f'run of stage {stage}'} no longer exists")
        return run

    def _find_run(self, stage: int | None) -> str | None:
        condition = "tags.`mome.role` = 'run'"
        if stage is not None:
            condition = f"tags.`mome.role` = 'stage' and tags.stage_index = '{stage}'"
        runs = self._search_runs(condition)
        if not runs:
            self._raise_if_deleted(*self._search_runs(condition, deleted=True))
            return None
        self._runs[stage] = runs[0].info.run_id
        return self._runs[stage]

    def _search_runs(self, condition: str, deleted: bool = False) -> list[Any]:
        from mlflow.entities import ViewType

        client, view = self._client, ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        text = f"tags.`mome.run` = '{self._run_record['run']}' and {condition}"
        return request(client.search_runs, [self._experiment], text, view, order_by=["start_time ASC"])

    def _create_run(self, record: Record, tags: dict[str, str]) -> str:
        """Create a run with the tags by which it is found, so that a lost response does not create a second one."""
        tags = tags | {"mome.run": self._run_record["run"]}
        if record["stage"] is not None:
            tags["stage_index"] = str(record["stage"])
        create = self._client.create_run
        run = request(create, self._experiment, start_time=record["at"], tags=tags, run_name=record.get("name"))
        self._runs[record["stage"]] = run.info.run_id
        return run.info.run_id

    def _raise_if_deleted(self, *runs: Any) -> None:
        """Raise ServerUnavailable if a run or its experiment is deleted: once restored, it accepts the records."""
        known = runs or [request(self._client.get_run, run) for run in self._runs.values()]
        experiment = request(self._client.get_experiment, self._experiment)
        deleted = [f"its run {run.info.run_id}" for run in known if run.info.lifecycle_stage == "deleted"]
        if experiment.lifecycle_stage == "deleted":
            deleted = [f"its experiment {experiment.name}"]
        if deleted:
            raise ServerUnavailable(f"{deleted[0]} is deleted: restore it, or remove it for good with `mlflow gc`")

    def _send(self, action: Callable[..., object], *args: Any, **values: Any) -> None:
        """Make a request; a rejection is reported instead of raised."""
        with self._rejections_reported():
            request(action, *args, **values)

    @contextlib.contextmanager
    def _rejections_reported(self) -> Iterator[None]:
        try:
            yield
        except RequestRejected as error:
            self._raise_if_deleted()
            self._report(f"tracking: {redact(self._uri)} rejected a record, which only the journal has: {error}")
