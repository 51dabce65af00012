"""A checkpoint of four numbers, for tests of checkpoint stores."""

from typing import Any

import pytest
import torch

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage
from pipeline.evaluation.ranks import Ranks
from pipeline.training.checkpoint.committed import Checkpoint
from pipeline.training.checkpoint.serialization import SavedState
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.engine import Fragment
from pipeline.training.ownership import Ownership


class SingleProcess(Ranks):
    """The only rank, without a process group."""

    device = torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...


def store_of(storage: Storage, folder: str, ownership: Ownership | None = None, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(storage, folder, SingleProcess(), CheckpointConfig(keep=keep), ownership)  # type: ignore[arg-type]


def metadata(step: int) -> dict[str, Any]:
    return {"step": step, "stage": "s", "stage_step": step, "plan_digest": "p", "zero_stage": 2, "data_counts": {}}


def save(store: CheckpointStore, step: int, mark: float = 0.0) -> str:
    """Save a checkpoint and return its URL; its numbers are step + mark, step + mark + 1, …"""
    weight = torch.arange(4.0) + step + mark
    url = store.save([Fragment("a.weight", 0, {"weight": weight})], metadata(step))
    store.wait()
    return url


def resume(store: CheckpointStore) -> tuple[Checkpoint, SavedState] | None:
    """Return the newest checkpoint and remove what earlier attempts left unfinished, as a run does at its start."""
    latest = store.latest()
    store.clean(latest and latest[0])
    return latest


def newest_weight(store: CheckpointStore) -> list[float]:
    """Return the numbers of the newest whole checkpoint."""
    _, saved = store.latest() or pytest.fail("nothing found")
    return saved.read("a.weight", "weight", 0, 4).tolist()
