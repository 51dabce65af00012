"""Word-patch alignment equals the published implementation: plan, distance, loss and gradients to 1e-5 (C8)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.models.forward import ForwardInput
from pipeline.models.model import alignment_outputs
from pipeline.objectives.wpa import BETA, OUTER, wpa_cost, wpa_loss, wpa_plan

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "word_patch_alignment.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip(f"reference tensors are not here: {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        assert (meta["beta"], meta["iterations"], meta["inner"]) == (BETA, OUTER, 1)
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_plan_distance_loss_and_gradients_equal_the_release(golden: dict[str, Tensor]) -> None:
    features = [golden[f"input.{name}_features"].requires_grad_() for name in ("text", "image")]
    keep = golden["input.text_mask"]
    visible = golden["input.image_mask"][:, 1:].long() - 1  # -1 at padding
    words = torch.zeros_like(keep, dtype=torch.int64)
    forward = ForwardInput(("alignment",), text=words, text_keep=keep, visible_patches=visible)
    aligned = alignment_outputs(forward, torch.cat(features, dim=1), patch_size=32)

    cost = wpa_cost(aligned["words"], aligned["patches"])
    plan = wpa_plan(cost, aligned["words_keep"], aligned["patches_keep"])
    labels = golden["input.itm_labels"]
    loss = wpa_loss(**aligned, matched=labels == 1) / len(labels)
    for name, value in {
        "transport_plan": torch.nn.functional.pad(plan, (1, 0)),  # without the image's [CLS]
        "distance": (cost * plan).sum(dim=(1, 2)),
        "wpa_loss": loss,
        **dict(zip(("grad_text_features", "grad_image_features"), torch.autograd.grad(loss, features), strict=True)),
    }.items():
        expected = golden[f"output.{name}"]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-5)
