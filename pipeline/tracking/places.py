"""Where a run is recorded: its MLflow server and experiment, its id there, and its journal on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pipeline.config.paths import is_local, local_path
from pipeline.config.schema import RunConfig
from pipeline.tracking.committed import CommittedJournal, Store
from pipeline.tracking.journal import Journal

_SQLITE = "sqlite:///"


def tracking_uri(config: RunConfig) -> str:
    """The MLflow URI of a run: as configured, else SQLite beside the run's folder, or in the working folder when
    the run's folder is remote."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    folder = local_path(config.output) if is_local(config.output) else Path.cwd()
    return f"{_SQLITE}{folder}/mlflow.db"


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
