"""Loss spikes and the batches skipped for them depend on the losses alone."""

from __future__ import annotations

import json

import pytest

from pipeline.config.errors import RunFailed
from pipeline.config.schema import SpikeConfig
from pipeline.training.health import Spike, SpikeGuard

CONFIG = SpikeConfig(factor=2.0, window=3, skip=2, max_rollbacks=2)


def guard_after(*losses: float, config: SpikeConfig | None = CONFIG) -> SpikeGuard:
    """Return a guard that has seen these losses, none of them a spike."""
    guard = SpikeGuard(config)
    for step, loss in enumerate(losses):
        assert guard.observe(step, loss) is None
    return guard


def test_loss_above_factor_times_median_is_a_spike() -> None:
    spike = guard_after(9.0, 1.0, 1.0, 1.2).observe(4, 2.01)
    assert spike == Spike(number=1, step=4, batch=4, loss=2.01, median=1.0)


@pytest.mark.parametrize("losses", [(1.0, 1.0, 9.0), (1.0, 1.0, 1.0, 2.0), (8.0, 4.0, 2.0, 1.0, 0.5)])
def test_no_spike_before_the_window_is_full_or_at_the_factor(losses: tuple[float, ...]) -> None:
    guard_after(*losses)


def test_without_a_config_no_loss_is_a_spike() -> None:
    guard_after(1.0, 1.0, 1.0, 1e9, config=None)


def test_batches_since_the_checkpoint_and_some_more_are_skipped() -> None:
    guard = guard_after(1.0, 1.0, 1.0)
    assert guard.skip_range(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs") == (5, 10)
    assert guard.batch_of(5) == 10
    # A second spike after a checkpoint at step 8, which read batch 13 next.
    assert guard.skip_range(Spike(2, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs") == (13, 17)
    assert guard.batch_of(8) == 17
    with pytest.raises(RunFailed, match=r"stage pairs, step 9: .* guards\.spike\.max_rollbacks"):
        guard.skip_range(Spike(3, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs")


def test_restored_guard_equals_the_saved_one() -> None:
    guard = guard_after(1.0, 1.1, 0.3, 1.7 / 3)
    guard.skip_range(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs")
    restored = SpikeGuard(CONFIG)
    restored.restore(json.loads(json.dumps(guard.state())))
    assert restored.state() == guard.state()
    assert restored.batch_of(20) == guard.batch_of(20)
