"""Whether a run's tracking server answers, asked before the run is started."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.tracking.places import database_file, tracking_uri

ANSWER_SECONDS = 5.0


def check_server(config: RunConfig) -> None:
    """Refuse to start a run whose tracking server does not answer, where `tracking.required` asks for that.

    Raises TrackingError. An answer takes at most about five seconds; mlflow is not imported.
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


def _fault_of(uri: str) -> str | None:
    """What is wrong with the server at `uri`, in words; None when it answers."""
    if (database := database_file(uri)) is not None:
        return _fault_of_folder(database.absolute().parent)
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return _fault_of_http(redact(uri).rstrip("/") + "/health")
    if parts.scheme.startswith(("postgresql", "mysql", "mssql")):
        return _fault_of_port(parts.hostname or "localhost", parts.port or 5432)
    if parts.scheme == "databricks" or uri == "databricks":
        return None
    return "expected http(s)://…, sqlite:///path or postgresql://… (MLflow's file store is not supported)"


def _fault_of_folder(folder: Path) -> str | None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return None if writable else f"{existing} is not a folder that can be written"


def _fault_of_http(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there; whether it lets us in shows when it is asked for a run
            return None
        return f"the server answered {error.code} {error.reason} to {url}; is it an MLflow server?"
    except urllib.error.URLError as error:
        return f"the server does not answer ({error.reason})"
    except OSError as error:
        return f"the server does not answer ({error})"


def _fault_of_port(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        return f"the database does not answer ({error})"
    return None
