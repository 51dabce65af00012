"""Upload of a run's journal to MLflow: one parent run, one child run per stage, every point exactly once.

The upload is idempotent, so that a lost cursor or response costs only time. Runs are found by tags that are set in the
request that creates them, repeated params and tags have the same values, and MLflow's SQL store drops points that it
has with the same key, step, value and timestamp. Points that were recorded again, after the journal with their first
recording was lost, have other timestamps; they are compared with the steps that the server holds.

Checkpoints and final weights become LoggedModels with their URL (`mome.url`), step and results, so that
`search_logged_models` ranks checkpoints; the files stay in the run's storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, PrivateAttr

from pipeline.config.durable import write_durably
from pipeline.config.redaction import describe_error, redact
from pipeline.tracking import mlflow_server
from pipeline.tracking.journal import EVALUATION, FINAL_WEIGHTS, Journal, Record
from pipeline.tracking.mlflow_server import RequestRejected, RunNotFound, ServerUnavailable, request

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

MAX_BATCH_POINTS, MAX_BATCH_PAIRS = 1000, 100  # MLflow's limits
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters
_INVALID_IN_MODEL_NAMES = re.compile(r"[/:.%\"']")


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

    def offset(self, session: Path) -> int:
        """Return the byte from which to continue a session; 0 if the stored offset is not the end of a record."""
        offset = self.offsets.get(session.stem, 0)
        with session.open("rb") as file:
            file.seek(max(offset - 1, 0))
            return offset if file.read(1) == b"\n" else 0


def pending_bytes(folder: Path, uri: str) -> int:
    """Return the number of bytes of the journal that were not uploaded to `uri`."""
    journal, cursor = Journal(folder), Cursor.load(folder, uri)
    return sum(len(journal.tail(session, cursor.offset(session))) for session in journal.sessions())


class MlflowUploader:
    """Uploads one journal to one MLflow server. `report` receives messages for the user."""

    _client: MlflowClient
    _run_record: Record  # the journal's first; a run stays in the experiment in which it started

    def __init__(self, folder: Path, uri: str, report: Callable[[str], None]):
        os.environ.update(mlflow_server.CLIENT_ENVIRONMENT)
        self._journal, self._uri, self._report = Journal(folder), uri, report
        self._cursor = Cursor.load(folder, uri)
        self._experiment = ""  # MLflow's id, once connected
        self._models: dict[str, LoggedModel] | None = None
        self._deleted: set[str] | None = None  # URLs of deleted weights: not logged any more
        self._runs: dict[int | None, str] = {}  # stage index (None: the parent) -> MLflow run id
        self._points: list[Metric] = []
        self._points_run = ""
        self.num_points = 0

    def upload(self) -> None:
        """Upload everything beyond the cursor, in order. Raises ServerUnavailable; the cursor keeps the progress."""
        try:
            try:
                self._upload_records()
            except RunNotFound:  # permanently deleted, or another database: upload the whole journal again
                self._experiment, self._runs = "", {}
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
            start = self._cursor.offset(session)
            for offset, record in self._journal.records(session, start):
                if self._experiment and record["kind"] == "run" and record["run"] != self._run_record["run"]:
                    self._experiment, self._runs = "", {}  # the folder was deleted and holds another run now
                if not self._experiment:
                    client = request(mlflow_server.connect, self._uri)
                    self._run_record = request(lambda: self._journal.run_records()[0])  # if damaged: tried again
                    name = self._run_record.get("experiment", "Default")
                    experiment = request(mlflow_server.experiment_id, client, self._uri, name)
                    self._models = None
                    self._client, self._experiment = client, experiment  # last: a failed connection is made again
                if record["kind"] != "metrics":
                    self._send_points()
                    self._apply(record)
                    self._send_points(session, offset)
                    continue
                from mlflow.entities import Metric  # here, because importing mlflow takes seconds

                step, at, values = record["step"], record["at"], record["values"]
                if (run := self._run_id(record["stage"])) != self._points_run:
                    self._send_points()
                    self._points_run = run
                marks, model_id = self._cursor.marks.get(str(record["stage"]), {}), None
                if any(key.startswith(EVALUATION) for key in values):  # of the weights of this step
                    ids = [m.model_id for m in self._logged_models().values() if m.tags["mome.step"] == str(step)]
                    model_id = ids[-1] if ids else None
                self._points += [
                    Metric(key, float(value), at, step, model_id=model_id if key.startswith(EVALUATION) else None)
                    for key, value in values.items()
                    if step > marks.get(key, -1)
                ]
                if len(self._points) >= MAX_BATCH_POINTS:
                    self._send_points(session, offset)
            if self._points:
                self._send_points(session, offset)

    def _send_points(self, session: Path | None = None, offset: int = 0) -> None:
        """Send the collected points; then store that the bytes of `session` before `offset` are uploaded."""
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
        if session is not None:
            self._cursor.offsets[session.stem] = offset
            self._cursor.run, self._cursor.experiment = self._runs.get(None, self._cursor.run), self._experiment
            self._cursor.save()

    def _apply(self, record: Record) -> None:
        """Upload one record other than metrics."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

        kind, stage, client = record["kind"], record["stage"], self._client
        if kind == "run":
            self._log_params_and_tags(self._run_id(None, record), record)
            if record.get("server_has_more", False):
                # Points up to each metric's last step on the server may have been uploaded before.
                for run in self._search_runs("tags.`mome.role` = 'stage'"):
                    marks = self._cursor.marks.setdefault(str(int(run.data.tags["stage_index"])), {})
                    for metric in request(client.get_run, run.info.run_id).data.to_proto().metrics:
                        marks[metric.key] = max(metric.step, marks.get(metric.key, -1))
        elif kind == "stage":
            parent, child = self._run_id(None), self._run_id(stage, record)
            datasets = []
            for item in record["datasets"]:
                scheme = urlsplit(item["source"]).scheme or "local"
                source, profile = json.dumps({"uri": item["source"]}), json.dumps({"digest": item["digest"]})
                dataset = Dataset(item["name"], item["digest"][:MAX_DIGEST], scheme, source, profile=profile)
                datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])]))
            for run_id in (parent, child):
                request(client.update_run, run_id, status="RUNNING")
                if datasets:
                    self._send(client.log_inputs, run_id, datasets)
            self._log_params_and_tags(child, record)
            origin = record["tags"].get("start_from", "random")
            if origin != "random" and (origin_run := self._send(self._log_starting_weights, origin, child)) is not None:
                self._send(client.set_tag, child, "start_from.run_id", origin_run)
        elif kind == "tag":
            self._send(client.set_tag, self._run_id(stage), record["key"], record["value"][:MAX_TAG])
        elif kind == "rewind":
            marks = self._cursor.marks.get(str(stage), {})
            marks.update({key: min(step, record["step"]) for key, step in marks.items()})
        elif kind == "artifact":
            path = self._journal.file(record["file"])
            if path is not None and path.exists():
                folder = os.path.dirname(record["name"]) or None
                self._send(client.log_artifact, self._run_id(stage), str(path), folder)
            else:
                reason = "whose file is not in the journal" if path is None else f"because {path} is missing"
                self._report(f"tracking: skipped the artifact {record['name']}, {reason}")
        elif kind == "model":
            if (model_id := self._send(self._log_model, record, self._run_id(stage))) is not None:
                for of_stage in (stage, None):  # the points of its step, which the run already has with the same times
                    points = [point for point in record["points"] if point["stage"] == of_stage]
                    self._points_run = self._run_id(of_stage)
                    self._points = [
                        Metric(point["key"], float(point["value"]), point["at"], record["step"], model_id=model_id)
                        for point in points
                    ]
                    self.num_points -= len(points)  # already counted when the run's points were sent
                    self._send_points()
        elif kind == "model_gone":
            if (model := self._logged_models().get(record["url"])) is not None:
                self._send(client.delete_logged_model, model.model_id)
                del self._logged_models()[record["url"]]
        elif kind in ("stage_end", "run_end"):
            self._send(client.set_terminated, self._run_id(stage), record["status"], record["at"])

    def _log_params_and_tags(self, run: str, record: Record) -> None:
        """Log params and tags. A param that already has another value is immutable and becomes a tag."""
        from mlflow.entities import Param, RunTag

        existing = request(self._client.get_run, run).data.params
        params = {key: value[:MAX_PARAM] for key, value in record["params"].items()}
        changed = {f"mome.changed.{key}": value for key, value in params.items() if existing.get(key, value) != value}
        pairs: dict[str, list[Any]] = {
            "params": [Param(key, value) for key, value in params.items() if key not in existing],
            "tags": [RunTag(key, str(value)[:MAX_TAG]) for key, value in (record["tags"] | changed).items()],
        }
        for kind, items in pairs.items():
            for start in range(0, len(items), MAX_BATCH_PAIRS):
                self._send(self._client.log_batch, run, **{kind: items[start : start + MAX_BATCH_PAIRS]})

    def _logged_models(self) -> dict[str, LoggedModel]:
        """Return the server's models of this run by the URL of their weights, requested once per connection."""
        if self._models is None:
            models: dict[str, LoggedModel] = {}
            token, search = None, self._client.search_logged_models
            condition = f"tags.`mome.run` = '{self._run_record['run']}'"
            while True:
                page = request(search, [self._experiment], condition, max_results=100, page_token=token)
                models |= {model.tags["mome.url"]: model for model in page if "mome.url" in model.tags}
                if not (token := page.token):
                    break
            self._models, self._deleted = models, None
        return self._models

    def _log_model(self, record: Record, run_id: str) -> str | None:
        """Log weights of a stage's run once; return the model's id, or None if they have been deleted since."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        url, step, role, client = record["url"], record["step"], record["role"], self._client
        models = self._logged_models()
        if self._deleted is None:
            recorded = (own for session in self._journal.sessions() for _, own in self._journal.records(session))
            self._deleted = {own["url"] for own in recorded if own["kind"] == "model_gone"}
        if url in self._deleted:
            return None
        run = request(client.get_run, run_id)
        if (model := models.get(url)) is None:
            stage = run.data.tags.get("stage", str(record["stage"]))
            name = f"{self._run_record.get('name', 'run')}-{stage}-{step:08d}"
            tags = {"mome.run": self._run_record["run"], "mome.url": url, "mome.step": str(step), "mome.role": role}
            params = {"stage": stage, "step": str(step), "role": role}
            model = request(
                client.create_logged_model, self._experiment, _INVALID_IN_MODEL_NAMES.sub("-", name), run_id,
                tags | {"mlflow.model.isExternal": "true"}, params, "weights",  # MLflow does not store its files
            )  # fmt: skip
            models[url] = model
        if model.status != LoggedModelStatus.READY:  # it was created but not finalized
            models[url] = request(client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)
        # Checkpoints are not logged as outputs, because outputs cannot be removed.
        logged = {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}
        if role == FINAL_WEIGHTS and model.model_id not in logged:
            request(client.log_outputs, run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    def _log_starting_weights(self, url: str, run_id: str) -> str | None:
        """Make the weights at `url`, of this run or another, an input of a run; return the run that made them."""
        from mlflow.entities import LoggedModelInput

        client = self._client
        if (own := self._logged_models().get(url)) is not None:
            models = [request(client.get_logged_model, own.model_id)]
        elif "'" in url:  # it cannot be quoted in a filter
            return None
        else:
            experiments = [experiment.experiment_id for experiment in request(client.search_experiments)]
            search, condition = client.search_logged_models, f"tags.`mome.url` = '{url}'"
            models = list(request(search, experiments, condition, max_results=1))
        if not models:
            return None
        model = models[0]
        inputs = request(client.get_run, run_id).inputs
        if model.model_id not in {entry.model_id for entry in (inputs.model_inputs if inputs else ())}:
            request(client.log_inputs, run_id, models=[LoggedModelInput(model.model_id)])
        return model.source_run_id

    def _run_id(self, stage: int | None, start: Record | None = None) -> str:
        """Return the MLflow run id of a stage, or of the parent run for None.

        With its `start` record a missing run is created, in one request with the tags by which it is found, so that a
        lost response does not create a second one. Otherwise raises RunNotFound, and ServerUnavailable if the run is
        deleted.
        """
        if start is None and stage in self._runs:
            return self._runs[stage]
        condition, tags = "tags.`mome.role` = 'run'", {"mome.role": "run", "mome.run": self._run_record["run"]}
        if stage is not None:
            condition = f"tags.`mome.role` = 'stage' and tags.stage_index = '{stage}'"
        runs = self._search_runs(condition)
        if not runs:
            self._raise_if_deleted(*self._search_runs(condition, deleted=True))
            if start is None:
                raise RunNotFound(f"the {'parent run' if stage is None else f'run of stage {stage}'} no longer exists")
            if stage is not None:
                tags |= {"mome.role": "stage", "stage_index": str(stage), "mlflow.parentRunId": self._run_id(None)}
            create, name = self._client.create_run, start.get("name")
            runs = [request(create, self._experiment, start_time=start["at"], tags=tags, run_name=name)]
        self._runs[stage] = runs[0].info.run_id
        return self._runs[stage]

    def _search_runs(self, condition: str, deleted: bool = False) -> list[Any]:
        from mlflow.entities import ViewType

        client, view = self._client, ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        text = f"tags.`mome.run` = '{self._run_record['run']}' and {condition}"
        return request(client.search_runs, [self._experiment], text, view, order_by=["start_time ASC"])

    def _raise_if_deleted(self, *runs: Any) -> None:
        """Raise ServerUnavailable if a run or its experiment is deleted: once restored, it accepts the records."""
        known = runs or [request(self._client.get_run, run) for run in self._runs.values()]
        experiment = request(self._client.get_experiment, self._experiment)
        deleted = [f"its run {run.info.run_id}" for run in known if run.info.lifecycle_stage == "deleted"]
        if experiment.lifecycle_stage == "deleted":
            deleted = [f"its experiment {experiment.name}"]
        if deleted:
            raise ServerUnavailable(f"{deleted[0]} is deleted: restore it, or remove it for good with `mlflow gc`")

    def _send(self, action: Callable[..., Any], *args: Any, **values: Any) -> Any:
        """Return the result of a request; a rejection is reported instead of raised."""
        try:
            return request(action, *args, **values)
        except RequestRejected as error:
            self._raise_if_deleted()
            self._report(f"tracking: {redact(self._uri)} rejected a record, which only the journal has: {error}")
