"""`mome sync RUN`: ships what an unreachable MLflow server missed, also days later and from another machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from jobs.caller import URI_VARIABLE, Caller
from pipeline.config.errors import TrackingError
from pipeline.config.redaction import redact
from pipeline.tracking.locations import absolute_uri, journal_write_errors, read_journal, resolve_uri
from pipeline.tracking.mlflow_replay import MlflowUploader, exclusive_upload, pending_bytes
from pipeline.tracking.mlflow_server import ServerUnavailable

logger = logging.getLogger("mome.tracking")


@dataclass(frozen=True)
class Synced:
    """Uploaded data: `points` metric points from `pending_bytes` bytes of journal, to the server at `uri`."""

    uri: str
    pending_bytes: int
    points: int


def sync(run: str, uri: str | None = None, caller: Caller = Caller()) -> Synced:
    """Upload the journal of the run in folder `run` (path or URL) to `uri`, else to the caller's server.

    Without a server, that is the SQLite file next to the run's folder. The server named in the journal is not used: the
    journal may come from another person. Uploading again changes nothing. Raises TrackingError if there is no journal,
    if another process is uploading it, or if the server does not accept it.
    """
    caller = caller.with_server(uri)
    journal = read_journal(run, caller.store())
    run_records = journal.run_records()
    if not run_records:
        raise TrackingError(
            f"{run}: no tracking journal in {journal.folder}; give the folder of a run, <output>/<name>"
        )
    target, known = resolve_uri(caller.server_of(run)), str(run_records[-1].get("uri"))
    if caller.server is None and redact(absolute_uri(known)) != redact(target):
        raise TrackingError(
            f"{run}: its journal says that it was tracked at {redact(known)}; to ship it there, give --uri, name the "
            f"config that it was trained with (--config), or set {URI_VARIABLE}"
        )
    with journal_write_errors(journal), exclusive_upload(journal.folder) as is_alone:
        if not is_alone:
            raise TrackingError(f"{run}: another process is uploading this journal; the run seems to be active")
        pending = pending_bytes(journal.folder, target)
        uploader = MlflowUploader(journal.folder, target, logger.warning)
        try:
            uploader.upload()
        except ServerUnavailable as error:
            raise TrackingError(
                f"{redact(target)}: the server is unavailable ({error}); start it, or name another with --uri"
            ) from error
    return Synced(redact(target), pending, uploader.num_points)
