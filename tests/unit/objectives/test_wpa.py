"""Properties of word-patch alignment. Shapes: 3 examples, 6 words, 8 patches, features of width 5."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.objectives.wpa import wpa_cost, wpa_loss, wpa_plan

ROWS, WORDS, PATCHES, WIDTH = 3, 6, 8, 5
MATCHED = torch.tensor([True, False, True])


@pytest.fixture
def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "words": torch.randn(ROWS, WORDS, WIDTH, generator=generator),
        "patches": torch.randn(ROWS, PATCHES, WIDTH, generator=generator),
        "words_keep": torch.arange(WORDS) < torch.tensor([6, 4, 1])[:, None],
        "patches_keep": torch.arange(PATCHES) < torch.tensor([5, 8, 3])[:, None],
    }


def plan_of(features: dict[str, Tensor]) -> Tensor:
    cost = wpa_cost(features["words"], features["patches"])
    return wpa_plan(cost, features["words_keep"], features["patches_keep"])


def gradients(features: dict[str, Tensor], matched: Tensor = MATCHED) -> tuple[Tensor, ...]:
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in features.items()}
    return torch.autograd.grad(wpa_loss(**leaves, matched=matched), [leaves["words"], leaves["patches"]])


def test_plan_has_uniform_marginals_and_approximates_the_optimal_assignment(features: dict[str, Tensor]) -> None:
    """For equal numbers of words and patches the optimal plan is a permutation, which scipy finds exactly."""
    plan = plan_of(features)
    for side, keep in ((2, features["words_keep"]), (1, features["patches_keep"])):
        torch.testing.assert_close(plan.sum(dim=side), keep / keep.sum(dim=1, keepdim=True), rtol=0.02, atol=1e-4)
    cost = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(3))
    keep = torch.ones(1, 5, dtype=torch.bool)
    best = cost[0].numpy()[linear_sum_assignment(cost[0].numpy())].mean()
    assert best - 1e-4 <= (cost * wpa_plan(cost, keep, keep, outer=500)).sum().item() <= 1.01 * best


def test_padding_changes_no_plan_or_gradient(features: dict[str, Tensor]) -> None:
    longer = {
        "words": torch.cat([features["words"], torch.full((ROWS, 2, WIDTH), 9.0)], dim=1),
        "patches": torch.cat([features["patches"], torch.full((ROWS, 3, WIDTH), -7.0)], dim=1),
        "words_keep": torch.nn.functional.pad(features["words_keep"], (0, 2)),
        "patches_keep": torch.nn.functional.pad(features["patches_keep"], (0, 3)),
    }
    torch.testing.assert_close(plan_of(longer)[:, :WORDS, :PATCHES], plan_of(features))
    for mine, other in zip(gradients(features), gradients(longer), strict=True):
        torch.testing.assert_close(other[:, : mine.shape[1]], mine)
        assert not other[:, mine.shape[1] :].any()


def test_trap_10_example_of_only_padding_has_no_gradient_and_half_precision_is_computed_in_float32(
    features: dict[str, Tensor],
) -> None:
    """For a caption of only [CLS] and [SEP] the published code divides by zero words."""
    for side in ("words_keep", "patches_keep"):
        padded = features | {side: features[side].index_fill(0, torch.tensor([1]), False)}
        assert not plan_of(padded)[1].any()
        assert wpa_loss(**padded, matched=MATCHED).isfinite()
        for gradient in gradients(padded):
            assert gradient.isfinite().all()
            assert not gradient[1].any()
            assert gradient[0].any()
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in features.items()}
    exact = {name: t.float() if t.is_floating_point() else t for name, t in rounded.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan, loss = plan_of(rounded), wpa_loss(**rounded, matched=MATCHED)
    assert plan.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(plan, plan_of(exact))


def test_loss_is_signed_by_the_match_and_its_plan_is_a_constant(features: dict[str, Tensor]) -> None:
    plan, words = plan_of(features), features["words"].clone().requires_grad_()
    distance = (wpa_cost(words, features["patches"]) * plan).sum(dim=(1, 2))
    expected = distance[0] - distance[1] + distance[2]
    torch.testing.assert_close(wpa_loss(**features, matched=MATCHED), expected)
    torch.testing.assert_close(gradients(features)[0], *torch.autograd.grad(expected, words))
    none = {name: t[:0] for name, t in features.items()}
    assert wpa_loss(**none, matched=MATCHED[:0]) == 0
    assert gradients(none, MATCHED[:0])[0].shape == (0, WORDS, WIDTH)
