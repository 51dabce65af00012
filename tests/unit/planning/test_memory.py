"""Planned memory of DeepSpeed's state on each rank, by ZeRO stage."""

from __future__ import annotations

import pytest

from pipeline.planning.memory import Parameters, Sharding, memory_of

SIZE = Parameters(trained=8_000_000, frozen=2_000_000, buffers=0, largest=1_000_000)


def sharding(zero_stage: int, world_size: int = 4, precision: str = "bfloat16", **more) -> Sharding:
    return Sharding(zero_stage, world_size, precision, 50_000_000, 1_000_000_000, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("zero_stage", "weights"), [(2, 10_000_000), (3, 2_500_000)])
def test_bfloat16_states_take_2_bytes_and_12_sharded_bytes(zero_stage: int, weights: int) -> None:
    states = memory_of(SIZE, sharding(zero_stage)).states
    assert states == 2 * weights + 12 * 2_000_000
    averaged = memory_of(SIZE, sharding(zero_stage, averages=True)).states
    assert averaged == states + 4 * 2_000_000, "a moving average adds one sharded float32 copy"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_more_ranks_need_less_memory_each(zero_stage, precision):
    few, many = (memory_of(SIZE, sharding(zero_stage, ranks, precision)) for ranks in (2, 64))
    assert many.states < few.states
    assert many.total < few.total


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloaded_state_moves_from_device_to_host(zero_stage):
    kept, offloaded = (memory_of(SIZE, sharding(zero_stage, offload_optimizer=choice)) for choice in (False, True))
    assert kept.host == 0
    assert offloaded.host >= 12 * 2_000_000
    assert offloaded.states == kept.states - 12 * 2_000_000


def test_total_is_the_larger_of_backward_and_update():
    held = memory_of(SIZE, sharding(2))
    crowded = memory_of(SIZE, sharding(2), activations=1e9)
    assert crowded.total > held.total
    assert crowded.total == crowded.states + crowded.gradients + crowded.buffers + 1e9 + crowded.backward
