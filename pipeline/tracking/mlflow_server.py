"""A run's MLflow server: a check that need not import mlflow, the client and its errors, and the model registry."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import logging
import os
import socket
import ssl
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.background import within
from pipeline.config.errors import TrackingError
from pipeline.config.redaction import describe_error, password_of, redact, remember
from pipeline.config.schema import RunConfig
from pipeline.tracking.locations import resolve_uri, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.types.schema import ColSpec, TensorSpec

T = TypeVar("T")

ANSWER_SECONDS = 5.0
HTTP_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: a malformed URL
CLIENT_ENVIRONMENT = {  # to be set before mlflow is imported, which reads it once
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a request that the client repeats could create a run twice
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_SQLITE_MAGIC = b"SQLite format 3\0"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_HOSTED = ("databricks", "databricks-uc", "uc", "azureml", "arn")  # services of MLflow or its plugins
_REJECTED_CODES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
CREDENTIALS = "Check its address, and the credentials in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
VECTORS = ("image_embedding", "text_embedding")  # outputs of a registered model that are lists of numbers
_EXPECTED = (
    "expected http(s)://…, sqlite:///path, postgresql://… or the URI of an installed MLflow plugin "
    "(MLflow's file store is not supported)"
)

# ---- check without mlflow


def check_server(config: RunConfig, required: bool | None = None) -> None:
    """Raise TrackingError if tracking is `required` (default: the config's) and no server responds within 10 s."""
    is_required = config.tracking.required if required is None else required
    if is_required and (fault := find_fault(uri := tracking_uri(config))) is not None:
        raise TrackingError(
            f"tracking.uri {redact(uri)}: {fault}. Start the server, correct the address, or set "
            "tracking.required=false: the run is then recorded locally and uploaded later by `mome sync`"
        )


def find_fault(uri: str) -> str | None:
    """Return what is wrong with the server or database at `uri`; None if it responds."""
    if (database := sqlite_file(uri)) is not None:
        return _fault_of_sqlite(database)
    try:
        parts = urllib.parse.urlsplit(redact(uri))  # redacted: a password may contain characters that end a host
        engine, port, place = parts.scheme.partition("+")[0], parts.port, ""
        terminators = "@" if engine in _PORTS else "/?#@"
        if unquoted := [letter for letter in terminators if letter in (password_of(uri) or "")]:
            escapes = ", ".join(f"{letter} as {urllib.parse.quote(letter, safe='')}" for letter in unquoted)
            return f"its password contains characters that end it in a URI; write {escapes}"
        if parts.scheme in ("http", "https"):
            return _fault_of_http(redact(uri).rstrip("/"))
        if engine in _PORTS:
            query = dict(urllib.parse.parse_qsl(parts.query))
            host, number = parts.hostname or query.get("host", ""), query.get("port", port or _PORTS[engine])
            place = query.get("unix_socket") or (f"{host}/.s.PGSQL.{number}" if host.startswith("/") else "")
            if place:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(ANSWER_SECONDS)
                    connection.connect(place)
            # Otherwise the driver chooses: a default socket, one of several hosts, or a data source name.
            elif host and "," not in host and (engine != "mssql" or parts.port is not None or "driver" in query):
                place = f"{host}:{int(number)}"
                socket.create_connection((host, int(number)), timeout=ANSWER_SECONDS).close()
            return None
    except ValueError as error:
        return f"not a URI ({redact(str(error))}); {_EXPECTED}"
    except (OSError, OverflowError) as error:
        return f"the database does not answer at {place} ({error})"
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")} - {"file"}
    return None if parts.scheme in _HOSTED or uri in _HOSTED or parts.scheme in plugins else _EXPECTED


def _fault_of_sqlite(database: Path) -> str | None:
    folder = database.absolute().parent
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, ValueError) as error:
        return f"{folder} cannot be reached ({error})"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not a writable folder"
    name = str(database).partition("?")[0]
    if name == "." or ":memory:" in name:
        return "a database in memory is lost with its process; give sqlite:///path of a file"
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            return f"{name} is not a file; give sqlite:///path of a file"
        with open(name, "rb") as file:
            if file.read(len(_SQLITE_MAGIC)) not in (_SQLITE_MAGIC, b""):
                return f"{name} is not an SQLite database; give the path of one, or of a new file"
    except FileNotFoundError:
        return None  # MLflow creates it
    except (OSError, ValueError) as error:
        return f"{name[:300]} cannot be used ({getattr(error, 'strerror', None) or error})"
    return None if os.access(name, os.W_OK) else f"{name} is not writable"


def _fault_of_http(url: str) -> str | None:
    """Request /health, which DagsHub and GitLab do not offer, and then an experiment, which every server knows."""
    try:
        status, body = http_get(f"{url}/health")
        if status == 200 and body.strip() == b"OK":
            return None
        if status < 500 and status not in (401, 403):
            status, body = http_get(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    except urllib.error.URLError as error:
        return f"the server does not answer ({error.reason})"
    except HTTP_ERRORS as error:
        return f"the server does not answer in HTTP ({type(error).__name__}: {error})"
    # 401 and 403 prove that a server responds; MLflow's client reports rejected credentials with its first request.
    if status in (401, 403):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        response = json.loads(body)
        if isinstance(response, dict) and ("experiment" in response or "error_code" in response):  # of MLflow's API
            return None
    return f"the server answered {status} {http.client.responses.get(status, '')}; is it an MLflow server?"


def http_get(url: str, limit: int = 2**16) -> tuple[int, bytes]:
    """Return (status, body) of a GET request with the TLS settings of MLflow's client. Raises one of HTTP_ERRORS."""

    def get() -> tuple[int, bytes]:
        handlers = []
        if url.lower().startswith("https:"):  # MLflow's MLFLOW_TRACKING_* variables, and requests' CA bundle variables
            context = ssl.create_default_context()
            bundles = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
            name = next((name for name in bundles if os.environ.get(name)), "")
            try:
                if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                elif name:
                    is_folder = os.path.isdir(os.environ[name])
                    context.load_verify_locations(**{"capath" if is_folder else "cafile": os.environ[name]})
                if os.environ.get(name := "MLFLOW_TRACKING_CLIENT_CERT_PATH"):
                    context.load_cert_chain(os.environ[name])
            except OSError as error:
                raise OSError(f"{name}={os.environ[name]}: cannot read certificates from it ({error})") from error
            handlers.append(urllib.request.HTTPSHandler(context=context))
        try:
            with urllib.request.build_opener(*handlers).open(url, timeout=ANSWER_SECONDS) as response:
                return response.status, response.read(limit)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(limit)

    return within(2 * ANSWER_SECONDS, get, "mome-http-get")


# ---- MLflow's client


class ServerUnavailable(Exception):
    """The server did not respond, or not as expected; the same request may succeed later."""


class RequestRejected(Exception):
    """The server rejected the request; repeating it is useless."""


class RunNotFound(Exception):
    """A run that was uploaded earlier no longer exists on the server."""


def request(action: Callable[..., T], *args: Any, **values: Any) -> T:
    """Return `action(*args, **values)`; errors become ServerUnavailable, RequestRejected or RunNotFound."""
    from mlflow.exceptions import MlflowException

    try:
        return action(*args, **values)
    except (ServerUnavailable, RequestRejected, RunNotFound):
        raise
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RunNotFound(redact(str(error))) from error
        kind = RequestRejected if error.error_code in _REJECTED_CODES else ServerUnavailable
        raise kind(redact(str(error))) from error
    except Exception as error:  # connection, database and file errors of any underlying library
        raise ServerUnavailable(describe_error(error)) from error


def connect(uri: str) -> MlflowClient:
    """Return an MLflow client. Creates or migrates an SQLite database, which takes seconds. Raises TrackingError."""
    if (database := sqlite_file(uri)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):  # secrets that error messages may quote
        remember(os.environ.get(name, ""))
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # such as a missing driver or an unknown URI scheme
        raise TrackingError(
            f"tracking.uri {redact(uri)}: MLflow's client cannot use it ({describe_error(error)})"
        ) from error


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of the experiment `name`, created if necessary; a server chooses the place of its artifacts."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    database = sqlite_file(uri)
    location = None if database is None else (database.absolute().parent / "mlartifacts" / name).as_uri()
    return client.create_experiment(name, artifact_location=location)


def try_writing(uri: str, experiment: str) -> str:
    """Write, read back and delete a run, in `experiment` or MLflow's default; describe it. Raises TrackingError."""
    if (database := sqlite_file(uri)) is not None and not database.exists():
        return "its database will be created with the run"
    client = connect(uri)
    try:
        existing = client.get_experiment_by_name(experiment)
        run = client.create_run(existing.experiment_id if existing else "0", run_name="mome preflight")
        try:
            client.set_tag(run.info.run_id, "mome.preflight", "written")
            tags = client.get_run(run.info.run_id).data.tags
        finally:
            client.delete_run(run.info.run_id)
    except Exception as error:  # connection and database errors of any underlying library
        fault = f"the server refused a run: {describe_error(error)}. {CREDENTIALS}"
        raise TrackingError(f"tracking.uri {redact(uri)}: {fault}") from error
    if tags.get("mome.preflight") != "written":
        raise TrackingError(f"tracking.uri {redact(uri)}: a tag that was written could not be read back")
    return "a run was written, read back and deleted"


# ---- MLflow's model registry


def register(
    uri: str, experiment: str, name: str, alias: str | None, *, run: str | None, stage_index: int, step: int,
    outputs: Sequence[str], params: dict[str, str], tags: dict[str, str], **pyfunc: Any,
) -> dict[str, Any]:  # fmt: skip
    """Log a model of the stage that made it, register it as the next version of `name`, set the alias.

    `mlflow.pyfunc.load_model` loads it without pickle and without this repository. A prediction reads per row an
    encoded image, a text, or both, and returns one column per output. `run` is the tag `mome.run` of the run that made
    it, and `pyfunc` the model's files, code and example, as `mlflow.pyfunc.log_model` takes them. Returns "name",
    "version", "alias", "model_id", the stage's MLflow "run_id" (None if the server does not know it), and the "uri" for
    `load_model`. Raises TrackingError with the server's error.
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
    types = {output: Array(DataType.double) if output in VECTORS else DataType.double for output in outputs}
    columns: list[ColSpec | TensorSpec] = [ColSpec(kind, output, required=False) for output, kind in types.items()]
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
    """Download models:/NAME@ALIAS or /VERSION into `folder`; return its weights' folder. Raises TrackingError."""
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
