"""Estimates of memory, time and cost follow from the stage's workload and the hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.errors import ConfigError
from pipeline.planning.estimate import Assumptions, StageSettings, curve, estimate, largest_micro_batch, memory_at
from pipeline.planning.hardware import ACCELERATORS, NETWORKS, accelerator_like, hardware_named
from pipeline.planning.memory import Line, Parameters, Sharding, Work

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
H100, IB = ACCELERATORS["h100"], NETWORKS["ib-400"]


def sharding(ranks: int, zero_stage: int = 1) -> Sharding:
    return Sharding(zero_stage, ranks, "bfloat16", 50_000_000, 1_000_000_000)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_example_above_the_largest_micro_batch_does_not_fit(zero_stage):
    room = 40e9
    rows = largest_micro_batch(WORK, sharding(4, zero_stage), 256, room)
    assert 0 < rows < 256
    assert memory_at(WORK, sharding(4, zero_stage), 256, rows).total <= room
    assert memory_at(WORK, sharding(4, zero_stage), 256, rows + 1).total > room


def test_no_micro_batch_fits_if_the_states_are_too_large():
    assert largest_micro_batch(WORK, sharding(1), 16, 1e9) == 0


def test_single_accelerator_has_no_communication() -> None:
    alone = estimate(STAGE, sharding(1), H100, IB, Assumptions(mfu=0.5, goodput=1.0), micro_batch_size=1024)
    assert alone.communication_seconds == 0
    assert alone.step_seconds == pytest.approx((1024 * 6e11 + 1e10) / (0.5 * 989e12))
    assert alone.hours == pytest.approx(1000 * alone.step_seconds / 3600)


def test_time_and_cost_follow_the_assumptions() -> None:
    base, late = (
        estimate(STAGE, sharding(8), H100, IB, Assumptions(price=price, goodput=goodput))
        for price, goodput in ((2.0, 1.0), (4.0, 0.5))
    )
    assert base.cost == pytest.approx(base.hours * 8 * 2.0)
    assert late.cost == pytest.approx(4 * base.cost)


def test_network_affects_only_runs_on_several_nodes():
    slow = NETWORKS["ethernet-25"]
    inside = [estimate(STAGE, sharding(8), H100, net, Assumptions()).step_seconds for net in (IB, slow)]
    between = [estimate(STAGE, sharding(64), H100, net, Assumptions()).step_seconds for net in (IB, slow)]
    assert inside[0] == inside[1]
    assert between[1] > 5 * between[0]


def test_accumulation_adds_the_second_itc_forward():
    cut = estimate(STAGE, sharding(8), H100, IB, Assumptions(), micro_batch_size=32)
    assert (cut.accumulation, cut.micro_batch_size) == (4, 32)
    whole = estimate(STAGE, sharding(8), H100, IB, Assumptions())
    assert cut.compute_seconds / whole.compute_seconds == pytest.approx(6.5 / 6.0, rel=1e-3)


def test_scaling_curve_ends_where_a_rank_would_have_no_example():
    def at(stage: StageSettings):
        return lambda gpus: estimate(stage, sharding(gpus), H100, IB, Assumptions(), micro_batch_size=1)

    points = curve(at(STAGE), STAGE.global_batch_size)
    assert [point.gpus for point in points] == [2**k for k in range(11)]
    assert points[0].efficiency == 1
    speeds = [point.samples_per_second for point in points]
    assert speeds == sorted(speeds)
    small = replace(STAGE, global_batch_size=48)
    assert [point.gpus for point in curve(at(small), 48)][-1] == 32


def test_unknown_accelerator_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        hardware_named("--accelerator", ACCELERATORS, "h1000")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_accelerator_is_found_by_the_name_of_its_driver(device, name):
    found = accelerator_like(device)
    assert found is not None
    assert found.name == name
