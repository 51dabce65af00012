"""The training step: losses per source, diagnostics, parameter groups, planned work, and VLMo's release."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import OptimizerConfig, RunConfig
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives.itc import global_contrast
from pipeline.planning.estimate import Work
from pipeline.training import workload
from pipeline.training.engine import parameter_groups
from pipeline.training.metrics import diagnostic_metrics
from pipeline.training.stages import Stage
from tests.support.engines import build_engine, gradients_and_losses, tiny_model
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config
from tests.support.trial import cells, trial_config

WAYS = pytest.mark.parametrize(("index", "micro_batch_size"), [(2, None), (2, 5), (3, None), (3, 5)])


@WAYS
def test_losses_by_source_add_up_to_the_loss(index: int, micro_batch_size: int | None) -> None:
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage = config.stages[index].model_copy(update={"sources": {"pairs": 0.5, "more_pairs": 0.5}})
    config = config.model_copy(update={"stages": (*config.stages[:index], stage)})
    step, batch = build_engine(config, index, plain=True).step, tiny_batch(config, 4, 0, 1, 12)
    batch = replace(batch, source=batch.place // 3 % 2)
    alone = step(batch)
    assert step.by_source == {}
    losses = step(batch, with_metrics=True)
    assert step.by_source.keys() == stage.objectives.keys()
    for objective, shares in step.by_source.items():
        total, count = shares.sum(dim=0)
        torch.testing.assert_close(total / count, losses[objective])
        assert (shares[:, 1] > 0).all()
        assert losses[objective] == alone[objective]


@WAYS
def test_diagnostics_count_every_pair(index: int, micro_batch_size: int | None) -> None:
    """The head classifies every pair as matched."""
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage, model = config.stages[index], tiny_model(config, index)
    with torch.no_grad():
        model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))
    step = build_engine(config, index, model=model, plain=True).step
    step(tiny_batch(config, 0, 0, 1, stage.global_batch_size), with_metrics=True)
    read = stage.global_batch_size // stage.objectives["itm"].every
    matched, mismatched = (read, 2 * read) if stage.negatives == "hard" else (read // 2, read - read // 2)
    diagnostics = {name: float(value) for name, value in step.diagnostics.items()}
    assert diagnostics["itm_matched"] == diagnostics["itm_matched_correct"] == matched
    assert (diagnostics["itm_mismatched"], diagnostics["itm_mismatched_correct"]) == (mismatched, 0)
    if "itc" in stage.objectives:
        metrics = diagnostic_metrics(diagnostics, [0.0], [0.0])
        assert metrics["train/itc_temperature"] == pytest.approx(0.07, rel=1e-6)


def test_forwards_of_a_name_are_merged_with_the_heads_and_inputs_of_each() -> None:
    config = trial_config(ONE_OF_A_KIND["imagebert-moc"])
    objectives = dict.fromkeys(("mlm", "moc"), config.stages[0].objectives["moc"])
    config = config.model_copy(update={"stages": (config.stages[0].model_copy(update={"objectives": objectives}),)})
    built = build_engine(config, plain=True)
    built.step(workload.full_batch(config, built.stage, VOCABULARY))
    (merged,) = [forward for forward in built.engine.forwards.values() if len(forward.heads) == 2]
    assert set(merged.heads) == {"mlm", "moc"}
    assert None not in (merged.mask_positions, merged.region_positions)


def test_parameters_are_grouped_by_decay_and_learning_rate() -> None:
    model = build_model(tiny_config().model, 50, HeadConfig(answers=7, nlvr2=True))
    frozen = model.norm.weight.requires_grad_(False)
    for factor in (1.0, 20.0):
        groups = parameter_groups(model, OptimizerConfig(weight_decay=0.05, head_lr_multiplier=factor))
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter is not frozen)
        for group in groups:  # matrices decay
            assert {parameter.dim() >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.05}
        fast = {id(parameter) for group in groups if group["rate_factor"] != 1.0 for parameter in group["params"]}
        for name, parameter in model.named_parameters():  # the pooler is no head
            assert (id(parameter) in fast) == (factor == 20.0 and model.part_of(name).endswith("_head")), name
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        parameter_groups(model.requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize("index", range(4))
def test_flops_and_parameters_equal_those_of_a_real_step(index: int) -> None:
    config = tiny_config()
    built, stage = build_engine(config, index, plain=True), Stage(config, index)
    with FlopCounterMode(display=False) as counter:
        built.step(workload.full_batch(config, stage.config, VOCABULARY))
    # FLOPs of attention are counted because VLMo's trainable bias prevents the fused kernel on CPU.
    assert workload.run_step(stage, VOCABULARY, "cpu").flops == counter.get_total_flops()
    sizes, real = workload.work_of(stage, VOCABULARY, "cpu").parameters, list(built.engine.model.parameters())
    assert sizes.total == sum(parameter.numel() for parameter in real)
    assert sizes.trained == sum(parameter.numel() for parameter in real if parameter.requires_grad)


ONE_OF_A_KIND = {f"{cell.kind}-{cell.objective}": cell for cell in cells() if "visual_tokens" not in str(cell)}


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_every_objective_of_every_model_can_be_planned(name: str) -> None:
    stage = Stage(trial_config(ONE_OF_A_KIND[name]), 0)
    costs = workload.run_step(stage, VOCABULARY, "cuda")
    assert min(costs.flops, costs.activations, costs.tokens) > 0


def work(index: int, **engine: object) -> Work:
    return workload.work_of(Stage(tiny_config(**engine), index), VOCABULARY, "cuda")


def test_work_follows_the_engine_settings_and_step_time_the_gpu() -> None:
    pairs, recomputed = work(2), work(2, activation_checkpointing=True)
    assert pairs.step_flops(12, 1) < pairs.step_flops(12, 2), "micro-batches read the ITC towers twice"
    assert pairs.contrast_flops > 0
    assert recomputed.activations.per_example < 0.6 * pairs.activations.per_example
    assert recomputed.flops.per_example > 1.15 * pairs.flops.per_example
    half, exact = work(0, precision="bfloat16"), work(0)
    assert 0.4 < half.activations.per_example / exact.activations.per_example < 0.8
    stage, gpus = Stage(tiny_config(), 2), ("NVIDIA H100 80GB HBM3", "NVIDIA L40S", "A GPU of next year")
    h100, l40s, unknown = (workload.peak_step_seconds(gpu, stage, VOCABULARY, 3) for gpu in gpus)
    assert h100 == pytest.approx(pairs.step_flops(math.ceil(stage.config.global_batch_size / 3), 1) / 989e12)
    assert l40s == pytest.approx(h100 * 989 / 362)
    assert unknown is None


# ---- each deviation that `reproduce_vlmo_release` reproduces, compared with the corrected behaviour


def released(reproduces: bool, index: int = 2, **stage: object) -> RunConfig:
    """Return the tiny config without drop path, reduced to one stage."""
    values = tiny_config().model_dump(mode="json")
    values["model"]["drop_path"], values["stages"] = 0.0, [values["stages"][index] | stage]
    return validate(values | {"reproduce_vlmo_release": reproduces}, "tiny")


def test_trap_01_faithful_itc_has_the_gradient_of_the_release() -> None:
    """The release is written out: on each of 4 ranks, gathers that are differentiable in the rank's own rows only, the
    loss of all N x N logits, and its backward; then DDP's mean over ranks, each of which holds its own rows."""
    ranks, rows, draw, log_scale = 4, 12, torch.Generator().manual_seed(0), torch.tensor(2.0)
    image, text = (F.normalize(torch.randn(rows, 8, generator=draw), dim=1) for _ in range(2))
    of_ranks: list[tuple[Tensor, ...]] = []
    for own in torch.arange(rows).chunk(ranks):
        leaves = [t.detach().clone().requires_grad_() for t in (image, text, log_scale)]
        mask, target = torch.zeros(rows, 1).index_fill(0, own, 1.0), torch.arange(rows)
        gathered = [leaf * mask + leaf.detach() * (1 - mask) for leaf in leaves[:2]]
        logits = leaves[2].exp() * gathered[0] @ gathered[1].T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        of_ranks.append(torch.autograd.grad(loss, leaves))
    expected_image, expected_text, expected_scale = (torch.stack(g).mean(dim=0) for g in zip(*of_ranks, strict=True))

    batch = replace(tiny_batch(tiny_config(), 0, 0, 1, rows), image_id=torch.arange(rows))
    outputs = {"image": {"itc": image, "scale": log_scale.exp()}, "text": {"itc": text}}
    cut, whole = (
        global_contrast(outputs, batch, 1.0, lambda rows: rows.detach().clone(), slice(None), 0, divisor)
        for divisor in (ranks, 1)
    )
    torch.testing.assert_close(cut.gradients["image", "itc"], expected_image)
    torch.testing.assert_close(cut.gradients["text", "itc"], expected_text)
    torch.testing.assert_close(cut.scale_gradients["scale"] * log_scale.exp(), expected_scale)
    torch.testing.assert_close(whole.gradients["image", "itc"], ranks * expected_image)


def test_mlm_on_pairs_has_weight_025_and_is_reported_unweighted() -> None:
    for index, factor in ((2, 0.25), (1, 1.0)):  # pairs, text
        (ours, our_losses), (theirs, their_losses) = (
            gradients_and_losses(released(reproduces, index, objectives={"mlm": {}}), plain=True)
            for reproduces in (False, True)
        )
        torch.testing.assert_close(theirs, {name: factor * gradient for name, gradient in ours.items()})
        assert their_losses["mlm"] == our_losses["mlm"]
        assert their_losses["loss"] == pytest.approx(factor * our_losses["loss"])


def test_trap_10_logit_scales_are_bounded_unless_faithful() -> None:
    forward = ForwardInput(heads=("itc",), image=torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    for reproduces, expected in ((False, 100.0), (True, math.exp(5.0))):
        model = tiny_model(released(reproduces))
        torch.nn.init.constant_(model.itc_head.log_scale, 5.0)
        assert model({"image": forward})["image"]["scale"].item() == pytest.approx(expected)


def test_trap_08_release_decays_by_name_fragments_and_we_decay_matrices_only() -> None:
    model = skeleton(tiny_config().model, 11, HeadConfig(answers=3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours, theirs = set[str](), set[str]()
    for decayed, reproduces in ((ours, False), (theirs, True)):
        for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1), reproduces):
            decayed |= {names[id(parameter)] for parameter in group["params"] if group["weight_decay"]}
    only_theirs = ("gamma", "log_scale", "log_scale_vl", "cls", "modality", "vqa_head.norm.weight")
    assert ours == {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert theirs - ours == {
        name
        for name in names.values()
        if name.endswith(only_theirs) or (".experts." in name and name.endswith("norm.weight"))
    }
    assert ours - theirs == {"positions.image", "positions.cross", "positions.text"}
    assert "blocks.0.experts.vision.norm.weight" in theirs
    assert not theirs & {"blocks.0.norm.weight", "mlm_head.norm.weight", "blocks.0.attention.query_bias"}


def test_reproduce_vlmo_release_requires_vlmo() -> None:
    vit = {"kind": "vit", "width": 32, "heads": 2, "layers": 2, "image_size": 16, "patch_size": 8}
    values = released(True, 0).model_dump(mode="json") | {"model": vit}
    with pytest.raises(ConfigError, match=r"reproduce_vlmo_release: applies to model\.kind vlmo"):
        validate(values, "tiny")
