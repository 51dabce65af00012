"""Properties of VLMo alone; those that it shares with other models are in test_every_model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.errors import ConfigError
from pipeline.models import build_model, skeleton
from pipeline.models.vlmo import VLMo, copy_expert
from pipeline.objectives import trained_modules
from tests.support.forwards import LAYERS, MODELS, ROWS, VOCABULARY, forwards, lively_model, run

RELATIVE = MODELS["vlmo"][0]


@pytest.fixture
def model() -> VLMo:
    return lively_model("vlmo")


def test_kept_branch_is_scaled_by_its_drop_path_rate(model: VLMo) -> None:
    one = replace(forwards("vlmo")["image"], drop_path_mask=torch.ones(ROWS, LAYERS, 2, dtype=torch.bool))
    kept = run(model, one, "tokens")
    assert RELATIVE.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3))
    for block, rate in zip(model.blocks, RELATIVE.drop_path_rates, strict=True):
        for branch in (block.attention.projection, block.experts["vision"].contract):
            with torch.no_grad():
                branch.weight.div_(1 - rate)
                branch.bias.div_(1 - rate)
    unmasked = run(model, replace(one, drop_path_mask=None), "tokens")
    torch.testing.assert_close(unmasked, kept, rtol=1e-5, atol=1e-5)


class NoHostSynchronisation(TorchDispatchMode):
    """Dispatch mode that fails on operations that make the host wait for the device.

    These read a value of a tensor, or have a shape that depends on values.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), func
        if func.__name__.startswith("index."):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [(), ("tokens",)], ids=["what heads need", "everything"])
def test_forward_never_waits_for_the_device(model: VLMo, heads: tuple[str, ...]) -> None:
    given = {name: replace(one, heads=(*one.heads, *heads)) for name, one in forwards("vlmo").items()}
    with NoHostSynchronisation():
        model(given)


def test_published_language_stage_freezes_named_modules() -> None:
    model = skeleton(RELATIVE)
    frozen = model.parts_named(["image_embedding", "attention", "vision_expert"])
    assert frozen == {"image_embedding", "attention", "vision_expert.lower", "vision_expert.upper"}
    left = trained_modules(model, frozenset({"mlm"}), "text") - frozen
    language = {"text_embedding", "positions.text", "language_expert.lower", "language_expert.upper"}
    assert left == {*language, "norm", "mlm_head"}
    with pytest.raises(ConfigError, match="did you mean 'vision_expert'"):
        model.parts_named(["vision_experts"])


def test_only_copied_experts_change(model: VLMo) -> None:
    before = model.state_dict()
    after = copy_expert(before, "vision", "vision_language")
    for name, tensor in after.items():
        source = name.replace("experts.vision_language", "experts.vision")
        assert torch.equal(tensor, before[source])
    changed = {model.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_language_expert"}


def test_initialisation_is_the_published_one() -> None:
    model = build_model(RELATIVE, VOCABULARY)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("gamma"):
            assert (parameter == 0.5).all()
        elif name.endswith("bias") or name.startswith("positions"):
            assert (parameter == 0).all()
        elif parameter.numel() > 500:
            assert parameter.abs().max() <= 0.04
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.1)
