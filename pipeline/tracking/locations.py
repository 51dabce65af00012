"""Locations of a run's records: MLflow server and experiment, run id, journal on this machine and in the storage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.errors import MomeError, TrackingError
from pipeline.config.load import resolve_secret
from pipeline.config.redaction import remember
from pipeline.config.schema import REFERENCE, RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.tracking.journal import RUN_ID, CommittedJournal, Journal

if TYPE_CHECKING:
    from pipeline.data.storage import Storage

RUN_FILE = "tracking.json"
_SQLITE = "sqlite:///"
_SET_CACHE = "set MOME_CACHE to a folder that can be written"


def tracking_uri(config: RunConfig) -> str:
    """Return the run's MLflow URI to connect to, never to record or show: it may contain a password."""
    return resolve_uri(configured_uri(config))


def configured_uri(config: RunConfig) -> str:
    """Return the run's MLflow URI as configured, possibly a secret reference; SQLite by default."""
    return config.tracking.uri if config.tracking.uri is not None else default_uri(config.output)


def default_uri(output: str) -> str:
    """Return the default MLflow URI: SQLite in the folder `output`, or in the working folder if that is remote."""
    return f"{_SQLITE}{local_path(output) if is_local(output) else Path.cwd()}/mlflow.db"


def resolve_uri(uri: str) -> str:
    """Resolve an MLflow URI, which may be a reference 'env:NAME' or 'file:PATH'. Raises ConfigError if it is empty."""
    if REFERENCE.match(uri):
        uri = resolve_secret(uri) or ""
    remember(uri)
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite URI; None for any other URI."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def absolute_uri(uri: str) -> str:
    """Return the URI with an SQLite path made independent of the working folder."""
    return uri if (file := sqlite_file(uri)) is None else f"{_SQLITE}{local_path(str(file))}"


def experiment_name(config: RunConfig) -> str:
    """Return the run's MLflow experiment: as configured, else the model family, whose runs are comparable."""
    return config.tracking.experiment or config.model.kind


def read_run_id(config: RunConfig, storage: Storage) -> str | None:
    """Return the id that tags the run's MLflow runs as `mome.run`; None before the first start."""
    if not storage.exists(url := f"{config.folder}/{RUN_FILE}"):
        return None
    data = storage.read(url)
    try:
        run = json.loads(data)["run"]
        if re.fullmatch(RUN_ID, run):
            return str(run)
        reason = f"{run!r:.80} is not a run id"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error)
    raise TrackingError(f"{url} is damaged ({reason}): restore it, or delete it to record the run as a new one")


def journal_folder(folder: str) -> Path:
    """Return the folder of the run's journal on this machine: in the run's folder, or in the cache if it is remote."""
    if is_local(folder):
        return local_path(folder) / "journal"
    try:
        root = Path(os.environ.get("MOME_CACHE") or "~/.cache/mome").expanduser().absolute()
    except RuntimeError as error:
        raise TrackingError(f"no folder for the journal of {folder}: {error}; {_SET_CACHE}") from error
    return root / hashlib.sha256(folder.rstrip("/").encode()).hexdigest()[:16] / "journal"


def read_journal(folder: str, storage: Storage) -> Journal:
    """Return the journal of the run in `folder`, after downloading what was committed by other machines."""
    journal = Journal(journal_folder(folder))
    with journal_write_errors(journal):
        CommittedJournal(storage, folder).restore(journal)
    return journal


@contextlib.contextmanager
def journal_write_errors(journal: Journal) -> Iterator[None]:
    """Convert an OSError into a TrackingError that names the remedy."""
    try:
        yield
    except MomeError:
        raise
    except OSError as error:
        raise TrackingError(
            f"the run's journal cannot be written in {journal.folder} ({error.strerror or error}); set `output` to a "
            f"writable folder or, if it is remote, {_SET_CACHE}"
        ) from error
