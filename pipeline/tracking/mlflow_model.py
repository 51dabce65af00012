"""Registers a model that MLflow loads by itself: `mlflow.pyfunc.load_model("models:/NAME@ALIAS")`.

It holds the weights as files, our code as it was, and the name of the module that loads them: no pickle, and no copy of
this repository where it is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import redact
from pipeline.tracking.mlflow_client import connect, experiment_id
from pipeline.tracking.places import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

VECTORS = ("image_embedding", "text_embedding")


@dataclass(frozen=True)
class Export:
    """What is registered: a folder, the module whose `_load_pyfunc` reads it, and what is told of it."""

    folder: Path
    loader: str  # a module of `code`
    code: Sequence[Path]  # packages that are copied into the model
    requirements: Sequence[str]
    outputs: Sequence[str]  # the columns of an answer
    example: Mapping[str, Any]  # a request of one row
    step: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    run: str | None  # the campaign that made it, as `mome.run` names it
    stage_index: int


@dataclass(frozen=True)
class Registered:
    """A version in MLflow's registry."""

    name: str
    version: int
    alias: str | None
    model_id: str
    run_id: str | None  # of the stage that made it, where the server knows it
    uri: str  # for `mlflow.pyfunc.load_model`


def register(uri: str, experiment: str, name: str, alias: str | None, export: Export) -> Registered:
    """Log `export` as a model of the stage that made it, register it as the next version of `name`, set the alias.

    Raises TrackingError with what the server refused.
    """
    uri = resolve_uri(uri)
    client = connect(uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        return _register(client, uri, experiment, name, alias, export)
    except MlflowException as error:
        raise TrackingError(
            f"tracking.uri {redact(uri)}: the server did not register {name}: {error}. Check its "
            "address, and the name and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from error


def _register(
    client: MlflowClient, uri: str, experiment: str, name: str, alias: str | None, export: Export
) -> Registered:
    import mlflow
    from mlflow.entities import LoggedModelOutput

    run_id, place = _made_by(client, export) or (None, experiment_id(client, uri, experiment))
    model = client.create_logged_model(place, name, run_id, dict(export.tags), dict(export.params), model_type="export")
    mlflow.pyfunc.log_model(
        model_id=model.model_id,
        loader_module=export.loader,
        data_path=str(export.folder),
        code_paths=[str(package) for package in export.code],
        pip_requirements=list(export.requirements),
        signature=signature(export.outputs),
        input_example=_frame(export.example),
    )
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=export.step)])
    version = _version(client, name, model.model_id, run_id, dict(export.tags))
    if alias is not None:
        client.set_registered_model_alias(name, alias, str(version))
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    return Registered(name, version, alias, model.model_id, run_id, address)


def _version(client: MlflowClient, name: str, model_id: str, run_id: str | None, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return int(client.create_model_version(name, f"models:/{model_id}", run_id, tags, model_id=model_id).version)


def signature(outputs: Sequence[str]) -> ModelSignature:
    """Of a request: an encoded picture, a text, or both, in a row; and of the answer's columns."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    asked: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.binary, "image", required=False),
        ColSpec(DataType.string, "text", required=False),
    ]
    answered: list[ColSpec | TensorSpec] = [
        ColSpec(Array(DataType.double) if name in VECTORS else DataType.double, name, required=False)
        for name in outputs
    ]
    matching = ParamSchema([ParamSpec("itm", DataType.boolean, True)])
    return ModelSignature(inputs=Schema(asked), outputs=Schema(answered), params=matching)


def _frame(row: Mapping[str, Any]) -> Any:
    import pandas as pd

    return pd.DataFrame([dict(row)])


def _made_by(client: MlflowClient, export: Export) -> tuple[str, str] | None:
    """(run, experiment) of the stage that made it; None where the server knows none."""
    if export.run is None:
        return None
    asked = f"tags.`mome.run` = '{export.run}' and tags.stage_index = '{export.stage_index}'"
    everywhere = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(everywhere, filter_string=asked, max_results=1)
    return (runs[0].info.run_id, runs[0].info.experiment_id) if runs else None
