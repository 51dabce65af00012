"""A run's weights in MLflow: checkpoints and final weights as LoggedModels, and exports in the model registry.

`LoggedModels` logs only the weights' URL (`mome.url`), step and results, so that `search_logged_models` ranks
checkpoints; the files stay in the run's storage. `register` stores a model that
`mlflow.pyfunc.load_model("models:/NAME@ALIAS")` loads by itself: weights, the code that reads them and the name of the
loader module, without pickle and without this repository on the serving machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import redact
from pipeline.tracking.journal import FINAL_WEIGHTS, Journal, Record
from pipeline.tracking.locations import resolve_uri
from pipeline.tracking.mlflow_server import CREDENTIALS, connect, experiment_id, request

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.types.schema import ColSpec, TensorSpec

IS_EXTERNAL = "mlflow.model.isExternal"  # MLflow's tag of models whose files it does not store
VECTORS = ("image_embedding", "text_embedding")
_INVALID_IN_NAMES = re.compile(r"[/:.%\"']")
_PAGE_SIZE = 100


class LoggedModels:
    """The LoggedModels of one run on one server. A model from which a later run starts becomes that run's input."""

    def __init__(self, client: MlflowClient, experiment: str, run_record: Record, journal: Journal):
        self._client, self._experiment, self._journal = client, experiment, journal
        self._run, self._name = run_record["run"], run_record.get("name", "run")

    @cached_property
    def _deleted(self) -> set[str]:
        """URLs of weights deleted before the first was logged: logging a model only to delete it later is avoided."""
        return {record["url"] for record in self._journal.all_records() if record["kind"] == "model_gone"}

    @cached_property
    def by_url(self) -> dict[str, LoggedModel]:
        """The server's models of this run, requested once."""
        models: list[LoggedModel] = []
        condition, token, search = f"tags.`mome.run` = '{self._run}'", None, self._client.search_logged_models
        while True:
            page = request(search, [self._experiment], condition, max_results=_PAGE_SIZE, page_token=token)
            models += page
            token = page.token
            if not token:
                return {model.tags["mome.url"]: model for model in models if "mome.url" in model.tags}

    def log(self, record: Record, run_id: str) -> str | None:
        """Log weights of a stage's run once; return the model's id, or None if they have been deleted since."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        url, step, role = record["url"], record["step"], record["role"]
        if url in self._deleted:
            return None
        run, model = request(self._client.get_run, run_id), self.by_url.get(url)
        if model is None:
            stage = run.data.tags.get("stage", str(record["stage"]))
            name = _INVALID_IN_NAMES.sub("-", f"{self._name}-{stage}-{step:08d}")
            tags = {"mome.run": self._run, "mome.url": url, "mome.step": str(step), "mome.role": role}
            params = {"stage": stage, "step": str(step), "role": role}
            create = self._client.create_logged_model
            model = request(create, self._experiment, name, run_id, tags | {IS_EXTERNAL: "true"}, params, "weights")
            self.by_url[url] = model
        if model.status != LoggedModelStatus.READY:  # it was created but not finalized
            self.by_url[url] = request(self._client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)
        # Checkpoints are not logged as outputs, because outputs cannot be removed.
        logged = {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}
        if role == FINAL_WEIGHTS and model.model_id not in logged:
            request(self._client.log_outputs, run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    def start_from(self, url: str, run_id: str) -> str | None:
        """Make the weights at `url` an input of a run; return the run that made them, if this server knows it.

        They belong to this run, or else to any run in any experiment.
        """
        from mlflow.entities import LoggedModelInput

        if (own := self.by_url.get(url)) is not None:
            model = request(self._client.get_logged_model, own.model_id)
        elif "'" in url:  # cannot be quoted in a filter
            return None
        else:
            experiments = [experiment.experiment_id for experiment in request(self._client.search_experiments)]
            condition = f"tags.`mome.url` = '{url}'"
            models = request(self._client.search_logged_models, experiments, condition, max_results=1)
            if not models:
                return None
            model = models[0]
        inputs = request(self._client.get_run, run_id).inputs
        if model.model_id not in {entry.model_id for entry in (inputs.model_inputs if inputs else ())}:
            request(self._client.log_inputs, run_id, models=[LoggedModelInput(model.model_id)])
        return model.source_run_id


def register(
    uri: str,
    experiment: str,
    name: str,
    alias: str | None,
    *,
    run: str | None,
    stage_index: int,
    step: int,
    outputs: Sequence[str],
    params: dict[str, str],
    tags: dict[str, str],
    **pyfunc: Any,
) -> dict[str, Any]:
    """Log a model of the stage that made it, register it as the next version of `name`, set the alias.

    `run` is the tag `mome.run` of the run that made it, and `pyfunc` the model's files, code and example, as
    `mlflow.pyfunc.log_model` takes them. A prediction reads per row an encoded image, a text, or both, and returns one
    column per output. The result has the "name", "version", "alias", "model_id", the stage's MLflow "run_id" (None if
    the server does not know it), and the "uri" for `mlflow.pyfunc.load_model`. Raises TrackingError with the server's
    error.
    """
    uri = resolve_uri(uri)
    client = connect(uri)
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {"image": DataType.binary, "text": DataType.string}
    inputs: list[ColSpec | TensorSpec] = [ColSpec(kind, column, required=False) for column, kind in kinds.items()]
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(Array(DataType.double) if output in VECTORS else DataType.double, output, required=False)
        for output in outputs
    ]
    matching = ParamSchema([ParamSpec("itm", DataType.boolean, True)])
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        runs: list[Any] = []
        if run is not None:  # the MLflow run of the stage, if the server knows it
            condition = f"tags.`mome.run` = '{run}' and tags.stage_index = '{stage_index}'"
            experiments = [entry.experiment_id for entry in client.search_experiments()]
            runs = client.search_runs(experiments, filter_string=condition, max_results=1)
        run_id = runs[0].info.run_id if runs else None
        place = runs[0].info.experiment_id if runs else experiment_id(client, uri, experiment)
        model = client.create_logged_model(place, name, run_id, tags, params, model_type="export")
        signature = ModelSignature(inputs=Schema(inputs), outputs=Schema(columns), params=matching)
        mlflow.pyfunc.log_model(model_id=model.model_id, signature=signature, **pyfunc)
        if run_id is not None:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model.model_id}"
        version = int(client.create_model_version(name, source, run_id, tags, model_id=model.model_id).version)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    except MlflowException as error:
        fault = f"the server did not register {name}: {error}. {CREDENTIALS}"
        raise TrackingError(f"tracking.uri {redact(uri)}: {fault}") from error
    return {
        "name": name, "version": version, "alias": alias, "model_id": model.model_id, "run_id": run_id,
        "uri": f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}",
    }  # fmt: skip


def download_weights(uri: str, folder: Path, tracking_uri: str | None = None) -> str:
    """Download a registered model into `folder` and return its folder of weights.

    `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises TrackingError where the registry has no such model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        model = mlflow.artifacts.download_artifacts(uri, dst_path=str(folder), tracking_uri=tracking_uri)
        flavor = Model.load(model).flavors["python_function"]
        return str(Path(model) / flavor["data"])
    except (MlflowException, OSError, KeyError) as error:
        raise TrackingError(
            f"{uri}: not found in MLflow's registry at {redact(tracking_uri or mlflow.get_registry_uri())}: {error}. "
            "Check the name, the version or alias, and the tracking URI"
        ) from error
