"""The probe counts bytes and FLOPs of code that runs on meta tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.planning.probe import Probe


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


def test_checkpointed_layers_save_memory_and_add_flops():
    weights = [meta(64, 64) for _ in range(4)]

    def layers(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = (x @ weight).relu().exp()
        return x

    def run(recompute: bool) -> tuple[int, int]:
        with Probe(weights, "cuda") as probe:
            x = torch.empty(32, 64, device="meta").requires_grad_()
            loss = (checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)).sum()
            alive = probe.live_bytes
            loss.backward()
            return alive, probe.flops

    (kept, once), (little, twice) = run(False), run(True)
    assert little < kept / 2
    assert twice == pytest.approx(once * 4 / 3)


@pytest.mark.parametrize("has_bias", [False, True])
def test_fused_attention_has_equal_flops_and_less_memory(has_bias):
    def run(kernels: str) -> tuple[int, int]:
        query, key, value = meta(2, 4, 64, 8), meta(2, 4, 64, 8), meta(2, 4, 64, 8)
        bias = meta(1, 4, 64, 64)  # trainable, so the CPU does not use the fused kernel
        with Probe([query, key, value, bias], kernels) as probe:  # type: ignore[arg-type]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias if has_bias else None)
            alive = probe.live_bytes
            mixed.sum().backward()
            return alive, probe.flops

    (fused, flops), (plain, plain_flops) = run("cuda"), run("cpu")
    assert flops == plain_flops == 6 * 2 * 2 * 4 * 64 * 64 * 8
    assert plain > 2 * fused if has_bias else plain == fused
