"""`mome register CHECKPOINT --name NAME`: a checkpoint in MLflow's registry, from where anything can load it."""

from __future__ import annotations

import importlib.metadata
import io
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.caller import Caller
from pipeline.config.redaction import redact, redact_values
from pipeline.data.storage import Storage, split
from pipeline.inference import drop_untrained_objectives, pyfunc_outputs
from pipeline.tracking.locations import absolute_uri, experiment_name, read_run_id, tracking_uri
from pipeline.tracking.mlflow_models import Export, register
from pipeline.training.checkpoint import load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]
CODE = (ROOT / "pipeline",)
# What `pipeline.inference` imports, and nothing that only training needs.
SERVING = (
    "botocore", "einops", "fsspec", "numpy", "opencv-python-headless", "pandas", "pillow", "pydantic",
    "pyyaml", "safetensors", "scipy", "simplejpeg", "tokenizers", "torch", "urllib3",
)  # fmt: skip


def register_checkpoint(
    checkpoint: str, name: str, alias: str | None = None, uri: str | None = None, caller: Caller = Caller()
) -> dict[str, Any]:
    """Register the weights of a run, a stage or a checkpoint's folder; return the version and how to load it.

    The MLflow server is `uri`, else the caller's, else the SQLite file next to the run's folder. Raises CheckpointError
    for a folder without complete weights, ConfigError for weights that give neither embeddings nor matching scores,
    TrackingError for what MLflow refuses.
    """
    caller = caller.with_server(uri)
    storage = caller.store()
    weights = load_weights(storage, checkpoint.rstrip("/"))
    config = caller.applied(weights.config)
    stage = config.stage_named(weights.stage)
    image = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(image, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        # The folder of a stage as `load_weights` reads it, without a location of this machine; the name is that which
        # the run was given, whatever its folder is called.
        portable = weights.config.model_copy(update={"output": ".", "name": split(weights.recorded.folder)[1]})
        metadata = {
            "config": redact_values(portable.model_dump(mode="json")),
            "stage": weights.stage,
            "step": weights.step,
            "absent": sorted(weights.absent),
        }
        save_weights(Storage(), folder, weights.tensors, weights.vocabulary, metadata, weights.choices)
        export = Export(
            folder=Path(folder),
            loader="pipeline.inference",
            code=CODE,
            requirements=[f"{package}=={importlib.metadata.version(package)}" for package in SERVING],
            outputs=pyfunc_outputs(drop_untrained_objectives(weights)),
            example={"image": image.getvalue(), "text": "a grey square"},
            step=weights.step,
            params={"stage": stage.name, "step": str(weights.step), "model": config.model.kind},
            tags={"mome.checkpoint": redact(weights.url), "mome.stage": stage.name, "mome.step": str(weights.step)},
            run=read_run_id(config, storage),
            stage_index=config.stages.index(stage),
        )
        server = absolute_uri(tracking_uri(config))
        done = register(server, experiment_name(config), name, alias, export)
    return asdict(done) | {"tracking_uri": redact(server), "checkpoint": weights.url}
