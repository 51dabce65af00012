"""An MLflow server as we ask it: its client, the experiment, and what its failures mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import describe_error, redact, remember
from pipeline.tracking.places import database_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

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


def ask(action: Callable[..., T], *args: Any, **values: Any) -> T:
    """One request. Its failures become Outage, Refused or RunGone."""
    from mlflow.exceptions import MlflowException

    try:
        return action(*args, **values)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RunGone(redact(str(error))) from error
        kind = Refused if error.error_code in REFUSED else Outage
        raise kind(redact(str(error))) from error
    except Exception as error:  # connection, database and file faults of every library underneath
        raise Outage(describe_error(error)) from error


def prepare_client() -> None:
    """Call it before the first import of mlflow, which reads these variables once."""
    os.environ.update(CLIENT_ENVIRONMENT)


def connect(uri: str) -> MlflowClient:
    """An MLflow client. Creates or migrates an SQLite database, which takes seconds. Raises TrackingError."""
    if (database := database_file(uri)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):  # which the client sends
        remember(os.environ.get(name, ""))
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # of any library underneath: a driver that is missing, a URI that none reads
        raise TrackingError(
            f"tracking.uri {redact(uri)}: MLflow's client cannot use it ({describe_error(error)})"
        ) from error


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Of the experiment of that name, which is created where there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    return client.create_experiment(name, artifact_location=artifact_location(uri, name))


def artifact_location(uri: str, experiment: str) -> str | None:
    """Beside an SQLite database; a server decides for itself."""
    database = database_file(uri)
    return None if database is None else (database.absolute().parent / "mlartifacts" / experiment).as_uri()
