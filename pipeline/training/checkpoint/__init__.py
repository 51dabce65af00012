"""Checkpoints that exist only when whole (contract C5), in one format for every world size and ZeRO stage.

    <run>/checkpoints/step-00000150.0003-9f86d081-19ad3c7f2e1/
        rank-00000.safetensors   named float32 fragments of one rank
        rank-00001.json          what another rank wrote, told to the first
        MANIFEST.json            size and SHA-256 of each file; step, digests, config
        SEAL.json                who decides what becomes of the folder: its writer, or a later start that gave it up
        COMMIT.json              written last; without it the folder does not exist

The name tells the start that wrote it (see `ownership`) and when, so that a retry never mixes with what an attempt
before it left, and no attempt deletes what a later one writes.

`store` saves and finds them, `host_copy` takes what is saved, `saved_state` reads it, `retention` says what stays;
`committed` is what whole means, and `weights` what stages hand over.
"""

from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, is_committed, read_committed, read_manifest
from pipeline.training.checkpoint.saved_state import SavedState
from pipeline.training.checkpoint.store import Checkpoint, CheckpointStore
from pipeline.training.checkpoint.weights import (
    VOCABULARY,
    WEIGHTS,
    Weights,
    WeightsInfo,
    finished_stage,
    folder_of_weights,
    is_file_of_weights,
    load_weights,
    save_weights,
    stage_url,
    weights_info,
)

__all__ = [
    "COMMIT",
    "MANIFEST",
    "VOCABULARY",
    "WEIGHTS",
    "Checkpoint",
    "CheckpointStore",
    "SavedState",
    "Weights",
    "WeightsInfo",
    "finished_stage",
    "folder_of_weights",
    "is_committed",
    "is_file_of_weights",
    "load_weights",
    "read_committed",
    "read_manifest",
    "save_weights",
    "stage_url",
    "weights_info",
]
