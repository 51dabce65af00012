"""Errors that count as out of memory, and the remedies that their message suggests."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from pipeline.training.collectives import Collectives
from pipeline.training.health import is_out_of_memory, out_of_memory
from pipeline.training.stages import Stage
from tests.support.tiny_model import tiny_config


def test_torch_and_numpy_errors_are_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(10**15)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_accelerator_and_system_errors_are_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "No space left"), ValueError("out of memory")]
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(("zero_stage", "offload"), [(0, False), (1, True), (2, True)])
def test_only_supported_remedies_are_suggested(zero_stage: int, offload: bool) -> None:
    """The config rejects offloading without ZeRO."""
    stage = Stage(tiny_config(zero_stage=zero_stage), 0)
    told = str(out_of_memory(MemoryError("no room"), stage, Collectives(), None))
    assert ("engine.offload_optimizer=true" in told) == offload
    assert f"engine.zero_stage={zero_stage + 1}" in told
