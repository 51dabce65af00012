"""Estimates of memory, time and cost follow from the stage's workload, its ZeRO stage and the hardware."""

import pytest

from pipeline.config.errors import ConfigError
from pipeline.planning.estimate import Assumptions, StageSettings, estimate, largest_micro_batch, memory_at
from pipeline.planning.hardware import ACCELERATORS, NETWORKS, accelerator_like, hardware_named
from pipeline.planning.memory import Line, Parameters, Sharding, Work, memory_of

WORK = Work(
    parameters=Parameters(trained=200_000_000, frozen=0, buffers=0, largest=20_000_000, tensors=300),
    flops=Line(0, 6e11),
    flops_per_example_accumulated=6.5e11,
    activations=Line(1e7, 5e8),
    workspace=Line(1e7, 1e6),
    tokens=Line(0, 1000),
    batch_bytes_per_example=150_000,
    contrast_flops=10**10,
    contrast_bytes=10**7,
    contrast_width=1536,
)
STAGE = StageSettings("pairs", steps=1000, global_batch_size=1024, images=1, micro_batch_size=None, work=WORK)
SIZE = Parameters(trained=8_000_000, frozen=2_000_000, buffers=0, largest=1_000_000)
H100, IB = ACCELERATORS["h100"], NETWORKS["ib-400"]


def sharding(ranks: int, zero_stage: int = 1, precision: str = "bfloat16", **more) -> Sharding:
    return Sharding(zero_stage, ranks, precision, 50_000_000, 1_000_000_000, **more)  # type: ignore[arg-type]


# ---- memory


@pytest.mark.parametrize(("zero_stage", "weights"), [(2, 10_000_000), (3, 2_500_000)])
def test_bfloat16_states_take_2_bytes_and_12_sharded_bytes(zero_stage: int, weights: int) -> None:
    states = memory_of(SIZE, sharding(4, zero_stage)).states
    assert states == 2 * weights + 12 * 2_000_000
    averaged = memory_of(SIZE, sharding(4, zero_stage, averages=True)).states
    assert averaged == states + 4 * 2_000_000, "a moving average adds one sharded float32 copy"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_more_ranks_and_offloading_need_less_memory_on_each(zero_stage):
    for precision in ("float32", "bfloat16"):
        few, many = (memory_of(SIZE, sharding(ranks, zero_stage, precision)) for ranks in (2, 64))
        assert many.states < few.states
        assert many.total < few.total
    kept, offloaded = (memory_of(SIZE, sharding(4, zero_stage, offload_optimizer=choice)) for choice in (False, True))
    assert kept.host == 0
    assert offloaded.host >= 12 * 2_000_000
    assert offloaded.states == kept.states - 12 * 2_000_000


def test_total_is_the_larger_of_backward_and_update():
    idle, crowded = (memory_of(SIZE, sharding(4, 2), activations=activations) for activations in (0.0, 1e9))
    assert crowded.total > idle.total
    assert crowded.total == crowded.states + crowded.gradients + crowded.buffers + 1e9 + crowded.backward


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_example_above_the_largest_micro_batch_does_not_fit(zero_stage):
    room, cut = 40e9, sharding(4, zero_stage)
    rows = largest_micro_batch(WORK, cut, 256, room)
    assert 0 < rows < 256
    assert memory_at(WORK, cut, 256, rows).total <= room < memory_at(WORK, cut, 256, rows + 1).total
    assert largest_micro_batch(WORK, cut, 16, 1e8) == 0, "the states alone are too large"


# ---- time and cost


def test_time_and_cost_follow_the_assumptions_and_the_number_of_accelerators() -> None:
    alone = estimate(STAGE, sharding(1), H100, IB, Assumptions(mfu=0.5, goodput=1.0), micro_batch_size=1024)
    assert alone.communication_seconds == 0
    assert alone.step_seconds == pytest.approx((1024 * 6e11 + 1e10) / (0.5 * 989e12))
    assert alone.hours == pytest.approx(1000 * alone.step_seconds / 3600)
    base, late = (
        estimate(STAGE, sharding(8), H100, IB, Assumptions(price=price, goodput=goodput))
        for price, goodput in ((2.0, 1.0), (4.0, 0.5))
    )
    assert base.cost == pytest.approx(base.hours * 8 * 2.0)
    assert late.cost == pytest.approx(4 * base.cost)
    speeds = [estimate(STAGE, sharding(2**k), H100, IB, Assumptions(), 1).samples_per_second for k in range(11)]
    assert speeds == sorted(set(speeds))


def test_network_affects_only_runs_on_several_nodes_and_accumulation_adds_the_second_itc_forward():
    slow = NETWORKS["ethernet-25"]
    inside, between = (
        [estimate(STAGE, sharding(ranks), H100, net, Assumptions()).step_seconds for net in (IB, slow)]
        for ranks in (8, 64)
    )
    assert inside[0] == inside[1]
    assert between[1] > 5 * between[0]
    cut, whole = (estimate(STAGE, sharding(8), H100, IB, Assumptions(), micro_batch_size=size) for size in (32, None))
    assert (cut.accumulation, cut.micro_batch_size) == (4, 32)
    assert cut.compute_seconds / whole.compute_seconds == pytest.approx(6.5 / 6.0, rel=1e-3)


# ---- hardware


def test_accelerators_are_known_by_the_names_of_their_drivers():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80",
    }  # fmt: skip
    assert {device: accelerator_like(device) for device in names} == {d: ACCELERATORS[n] for d, n in names.items()}
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        hardware_named("--accelerator", ACCELERATORS, "h1000")
