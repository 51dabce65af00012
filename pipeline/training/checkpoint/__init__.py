"""Checkpoints that exist only when whole (contract C5), in one format for every world size and ZeRO stage.

    <run>/checkpoints/step-00000150.3f9a/rank-00000.safetensors   named float32 fragments of one rank
                                         rank-00001.json          what another rank wrote, told to the first
                                         MANIFEST.json            size and SHA-256 of each file; step, digests, config
                                         COMMIT.json              written last; without it the folder does not exist

The name ends in a token of the attempt, so that a retry never mixes with the leavings of the attempt before.

`store` saves and finds them, `host_copy` takes what is saved, `saved_state` reads it, `retention` says what stays;
`committed` is what whole means, and `weights` what stages hand over.
"""

from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, is_committed, read_committed
from pipeline.training.checkpoint.saved_state import SavedState
from pipeline.training.checkpoint.store import Checkpoint, CheckpointStore
from pipeline.training.checkpoint.weights import (
    VOCABULARY,
    WEIGHTS,
    Weights,
    WeightsInfo,
    finished_stage,
    folder_of_weights,
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
    "load_weights",
    "read_committed",
    "save_weights",
    "stage_url",
    "weights_info",
]
