"""Where a run is recorded: its MLflow server and experiment, its id there, and its journal on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.errors import ConfigError, MomeError, TrackingError
from pipeline.config.load import resolve_secret
from pipeline.config.redaction import remember
from pipeline.config.schema import RunConfig, is_reference
from pipeline.config.urls import is_local, local_path
from pipeline.tracking.committed import CommittedJournal, Store
from pipeline.tracking.journal import Journal
from pipeline.tracking.records import RUN_ID

RUN_FILE = "tracking.json"
_SQLITE = "sqlite:///"
_SET_CACHE = "set MOME_CACHE to a folder that can be written"
_RESTORE_RUN = "Restore it, or delete it: the run is then recorded as a new one"


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
    url = f"{config.folder}/{RUN_FILE}"
    if not storage.exists(url):
        return None
    data = storage.read(url)
    try:
        run = json.loads(data)["run"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TrackingError(f"{url} is damaged ({error}): {_RESTORE_RUN}") from error
    if not isinstance(run, str) or not re.fullmatch(RUN_ID, run):
        raise TrackingError(f"{url} is damaged: no id of a run in it. {_RESTORE_RUN}")
    return run


def journal_folder(folder: str) -> Path:
    """Where this machine keeps the journal of the run in `folder`: there, or in the cache when that is remote."""
    if is_local(folder):
        return local_path(folder) / "journal"
    try:
        root = Path(os.environ.get("MOME_CACHE") or "~/.cache/mome").expanduser().absolute()
    except RuntimeError as error:
        raise TrackingError(f"the journal of {folder} has no place: {error}; {_SET_CACHE}") from error
    return root / hashlib.sha256(folder.rstrip("/").encode()).hexdigest()[:16] / "journal"


def committed_journal(folder: str, storage: Store) -> CommittedJournal | None:
    """The journal's copy in a remote run's folder; None for a local run, whose journal is there itself."""
    return None if is_local(folder) else CommittedJournal(storage, f"{folder.rstrip('/')}/journal")


def read_journal(folder: str, storage: Store) -> Journal:
    """The journal of the run in `folder`, as far as it is known here or committed there."""
    journal = Journal(journal_folder(folder))
    if (committed := committed_journal(folder, storage)) is not None:
        with writing(journal):
            committed.restore(journal)
    return journal


@contextlib.contextmanager
def writing(journal: Journal) -> Iterator[None]:
    """Raise TrackingError, which names the remedy, where the folder of a journal cannot be written."""
    try:
        yield
    except MomeError:
        raise
    except OSError as error:
        raise TrackingError(
            f"the run's journal cannot be written in {journal.folder} ({error.strerror or error}); give an `output` "
            f"that can be written or, where that is remote, {_SET_CACHE}"
        ) from error
