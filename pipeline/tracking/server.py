"""Whether a run's tracking server answers, asked before the run is started."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import socket
import ssl
import stat
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from pipeline.config.background import within
from pipeline.config.errors import TrackingError
from pipeline.config.redaction import password_of, redact
from pipeline.config.schema import RunConfig
from pipeline.tracking.places import database_file, tracking_uri

ANSWER_SECONDS = 5.0
FAULTS = (OSError, http.client.HTTPException, ValueError)  # what an HTTP request may raise; ValueError: a malformed URL
_SQLITE_BEGINS = b"SQLite format 3\0"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_HOSTED = ("databricks", "databricks-uc", "uc", "azureml", "arn")  # services that MLflow or its plugins speak to
_EXPECTED = (
    "expected http(s)://…, sqlite:///path, postgresql://… or the URI of an installed MLflow plugin "
    "(MLflow's file store is not supported)"
)


def check_server(config: RunConfig) -> None:
    """Refuse to start a run whose tracking server does not answer, where `tracking.required` asks for that.

    Raises TrackingError. An answer takes at most about ten seconds; mlflow is not imported.
    """
    if not config.tracking.required:
        return
    uri = tracking_uri(config)
    fault = _fault_of(uri)
    if fault is not None:
        raise TrackingError(
            f"tracking.uri {redact(uri)}: {fault}. Start the server, correct the address, or set "
            "tracking.required=false: the run is then recorded locally and shipped later by `mome sync`"
        )


def get(url: str, limit: int = 2**16) -> tuple[int, bytes]:
    """Return status and body of a GET to an MLflow server, by the TLS settings that MLflow's client reads.

    Raises one of FAULTS when there is no answer, or not all of it in twice ANSWER_SECONDS: a server that sends a byte
    now and then never lets a socket time out.
    """
    return within(2 * ANSWER_SECONDS, lambda: _get(url, limit), "mome-ask")


def _get(url: str, limit: int) -> tuple[int, bytes]:
    handlers = [urllib.request.HTTPSHandler(context=_tls())] if url.lower().startswith("https:") else []
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=ANSWER_SECONDS) as answer:
            return answer.status, answer.read(limit)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(limit)


def _tls() -> ssl.SSLContext:
    """Return what MLFLOW_TRACKING_INSECURE_TLS, _SERVER_CERT_PATH, _CLIENT_CERT_PATH and requests' variables say."""
    context = ssl.create_default_context()
    bundle = _first_variable("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif bundle is not None:
        name, path = bundle
        try:
            context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
        except OSError as error:
            raise OSError(f"{name}={path}: no certificates can be read from it ({error})") from error
    if certificate := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        try:
            context.load_cert_chain(certificate)
        except OSError as error:
            raise OSError(f"MLFLOW_TRACKING_CLIENT_CERT_PATH={certificate}: no certificate ({error})") from error
    return context


def _first_variable(*names: str) -> tuple[str, str] | None:
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)


def _fault_of(uri: str) -> str | None:
    """What is wrong with the server at `uri`, in words; None when it answers."""
    if (database := database_file(uri)) is not None:
        return _fault_of_folder(database.absolute().parent) or _fault_of_file(database)
    try:
        return _fault_of_server(uri)
    except ValueError as error:
        return f"not a URI ({redact(str(error))}); {_EXPECTED}"


def _fault_of_server(uri: str) -> str | None:
    parts = urllib.parse.urlsplit(redact(uri))  # without the password, which may hold what ends a host
    engine, port = parts.scheme.partition("+")[0], parts.port
    if fault := _fault_of_password(uri, engine):
        return fault
    if parts.scheme in ("http", "https"):
        return _fault_of_http(redact(uri).rstrip("/"))
    if engine in _PORTS:
        return _fault_of_database(parts, engine, port or _PORTS[engine])
    if parts.scheme in _HOSTED or uri in _HOSTED or parts.scheme in _plugins():
        return None
    return _EXPECTED


def _plugins() -> set[str]:
    return {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")} - {"file"}


def _fault_of_password(uri: str, engine: str) -> str | None:
    """Characters that the library which connects would take for the end of the password."""
    ending = "@" if engine in _PORTS else "/?#@"
    wrong = [letter for letter in ending if letter in (password_of(uri) or "")]
    if not wrong:
        return None
    written = ", ".join(f"{letter} as {urllib.parse.quote(letter, safe='')}" for letter in wrong)
    return f"its password holds characters that end it in a URI; write {written}"


def _fault_of_file(database: Path) -> str | None:
    """What keeps SQLite from a file, whether or not it is there yet."""
    name = str(database).partition("?")[0]
    if name == "." or ":memory:" in name:
        return "a database in memory is lost with the process that writes it; give sqlite:///path of a file"
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            return f"{name} is not a file; give sqlite:///path of a file"
        with open(name, "rb") as file:
            if file.read(len(_SQLITE_BEGINS)) not in (_SQLITE_BEGINS, b""):
                return f"{name} is no SQLite database; give the path of one, or of none yet"
    except FileNotFoundError:
        return None  # it will be made
    except (OSError, ValueError) as error:
        return f"{name[:300]} cannot be used ({getattr(error, 'strerror', None) or error})"
    return None if os.access(name, os.W_OK) else f"{name} cannot be written"


def _fault_of_folder(folder: Path) -> str | None:
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, ValueError) as error:
        return f"{folder} cannot be reached ({error})"
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return None if writable else f"{existing} is not a folder that can be written"


def _fault_of_http(url: str) -> str | None:
    """Ask for its health, which DagsHub's and GitLab's servers do not tell, then for what every server knows."""
    try:
        status, body = get(f"{url}/health")
        if status == 200 and body.strip() == b"OK":
            return None
        if status < 500 and status not in (401, 403):
            status, body = get(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    except urllib.error.URLError as error:
        return f"the server does not answer ({error.reason})"
    except FAULTS as error:
        return f"the server does not answer in HTTP ({type(error).__name__}: {error})"
    # 401 and 403: it is there; whether it lets us in shows when it is asked for a run.
    if status in (401, 403) or _is_mlflow(body):
        return None
    return f"the server answered {status} {http.client.responses.get(status, '')}; is it an MLflow server?"


def _is_mlflow(body: bytes) -> bool:
    """Return True for an answer of MLflow's API: an experiment, or one of its errors."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and not answer.keys().isdisjoint(("experiment", "error_code"))


def _fault_of_database(parts: urllib.parse.SplitResult, engine: str, port: int) -> str | None:
    query = dict(urllib.parse.parse_qsl(parts.query))
    host = parts.hostname or query.get("host", "")
    if path := query.get("unix_socket"):
        return _fault_of_address(socket.AF_UNIX, path)
    if host.startswith("/"):
        return _fault_of_address(socket.AF_UNIX, f"{host}/.s.PGSQL.{query.get('port', port)}")
    if not host or "," in host or (engine == "mssql" and parts.port is None and "driver" not in query):
        return None  # the driver decides: its default socket, one of several hosts, a data source by name
    return _fault_of_address(None, (host, int(query.get("port", port))))


def _fault_of_address(family: socket.AddressFamily | None, address: str | tuple[str, int]) -> str | None:
    try:
        if family is None:
            socket.create_connection(address, timeout=ANSWER_SECONDS).close()  # type: ignore[arg-type]
        else:
            with socket.socket(family) as knock:
                knock.settimeout(ANSWER_SECONDS)
                knock.connect(address)
    except (OSError, OverflowError) as error:
        return f"the database does not answer at {address if family else f'{address[0]}:{address[1]}'} ({error})"
    return None
