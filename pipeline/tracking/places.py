"""Where a run is recorded: its MLflow server and experiment, its id there, and its journal on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pipeline.config.errors import ConfigError
from pipeline.config.load import resolve_secret
from pipeline.config.paths import is_local, local_path
from pipeline.config.redaction import remember
from pipeline.config.schema import RunConfig, is_reference
from pipeline.tracking.committed import CommittedJournal, Store
from pipeline.tracking.journal import Journal

_SQLITE = "sqlite:///"


def tracking_uri(config: RunConfig) -> str:
    """Return the MLflow URI of a run, which may hold a password: for connections, never for a record.

    Raises ConfigError where it is a reference to nothing.
    """
    return resolve_uri(named_uri(config))


def named_uri(config: RunConfig) -> str:
    """Return the MLflow URI of a run as it is configured, maybe as a reference, else SQLite."""
    return config.tracking.uri if config.tracking.uri is not None else default_uri(config.output)


def default_uri(output: str) -> str:
    """Return the MLflow URI of the runs in the folder `output` that are configured without one.

    SQLite beside the runs' folders, or in the working folder when `output` is remote.
    """
    folder = local_path(output) if is_local(output) else Path.cwd()
    return f"{_SQLITE}{folder}/mlflow.db"


def resolve_uri(uri: str) -> str:
    """Return an MLflow URI given as it is, or as 'env:NAME' or 'file:PATH'. Raises ConfigError for an empty one."""
    if is_reference(uri):
        reference, uri = uri, (resolve_secret(uri) or "").strip()
        if not uri:
            raise ConfigError(f"tracking.uri: {reference} is empty; expected the URI of an MLflow server")
    remember(uri)
    return uri


def database_file(uri: str) -> Path | None:
    """The file of an SQLite URI; None for a server's."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def absolute_uri(uri: str) -> str:
    """The same server or file, whatever the working folder."""
    return uri if (file := database_file(uri)) is None else f"{_SQLITE}{local_path(str(file))}"


def experiment_of(config: RunConfig) -> str:
    """The MLflow experiment of a run: as configured, else the family of its model, whose runs are worth comparing."""
    return config.tracking.experiment or config.model.kind


def run_of(config: RunConfig, storage: Store) -> str | None:
    """What every MLflow run of this run is tagged with as `mome.run`; None before it was first started."""
    url = f"{config.folder}/tracking.json"
    return json.loads(storage.read(url))["run"] if storage.exists(url) else None


def journal_folder(folder: str) -> Path:
    """Where this machine keeps the journal of the run in `folder`: there, or in the cache when that is remote."""
    if is_local(folder):
        return local_path(folder) / "journal"
    root = Path(os.environ.get("MOME_CACHE", "~/.cache/mome")).expanduser()
    return root / hashlib.sha256(folder.rstrip("/").encode()).hexdigest()[:16] / "journal"


def committed_journal(folder: str, storage: Store) -> CommittedJournal | None:
    """The journal's copy in a remote run's folder; None for a local run, whose journal is there itself."""
    return None if is_local(folder) else CommittedJournal(storage, f"{folder.rstrip('/')}/journal")


def read_journal(folder: str, storage: Store) -> Journal:
    """The journal of the run in `folder`, as far as it is known here or committed there."""
    journal = Journal(journal_folder(folder))
    if (committed := committed_journal(folder, storage)) is not None:
        committed.restore(journal)
    return journal
