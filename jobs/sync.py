"""`mome sync RUN`: ships what an unreachable MLflow server missed, also days later and from another machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage
from pipeline.tracking.mlflow_client import Outage
from pipeline.tracking.mlflow_replay import MlflowShipper, num_pending, shipping_alone
from pipeline.tracking.places import read_journal, resolve_uri

logger = logging.getLogger("mome.tracking")


@dataclass(frozen=True)
class Synced:
    """What was shipped: `points` metric points from `pending_bytes` of journal, to the server at `uri`."""

    uri: str
    pending_bytes: int
    points: int


def sync(run: str, uri: str | None = None) -> Synced:
    """Ship the journal of the run in folder `run` (path or URL) to `uri`, or to the server the run was given.

    Shipping again what the server has changes nothing. Raises TrackingError when there is no journal, when another
    process is shipping it, or when the server does not take it.
    """
    journal = read_journal(run, Storage(StorageConfig()))
    campaigns = journal.campaigns()
    if not campaigns:
        raise TrackingError(
            f"{run}: no tracking journal in {journal.folder}; give the folder of a run, <output>/<name>"
        )
    target = resolve_uri(uri or campaigns[-1]["uri"])
    with shipping_alone(journal.folder) as alone:
        if not alone:
            raise TrackingError(f"{run}: another process is shipping this journal; the run seems to be going on")
        pending = num_pending(journal.folder, target)
        shipper = MlflowShipper(journal.folder, target, logger.warning)
        try:
            shipper.ship()
        except Outage as error:
            raise TrackingError(
                f"{redact(target)}: the server takes no records ({error}); start it, or give another with --uri"
            ) from error
    return Synced(redact(target), pending, shipper.num_points)
