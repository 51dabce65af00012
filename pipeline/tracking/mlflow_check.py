"""Whether a tracking server takes what a run will write: found out by writing it, and deleting it again."""

from __future__ import annotations

from pipeline.config.errors import TrackingError
from pipeline.config.redaction import describe_error, redact
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.places import database_file


def try_writing(uri: str, experiment: str) -> str:
    """Creates a run with a tag, reads it back and deletes it; returns what was done, in words.

    A run goes into the experiment, if there is one of that name, else into MLflow's default one. A database that does
    not exist yet is not made. Raises TrackingError saying what the server refused.
    """
    if (database := database_file(uri)) is not None and not database.exists():
        return "its database will be created with the run"
    client = connect(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        run = client.create_run(found.experiment_id if found else "0", run_name="mome preflight")
        try:
            client.set_tag(run.info.run_id, "mome.preflight", "written")
            if client.get_run(run.info.run_id).data.tags.get("mome.preflight") != "written":
                raise TrackingError(f"tracking.uri {redact(uri)}: a tag that was written could not be read back")
        finally:
            client.delete_run(run.info.run_id)
    except TrackingError:
        raise
    except Exception as error:  # connection and database faults of every library underneath
        raise TrackingError(
            f"tracking.uri {redact(uri)}: the server refused a run: {describe_error(error)}. Check its address, and "
            "the name and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from error
    return "a run was written, read back and deleted"
