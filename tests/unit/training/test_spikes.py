"""Which losses are spikes, and which batches are left out for them: functions of the losses alone."""

from __future__ import annotations

import json

import pytest

from pipeline.config.errors import RunFailed
from pipeline.config.schema import SpikeConfig
from pipeline.training.spikes import Spike, SpikeFound, SpikeGuard

CONFIG = SpikeConfig(factor=2.0, window=3, skip=2, max_rollbacks=2)


def guard_after(*losses: float, config: SpikeConfig | None = CONFIG) -> SpikeGuard:
    guard = SpikeGuard(config)
    for step, loss in enumerate(losses):
        guard.judge(step, loss)
    return guard


def test_a_loss_above_the_factor_times_the_median_is_a_spike() -> None:
    with pytest.raises(SpikeFound) as found:
        guard_after(9.0, 1.0, 1.0, 1.2, 2.01)
    assert found.value.spike == Spike(number=1, step=4, batch=4, loss=2.01, median=1.0)


@pytest.mark.parametrize("losses", [(1.0, 1.0, 9.0), (1.0, 1.0, 1.0, 2.0), (8.0, 4.0, 2.0, 1.0, 0.5)])
def test_nothing_is_judged_before_the_window_is_full_nor_at_the_factor_itself(losses: tuple[float, ...]) -> None:
    guard_after(*losses)


def test_without_a_config_no_loss_is_a_spike() -> None:
    guard_after(1.0, 1.0, 1.0, 1e9, config=None)


def test_what_was_read_since_the_checkpoint_and_some_batches_more_are_left_out() -> None:
    guard = guard_after(1.0, 1.0, 1.0)
    assert guard.skip(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs") == (5, 10)
    assert guard.batch_of(5) == 10
    # A second spike after a checkpoint at step 8, which read batch 13 next.
    assert guard.skip(Spike(2, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs") == (13, 17)
    assert guard.batch_of(8) == 17
    with pytest.raises(RunFailed, match=r"stage pairs, step 9: .* guards\.spike\.max_rollbacks"):
        guard.skip(Spike(3, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs")


def test_a_restored_guard_judges_as_the_one_that_was_saved() -> None:
    guard = guard_after(1.0, 1.1, 0.3, 1.7 / 3)
    guard.skip(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs")
    restored = SpikeGuard(CONFIG)
    restored.restore(json.loads(json.dumps(guard.state())))
    assert restored.state() == guard.state()
    assert restored.batch_of(20) == guard.batch_of(20)


def test_a_checkpoint_of_before_there_were_guards_leaves_nothing_out() -> None:
    guard = SpikeGuard(CONFIG)
    guard.restore({})
    assert guard.batch_of(3) == 3
