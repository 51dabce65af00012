"""A checkpoint of four numbers, for tests of what becomes of checkpoints in a store."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.engine import Fragment


def save(store: CheckpointStore, step: int) -> str:
    """Its URL; the numbers are step, step + 1, …"""
    metadata = {"step": step, "stage": "s", "stage_step": step, "plan_digest": "p", "zero_stage": 2, "data_counts": {}}
    url = store.save([Fragment("a.weight", 0, {"weight": torch.arange(4.0) + step})], metadata)
    store.wait()
    return url


def newest_weight(store: CheckpointStore) -> list[float]:
    """The numbers of the newest whole one."""
    _, saved = store.latest() or pytest.fail("nothing found")
    return saved.read("a.weight", "weight", 0, 4).tolist()
