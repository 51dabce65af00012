"""Word-patch alignment equals the published implementation: plan, distance, loss and gradients to 1e-5 (C8)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.models.forward import ForwardInput
from pipeline.models.model import alignment_outputs
from pipeline.objectives.wpa import BETA, INNER, OUTER, wpa_cost, wpa_distance, wpa_loss, wpa_plan

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "word_patch_alignment.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip(f"reference tensors are not here: {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        assert (meta["beta"], meta["iterations"], meta["inner"]) == (BETA, OUTER, INNER)
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def aligned_features(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's alignment outputs: words and patches with their masks."""
    text, keep = golden["input.text_features"], golden["input.text_mask"]
    visible = golden["input.image_mask"][:, 1:].long() - 1  # -1 at padding
    words = torch.zeros_like(keep, dtype=torch.int64)
    one = ForwardInput(("alignment",), text=words, text_keep=keep, visible_patches=visible)
    features = torch.cat([text, golden["input.image_features"]], dim=1)
    return alignment_outputs(one, features, patch_size=32)


def test_plan_and_distance_equal_the_release(golden: dict[str, Tensor]) -> None:
    found = aligned_features(golden)
    cost = wpa_cost(found["words"], found["patches"])
    plan = wpa_plan(cost, found["words_keep"], found["patches_keep"])
    torch.testing.assert_close(plan, golden["output.transport_plan"][:, :, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wpa_distance(cost, plan), golden["output.distance"], rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_equal_the_release(golden: dict[str, Tensor]) -> None:
    for name in ("text", "image"):
        golden[f"input.{name}_features"].requires_grad_().grad = None
    found, labels = aligned_features(golden), golden["input.itm_labels"]
    loss = wpa_loss(*found.values(), matched=labels == 1) / len(labels)
    loss.backward()
    torch.testing.assert_close(loss, golden["output.wpa_loss"], rtol=1e-5, atol=1e-5)
    for name in ("text", "image"):
        gradient = golden[f"input.{name}_features"].grad
        torch.testing.assert_close(gradient, golden[f"output.grad_{name}_features"], rtol=1e-5, atol=1e-5)
