"""Estimates follow from workload, ZeRO stage and hardware; the probe counts bytes and FLOPs of code on meta tensors."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.planning import estimate as planning
from pipeline.planning.estimate import Assumptions, Line, Parameters, Sharding, StageSettings, estimate, memory_of
from pipeline.planning.probe import Kernels, Probe

WORK = planning.Work(
    parameters=Parameters(trained=200_000_000, total=200_000_000, buffers=0, largest=20_000_000, tensors=300),
    flops=Line(0, 6e11), flops_per_example_accumulated=6.5e11, activations=Line(1e7, 5e8), workspace=Line(1e7, 1e6),
    tokens=Line(0, 1000), batch_bytes_per_example=150_000,
    contrast_flops=10**10, contrast_bytes=10**7, contrast_width=1536,
)  # fmt: skip
STAGE = StageSettings("pairs", steps=1000, global_batch_size=1024, images=1, micro_batch_size=None, work=WORK)
SIZE = Parameters(trained=8_000_000, total=10_000_000, buffers=0, largest=1_000_000)
H100, IB = planning.ACCELERATORS["h100"], planning.NETWORKS["ib-400"]


def sharding(ranks: int, zero_stage: int = 1, element: int = 2, **more) -> Sharding:
    return Sharding(zero_stage, ranks, element, 50_000_000, 1_000_000_000, **more)


def estimated(ranks: int, micro_batch_size: int | None = None, network=IB, **assumptions):
    stage = replace(STAGE, micro_batch_size=micro_batch_size)
    return estimate(stage, sharding(ranks), H100, network, Assumptions(**assumptions))


def test_states_are_sharded_offloaded_and_averaged_as_in_deepspeed_and_one_row_above_the_largest_does_not_fit() -> None:
    for zero_stage, weights in ((2, 10_000_000), (3, 2_500_000)):
        states = memory_of(SIZE, sharding(4, zero_stage)).states
        assert states == 2 * weights + 12 * 2_000_000, "bfloat16 takes 2 bytes, and 12 that are sharded"
        averaged = memory_of(SIZE, sharding(4, zero_stage, averages=True)).states
        assert averaged == states + 4 * 2_000_000, "a moving average adds one sharded float32 copy"
    for zero_stage in (1, 2, 3):
        for element in (2, 4):
            few, many = (memory_of(SIZE, sharding(ranks, zero_stage, element)) for ranks in (2, 64))
            assert (many.states < few.states, many.total < few.total) == (True, True)
        kept, offloaded = (memory_of(SIZE, sharding(4, zero_stage, offload_optimizer=on)) for on in (False, True))
        assert kept.host == 0
        assert offloaded.host >= 12 * 2_000_000
        assert offloaded.states == kept.states - 12 * 2_000_000
    idle, crowded = (memory_of(SIZE, sharding(4, 2), activations=activations) for activations in (0.0, 1e9))
    assert crowded.total > idle.total, "the total is the larger of backward and update"
    assert crowded.total == crowded.states + crowded.gradients + crowded.buffers + 1e9 + crowded.backward
    for cut in map(functools.partial(sharding, 4), range(4)):
        rows = planning.largest_micro_batch(WORK, cut, 256, 40e9)
        fits, larger = (planning.memory_at(WORK, cut, 256, size).total for size in (rows, rows + 1))
        assert (0 < rows < 256, fits <= 40e9 < larger) == (True, True), cut
        assert planning.largest_micro_batch(WORK, cut, 16, 1e8) == 0, "the states alone are too large"


def test_time_and_cost_follow_the_assumptions_the_network_and_the_number_of_accelerators() -> None:
    alone = estimated(1, 1024, mfu=0.5, goodput=1.0)
    assert alone.communication_seconds == 0
    assert alone.step_seconds == pytest.approx((1024 * 6e11 + 1e10) / (0.5 * 989e12))
    assert alone.hours == pytest.approx(1000 * alone.step_seconds / 3600)
    base, late = estimated(8, price=2.0, goodput=1.0), estimated(8, price=4.0, goodput=0.5)
    assert (base.cost, late.cost) == pytest.approx((base.hours * 8 * 2.0, 4 * base.cost))
    speeds = [estimated(2**k, 1).samples_per_second for k in range(11)]
    assert speeds == sorted(set(speeds))
    slow = planning.NETWORKS["ethernet-25"]
    assert estimated(8).step_seconds == estimated(8, network=slow).step_seconds, "one node needs no network"
    assert estimated(64, network=slow).step_seconds > 5 * estimated(64).step_seconds
    cut, whole = estimated(8, 32), estimated(8)  # accumulation adds the second forward of ITC
    assert (cut.accumulation, cut.micro_batch_size) == (4, 32)
    assert cut.compute_seconds / whole.compute_seconds == pytest.approx(6.5 / 6.0, rel=1e-3)
    names = {  # of drivers
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80",
    }  # fmt: skip
    assert {device: planning.accelerator_like(device).name for device in names} == names


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def test_bytes_are_counted_until_they_are_released_and_those_saved_by_autograd_until_backward():
    x = meta(100)
    with Probe([x], "cuda") as probe:
        y = x.detach() + 1
        assert probe.live_bytes == 400
        z = y.view(10, 10)  # the same storage
        del y
        assert probe.live_bytes == 400
        del z
        assert probe.live_bytes == 0
    assert probe.peak_bytes == 400
    for device in ("meta", "cpu"):
        weight, x = torch.ones(8, 8, device=device, requires_grad=True), torch.ones(4, 8, device=device)
        with Probe([weight, x], "cuda") as probe:
            loss = (x @ weight).exp().sum()
            # The exponential is its own derivative and is saved; the product is not; the sum is the loss.
            assert probe.live_bytes == 4 * 4 * 8 + 4
            loss.backward()
            assert probe.flops == 2 * 2 * 4 * 8 * 8  # forward, and the weight's gradient


def test_checkpointed_layers_and_fused_attention_save_memory_and_change_flops_as_they_should():
    weights = [meta(64, 64) for _ in range(4)]

    def measured(forward, known, kernels: Kernels = "cuda") -> tuple[int, int]:
        with Probe(known, kernels) as probe:
            loss = forward().sum()
            alive = probe.live_bytes
            loss.backward()
            return alive, probe.flops

    def layers(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = (x @ weight).relu().exp()
        return x

    kept, once = measured(lambda: layers(meta(32, 64)), weights)
    little, twice = measured(lambda: checkpoint(layers, meta(32, 64), use_reentrant=False), weights)
    assert (little < kept / 2, twice) == (True, pytest.approx(once * 4 / 3))
    for bias in (None, meta(1, 4, 64, 64)):  # trainable, so the CPU does not use the fused kernel
        qkv = [meta(2, 4, 64, 8) for _ in range(3)]
        known = [*qkv, *([] if bias is None else [bias])]
        attend = [lambda qkv=qkv, bias=bias: F.scaled_dot_product_attention(*qkv, attn_mask=bias), known]
        (fused, flops), (plain, plain_flops) = measured(*attend, "cuda"), measured(*attend, "cpu")
        assert flops == plain_flops == 6 * 2 * 2 * 4 * 64 * 64 * 8
        assert plain == fused if bias is None else plain > 2 * fused
