"""Each deviation that `reproduce_vlmo_release` reproduces, compared with the corrected behaviour."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import OptimizerConfig, RunConfig
from pipeline.models import skeleton
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives.itc import global_contrast
from pipeline.training import release
from pipeline.training.engine import parameter_groups
from tests.support.engines import gradients_and_losses, tiny_model
from tests.support.tiny_model import tiny_batch, tiny_config

RANKS, ROWS, WIDTH = 4, 12, 8


def switched(reproduces: bool, objectives: dict[str, dict[str, float]] | None = None, index: int = 2) -> RunConfig:
    """Return the tiny config without drop path, reduced to one stage."""
    values = tiny_config().model_dump(mode="json")
    values["model"]["drop_path"] = 0.0
    values["stages"] = [values["stages"][index]]
    if objectives is not None:
        values["stages"][0]["objectives"] = objectives
    return validate(values | {"reproduce_vlmo_release": reproduces}, "tiny")


def gradients(reproduces: bool, *changes: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    return gradients_and_losses(switched(reproduces, *changes), plain=True)


def released_gradients(image: Tensor, text: Tensor, log_scale: Tensor) -> list[Tensor]:
    """Return the gradients of VLMo's release, written out step by step.

    On each rank: gathers that are differentiable in the rank's own rows only, the loss of all N x N logits, and its
    backward; then DDP's mean over ranks, each of which holds its own rows.
    """
    size = len(image) // RANKS
    gradients_of_ranks: list[list[Tensor]] = []
    for rank in range(RANKS):
        own = slice(rank * size, (rank + 1) * size)
        leaves = [t.detach().clone().requires_grad_() for t in (image, text, log_scale)]
        masks = torch.zeros(len(image), 1).index_fill(0, torch.arange(len(image))[own], 1.0)
        gathered = [leaf * masks + leaf.detach() * (1 - masks) for leaf in leaves[:2]]
        logits = leaves[2].exp() * gathered[0] @ gathered[1].T
        target = torch.arange(len(image))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        gradients_of_ranks.append(list(torch.autograd.grad(loss, leaves)))
    return [torch.stack(each).sum(dim=0) / RANKS for each in zip(*gradients_of_ranks, strict=True)]


def test_trap_01_faithful_itc_has_the_gradient_of_the_release() -> None:
    draw = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(ROWS, WIDTH, generator=draw), dim=1) for _ in range(2))
    log_scale = torch.tensor(2.0)
    batch = replace(tiny_batch(tiny_config(), 0, 0, 1, ROWS), image_id=torch.arange(ROWS))
    outputs = {"image": {"itc": image, "scale": log_scale.exp()}, "text": {"itc": text}}
    whole = global_contrast(outputs, batch, 1.0, lambda rows: rows.detach().clone(), slice(None))
    cut = release.scale_gradients(whole, RANKS)
    expected_image, expected_text, expected_scale = released_gradients(image, text, log_scale)
    torch.testing.assert_close(cut.gradients["image", "itc"], expected_image)
    torch.testing.assert_close(cut.gradients["text", "itc"], expected_text)
    torch.testing.assert_close(cut.scale_gradients["scale"] * log_scale.exp(), expected_scale)
    torch.testing.assert_close(whole.gradients["image", "itc"], RANKS * expected_image)


def test_trap_01_only_faithful_runs_scale_the_itc_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, same = (gradients(reproduces, {"itc": {}})[0] for reproduces in (False, True))  # equal on one rank
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    world_sizes: list[int] = []
    scale = release.scale_gradients
    monkeypatch.setattr(release, "scale_gradients", lambda c, size: (world_sizes.append(size), scale(c, RANKS))[1])
    cut, _ = gradients(True, {"itc": {}})
    assert world_sizes == [1]
    for name in ours:
        factor = 1 if "log_scale" in name else RANKS
        torch.testing.assert_close(factor * cut[name], ours[name], rtol=1e-5, atol=1e-7)


def test_mlm_on_pairs_has_weight_025_and_is_reported_unweighted() -> None:
    for index, factor in ((2, 0.25), (1, 1.0)):  # pairs, text
        ours, our_losses = gradients(False, {"mlm": {}}, index)
        theirs, their_losses = gradients(True, {"mlm": {}}, index)
        torch.testing.assert_close(theirs, {name: factor * gradient for name, gradient in ours.items()})
        assert their_losses["mlm"] == our_losses["mlm"]
        assert their_losses["loss"] == pytest.approx(factor * our_losses["loss"])


def test_trap_10_logit_scales_are_bounded_unless_faithful() -> None:
    forward = ForwardInput(heads=("itc",), image=torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    for reproduces, expected in ((False, 100.0), (True, math.exp(5.0))):
        model = tiny_model(switched(reproduces))
        torch.nn.init.constant_(model.itc_head.log_scale, 5.0)
        assert model({"image": forward})["image"]["scale"].item() == pytest.approx(expected)


# Parameters to which the release applies weight decay, and others.
DECAYED = """
    blocks.0.experts.vision.norm.weight blocks.1.experts.vision_language.norm.weight blocks.0.attention_gamma
    blocks.0.expert_gamma itc_head.log_scale itc_head.log_scale_vl image_embedding.cls image_embedding.positions
    text_embedding.modality blocks.0.attention.weight text_embedding.word.weight mlm_head.decode.weight
    vqa_head.norm.weight mim_head.predict.weight
"""
EXEMPT = """
    blocks.0.experts.vision.norm.bias positions.image positions.cross positions.text blocks.0.norm.weight
    blocks.0.attention.query_bias norm.weight text_embedding.norm.weight mlm_head.norm.weight mlm_head.decode.bias
    image_embedding.patch.bias mim_head.predict.bias
"""


def test_trap_08_release_decays_by_name_fragments_and_we_decay_matrices_only() -> None:
    assert all(release.decays(name) for name in DECAYED.split())
    assert not any(release.decays(name) for name in EXEMPT.split())
    model = skeleton(tiny_config().model, 11, HeadConfig(answers=3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours, theirs = (
        {
            names[id(parameter)]
            for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1), reproduces)
            if group["weight_decay"]
            for parameter in group["params"]
        }
        for reproduces in (False, True)
    )
    assert ours == {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert theirs - ours == {
        name
        for name in names.values()
        if name.endswith(("gamma", "log_scale", "log_scale_vl", "cls", "modality", "vqa_head.norm.weight"))
        or (".experts." in name and name.endswith("norm.weight"))
    }
    assert ours - theirs == {"positions.image", "positions.cross", "positions.text"}


def test_reproduce_vlmo_release_requires_vlmo() -> None:
    values = tiny_config().model_dump(mode="json")
    values["model"] = {"kind": "vit", "width": 32, "heads": 2, "layers": 2, "image_size": 16, "patch_size": 8}
    values["stages"] = values["stages"][:1]
    with pytest.raises(ConfigError, match=r"reproduce_vlmo_release: applies to model\.kind vlmo"):
        validate(values | {"reproduce_vlmo_release": True}, "tiny")
