"""`mome register CHECKPOINT --name NAME`: a checkpoint in MLflow's registry, from where anything can load it.
`mome sync RUN`: ships what an unreachable MLflow server missed, also days later and from another machine, or writes
TensorBoard's event files.
"""

import contextlib
import importlib.metadata
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

from jobs.configs import URI_VARIABLE, Caller
from pipeline.config.errors import ConfigError, TrackingError
from pipeline.config.redaction import redact, redact_values
from pipeline.config.urls import absolute
from pipeline.data.storage import Storage, split
from pipeline.tracking import locations
from pipeline.tracking.journal import UPLOAD_LOCK, InUse, Journal, Lease
from pipeline.tracking.mlflow_replay import MlflowUploader, pending_bytes
from pipeline.tracking.mlflow_server import ServerUnavailable, register
from pipeline.tracking.tensorboard import EventFiles

logger = logging.getLogger("mome.tracking")

PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"
# What `pipeline.inference` imports, and nothing that only training needs.
SERVING = (
    "botocore", "einops", "fsspec", "numpy", "opencv-python-headless", "pandas", "pillow", "pydantic",
    "pyyaml", "safetensors", "scipy", "simplejpeg", "tokenizers", "torch", "urllib3",
)  # fmt: skip


PYFUNC_EXAMPLE = """\
import mlflow, pandas

mlflow.set_tracking_uri("URI")
model = mlflow.pyfunc.load_model("MODEL")
photo = open("photo.jpg", "rb").read()
model.predict(pandas.DataFrame({"image": [photo], "text": ["a red circle"]}))"""


def register_checkpoint(
    checkpoint: str, name: str, alias: str | None = None, caller: Caller = Caller()
) -> dict[str, Any]:
    """Register a folder's weights in the caller's MLflow. Raises CheckpointError, ConfigError, TrackingError."""
    import pandas as pd  # here, with torch: `sync` starts in half a second
    from PIL import Image

    from pipeline.inference import drop_untrained_objectives, pyfunc_outputs
    from pipeline.training.checkpoint.weights import load_weights, save_weights

    storage = Storage(caller.storage)
    weights = load_weights(storage, checkpoint.rstrip("/"))
    config = caller.applied(weights.config)
    stage, step = config.stage_named(weights.stage), str(weights.step)
    image = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(image, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        # The folder of a stage as `load_weights` reads it, without a location of this machine; the name is that which
        # the run was given, whatever its folder is called.
        portable = weights.config.model_copy(update={"output": ".", "name": split(weights.recorded.folder)[1]})
        metadata = {
            "config": redact_values(portable.model_dump(mode="json")), "stage": weights.stage, "step": weights.step,
            "absent": sorted(weights.absent),
        }  # fmt: skip
        save_weights(Storage(), folder, weights.tensors, weights.vocabulary, metadata, weights.choices)
        server = locations.absolute_uri(locations.tracking_uri(config))
        done = register(
            server, locations.experiment_name(config), name, alias, run=locations.read_run_id(config, storage),
            stage_index=config.stages.index(stage), step=weights.step,
            outputs=pyfunc_outputs(drop_untrained_objectives(weights).config.stage_named(weights.stage), weights.url),
            params={"stage": stage.name, "step": step, "model": config.model.kind},
            tags={"mome.checkpoint": redact(weights.url), "mome.stage": stage.name, "mome.step": step},
            loader_module="pipeline.inference", data_path=folder, code_paths=[str(PACKAGE)],
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in SERVING],
            input_example=pd.DataFrame([{"image": image.getvalue(), "text": "a grey square"}]),
        )  # fmt: skip
    return done | {"tracking_uri": redact(server), "checkpoint": weights.url}


def recorded_journal(run: str, caller: Caller) -> Journal:
    """Return the journal of the run in folder `run`. Raises TrackingError if there is none."""
    journal = locations.read_journal(run, Storage(caller.storage))
    if not journal.run_records():
        raise TrackingError(
            f"{run}: no tracking journal in {journal.folder}; give the folder of a run, <output>/<name>"
        )
    return journal


def write_tensorboard(run: str, folder: Path, caller: Caller = Caller()) -> dict[str, Any]:
    """Write the journal of the run in folder `run` as TensorBoard's event files. Raises ConfigError, TrackingError."""
    events = EventFiles(recorded_journal(run, caller), folder)
    try:
        events.write()
        events.close()
    except OSError as error:
        raise ConfigError(f"--tensorboard {folder}: cannot be written ({error}); give another folder") from error
    return {"tensorboard": str(folder), "points": events.num_points}


def sync(run: str, caller: Caller = Caller()) -> dict[str, Any]:
    """Upload the journal of the run in folder `run` to the caller's server, else to the SQLite file next to the folder.

    The server named in the journal, which another person may have written, is not used. Raises TrackingError.
    """
    journal = recorded_journal(run, caller)
    run_records = journal.run_records()
    next_to_it = locations.default_uri(absolute(run.rstrip("/")).rpartition("/")[0] or "/")
    target = locations.resolve_uri(locations.absolute_uri(caller.server or next_to_it))
    known = str(run_records[-1].get("uri"))
    if caller.server is None and redact(locations.absolute_uri(known)) != redact(target):
        raise TrackingError(
            f"{run}: its journal says that it was tracked at {redact(known)}; to ship it there, give --uri, name the "
            f"config that it was trained with (--config), or set {URI_VARIABLE}"
        )
    lock = journal.folder / UPLOAD_LOCK
    try:
        with locations.journal_write_errors(journal), contextlib.closing(Lease(lock)):
            pending = pending_bytes(journal.folder, target)
            uploader = MlflowUploader(journal.folder, target, logger.warning)
            uploader.upload()
    except InUse:
        raise TrackingError(f"{run}: another process is uploading this journal; the run seems to be active") from None
    except ServerUnavailable as error:
        raise TrackingError(
            f"{redact(target)}: the server is unavailable ({error}); start it, or name another with --uri"
        ) from error
    return {"uri": redact(target), "pending_bytes": pending, "points": uploader.num_points}
