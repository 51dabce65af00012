"""Loss spikes and the batches skipped for them; errors that count as out of memory, and their remedies."""

import errno
import json

import numpy as np
import pytest
import torch

from pipeline.config.errors import RunFailed
from pipeline.config.schema import SpikeConfig
from pipeline.training.collectives import Collectives
from pipeline.training.health import Spike, SpikeGuard, is_out_of_memory, permanent_failures_explained
from pipeline.training.stages import Stage
from tests.support.tiny_model import tiny_config

CONFIG = SpikeConfig(factor=2.0, window=3, skip=2, max_rollbacks=2)


def guard_after(*losses: float, config: SpikeConfig | None = CONFIG) -> SpikeGuard:
    """Return a guard that has seen these losses, none of them a spike."""
    guard = SpikeGuard(config)
    for step, loss in enumerate(losses):
        assert guard.observe(step, loss) is None
    return guard


def test_only_a_loss_above_factor_times_median_is_a_spike() -> None:
    spike = guard_after(9.0, 1.0, 1.0, 1.2).observe(4, 2.01)
    assert spike == Spike(number=1, step=4, batch=4, loss=2.01, median=1.0)
    guard_after(1.0, 1.0, 9.0)  # the window is not full
    guard_after(1.0, 1.0, 1.0, 2.0)  # at the factor
    guard_after(8.0, 4.0, 2.0, 1.0, 0.5)  # falling
    guard_after(1.0, 1.0, 1.0, 1e9, config=None)


def test_batches_since_the_checkpoint_and_some_more_are_skipped_also_after_a_restart() -> None:
    guard = guard_after(1.0, 1.1, 0.3, 1.7 / 3)
    assert guard.skip_range(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs") == (5, 10)
    restored = SpikeGuard(CONFIG, json.loads(json.dumps(guard.state())))
    assert restored.state() == guard.state()
    for either in (guard, restored):
        assert either.batch_of(5) == 10
        # A second spike after a checkpoint at step 8, which read batch 13 next.
        assert either.skip_range(Spike(2, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs") == (13, 17)
        assert either.batch_of(8) == 17
        with pytest.raises(RunFailed, match=r"stage pairs, step 9: .* guards\.spike\.max_rollbacks"):
            either.skip_range(Spike(3, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs")


def test_errors_of_allocators_devices_and_the_system_are_classified() -> None:
    for allocate in (torch.empty, np.empty):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate(10**15)
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left"))
    assert not is_out_of_memory(ValueError("out of memory"))
    for zero_stage, can_offload in ((0, False), (2, True)):  # the config rejects offloading without ZeRO
        stage = Stage(tiny_config(zero_stage=zero_stage), 0)
        with pytest.raises(RunFailed) as failed, permanent_failures_explained(stage, Collectives()):
            raise MemoryError("no room")
        assert ("engine.offload_optimizer=true" in str(failed.value)) == can_offload
        assert f"engine.zero_stage={zero_stage + 1}" in str(failed.value)
