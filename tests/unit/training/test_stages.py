"""A stage: its vocabulary and starting weights, what it trains, its step and planned work, and VLMo's release."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import OptimizerConfig, RunConfig, TokenizerConfig
from pipeline.data.contents.text import CLIP_SPECIALS, SPECIALS, Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig, Model
from pipeline.models.resize import resize_grid, resize_relative_grid, resize_text_distances
from pipeline.objectives.itc import global_contrast
from pipeline.training import workload
from pipeline.training.checkpoint.weights import load_weights, save_weights, stage_url
from pipeline.training.engine import parameter_groups
from pipeline.training.metrics import diagnostic_metrics
from pipeline.training.prepare import check_start, choose_tokenizer, coverage_alert, load_coverage, measure_coverage
from pipeline.training.stages import Stage, build_stage_model, load_matching, prepare_experts
from tests.support.engines import build_engine, gradients_and_losses, tiny_model
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config
from tests.support.trial import cells, trial_config

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(VOCABULARY - 5))]


def staged(tmp_path: Path, *stages: dict[str, Any], **model: Any) -> RunConfig:
    """Return the tiny run with changes to its first stages."""
    values = tiny_config().model_dump(mode="json")
    values |= {"output": str(tmp_path), "model": values["model"] | model}
    for stage, change in zip(values["stages"], stages, strict=False):
        stage |= change
    return validate(values, "tiny")


def finish(config: RunConfig, model: Model | None = None, seed: int = 0) -> str:
    """Save the weights of the first stage as its run does, and return their URL."""
    stage, model = Stage(config, 0), model or build_model(config.model, VOCABULARY, seed=seed)
    metadata = {"config": stage.run.model_dump(mode="json"), "stage": stage.name, "step": 4}
    save_weights(Storage(), stage_url(config, 0), dict(model.state_dict()), TOKENS, metadata)
    return stage_url(config, 0)


def model_of_stage(config: RunConfig, index: int) -> Model:
    return build_stage_model(Stage(config, index), Storage(), VOCABULARY)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def check(config: RunConfig, tokens: list[str] = TOKENS) -> None:
    check_start(Stage(config, 0), Storage(), Tokenizer(tokens))


# ---- weights of another size or architecture
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_next_stage_reads_larger_images_with_resized_positions(tmp_path: Path, positions: str) -> None:
    config = staged(tmp_path, {}, {"image_size": 32}, positions=positions)
    assert [Stage(config, index).run.model.image_size for index in range(3)] == [16, 32, 16]
    as_second = Stage(config, 1).run
    assert Stage(config, 0).run is config
    assert Stage(as_second, 1).run is as_second
    assert Stage(as_second, 2).run.model == config.model
    before = model_of_stage(config, 0)
    with torch.no_grad():
        for parameter in before.parameters():  # because the relative table is initialised to zero
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    finish(config, before)
    old, new = before.state_dict(), model_of_stage(config, 1).state_dict()
    name = "positions.image" if positions == "relative" else "image_embedding.positions"
    resize = resize_relative_grid if positions == "relative" else partial(resize_grid, rule="bicubic")
    assert_equal(new, old | {name: resize(old[name], 4)})
    with pytest.raises(ConfigError, match=r"stages.language.image_size: image_size 30 must be a multiple"):
        staged(tmp_path, {}, {"image_size": 30})


ABSOLUTE = {"positions": "absolute"}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the model keys there and here, by message
    "layers 3 there, 2 here": ({"layers": 3}, {}),
    "positions 'absolute' there, 'relative' here": (ABSOLUTE, {}),
    "layer_scale False there, True here": ({"layer_scale": None}, {}),
    "model.max_text_length: 20": (ABSOLUTE | {"max_text_length": 12}, ABSOLUTE | {"max_text_length": 20}),
}


def test_only_an_equal_architecture_and_vocabulary_of_any_image_size_and_text_length_are_accepted(tmp_path) -> None:
    """Keys that matter in training alone may differ."""
    short = staged(tmp_path, *[{"max_text_length": 8}] * 4, max_text_length=8, image_size=24)
    before = model_of_stage(short, 0)
    check(config := staged(tmp_path, {"start_from": finish(short, before)}))
    expected = resize_text_distances(before.state_dict()["positions.text"], 12)
    assert torch.equal(model_of_stage(config, 0).state_dict()["positions.text"], expected)
    for number, (message, (theirs, ours)) in enumerate(OTHERS.items()):
        url = finish(staged(tmp_path / str(number), **theirs))
        with pytest.raises(ConfigError, match=r"stages\.vision\.start_from.*" + message):
            check(staged(tmp_path, {"start_from": url}, **ours))
    url = finish(staged(tmp_path, drop_path=0.3, init_std=0.1, layer_scale=1e-5))
    check(config := staged(tmp_path, {"start_from": url}))
    with pytest.raises(ConfigError, match=rf"set tokenizer.vocabulary to {url}/vocab.txt"):
        check(config, [*TOKENS[:-1], "another"])


# ---- modules absent from the weights, and those that a stage does not train
def test_missing_module_is_rejected_unless_declared_absent_or_copied(tmp_path: Path) -> None:
    config = staged(tmp_path, {}, {}, {"experts": {"vision_language": "language"}})
    state = build_model(config.model, VOCABULARY, seed=9).state_dict()
    incomplete = {name: tensor for name, tensor in state.items() if "vision_language" not in name}
    model, fresh = (build_model(config.model, VOCABULARY, seed=5) for _ in range(2))
    with pytest.raises(CheckpointError, match=r"missing: blocks.1.experts.vision_language"):
        load_matching(model, incomplete, "language")
    load_matching(model, incomplete, "language", frozenset({"vision_language_expert"}))
    assert_equal(model.state_dict(), fresh.state_dict() | incomplete)
    prepared = prepare_experts(model, incomplete, config.stages[2])
    copied = {name for name in prepared if "vision_language" in name}
    assert copied == state.keys() - incomplete.keys()
    assert_equal(prepared, incomplete | {name: state[name.replace("vision_language", "language")] for name in copied})
    # The second image's modality starts as the first one's.
    model = build_model(config.model, VOCABULARY, HeadConfig(nlvr2=True))
    start = load_weights(Storage(), finish(config, seed=9))
    load_matching(model, model.resize_state(start.tensors, start.config.model), "nlvr2")
    second = "image_embedding.second"
    learnt = (state := model.state_dict()) | {second: torch.ones(32)}
    assert torch.equal(state[second], state["image_embedding.modality"])
    assert torch.equal(model.resize_state(learnt, config.model)[second], torch.ones(32))


def test_all_that_is_routed_to_language_can_start_as_a_copy_of_vision(tmp_path: Path) -> None:
    routed: dict[str, Any] = {"attention": "routed", "vision_language_layers": 0, "contrasts": 1}
    config = staged(tmp_path, {"experts": {"language": "vision"}}, {"experts": {"vision_language": "vision"}}, **routed)
    model, state = build_model(config.model, VOCABULARY), build_model(config.model, VOCABULARY, seed=9).state_dict()
    copied = {name for name in state if ".language." in name}
    assert {"norm.language.weight", "blocks.1.attention.joint.language.bias"} <= copied
    expected = state | {name: state[name.replace("language", "vision")] for name in copied}
    assert_equal(prepare_experts(model, state, config.stages[0]), expected)
    with pytest.raises(ConfigError, match=r"experts\.vision_language is 'vision', and the model has no such expert"):
        prepare_experts(model, state, config.stages[1])


def trained(index: int, *stages: dict[str, Any]) -> set[str]:
    """Return the parts of the model that a stage trains, in a run whose first stages are changed."""
    model = model_of_stage(staged(Path(), *stages), index)
    return {model.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trap_11_modules_no_objective_reads_are_not_trained(tmp_path: Path) -> None:
    """With relative positions there are no text positions; the top vision and language experts learn from ITC alone."""
    start, top = {"start_from": "random"}, {"vision_expert.upper", "language_expert.upper"}
    assert not (top | {"itc_head"}) & trained(2, {}, {}, {"objectives": {"mlm": {}}} | start)
    assert top <= trained(2, {}, {}, start)
    assert "text_embedding.positions" not in model_of_stage(staged(tmp_path), 0).state_dict()


def test_trap_13_text_stage_trains_no_image_positions() -> None:
    """The release trains one table and the last norm, which images share, on text alone."""
    published = {"freeze": ["attention", "vision_expert", "image_embedding"], "start_from": "random"}
    moved = trained(1, {}, published)
    assert moved & {"positions.text", "norm", "positions.image", "positions.cross"} == {"positions.text", "norm"}
    published["freeze"] = [*published["freeze"], "norm"]
    assert "norm" not in trained(1, {}, published)


# ---- the vocabulary
@pytest.mark.parametrize(("word", "lowercase"), [("Rome", False), ("rome", True)])
def test_lowercasing_follows_the_vocabulary_or_the_key(tmp_path: Path, word: str, lowercase: bool) -> None:
    def chosen(key: bool | None = None) -> bool:
        tokenizer = TokenizerConfig(vocabulary=str(tmp_path / "vocab.txt"), lowercase=key)
        return choose_tokenizer(staged(tmp_path).model_copy(update={"tokenizer": tokenizer}), Storage()).lowercase

    (tmp_path / "vocab.txt").write_text("\n".join((*SPECIALS, "the", word)))
    assert chosen() == lowercase
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    assert chosen() == lowercase
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not lowercase}))
    with pytest.raises(ConfigError, match=rf"lowercase: .*do_lower_case {str(not lowercase).lower()}; set the key"):
        chosen()
    assert [chosen(key) for key in (True, False)] == [True, False]
    (tmp_path / "vocab.txt").write_text("\n".join(["a", "a</w>", *CLIP_SPECIALS]))
    with pytest.raises(ConfigError, match=r"has no \[MASK\], and stage .* trains mlm; give a WordPiece"):
        chosen()


def test_unknown_tokens_are_measured_per_source_and_reported(tmp_path: Path, make_tar: Any, caplog: Any) -> None:
    captions = {"english": "a red cat", "arabic": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621"}
    english, arabic = urls = [str(tmp_path / name) for name in captions]
    for url, caption in zip(urls, captions.values(), strict=True):
        Path(url).mkdir()
        Path(url, "0.tar").write_bytes(make_tar({str(n): {"txt": caption.encode()} for n in range(5)}))
        index_shards(Storage(), url)
    run = str(tmp_path / "run")
    tokenizer, smaller = Tokenizer([*SPECIALS, "a", "red", "cat"]), Tokenizer([*SPECIALS, "a"])
    assert load_coverage(Storage(), run, tokenizer) is None
    assert measure_coverage(Storage(), run, tokenizer, urls) == {english: 0.0, arabic: 1.0}
    assert f"100.0% of the tokens of {arabic}" in caplog.text
    unknown = load_coverage(Storage(), run, tokenizer)
    assert unknown == {english: 0.0, arabic: 1.0} == measure_coverage(Storage(), run, tokenizer, [])
    assert load_coverage(Storage(), run, smaller) is None, "of another vocabulary"
    assert measure_coverage(Storage(), run, smaller, [english]) == {english: pytest.approx(2 / 3, abs=1e-6)}
    Path(run, "vocabulary.json").write_text("[1]")
    assert load_coverage(Storage(), run, smaller) is None, "a malformed record is ignored"
    limits = [coverage_alert(unknown) for unknown in ({}, {"a": 0.01}, {"a": 0.0101, "b": 0.0})]
    assert [alert != "" for alert in limits] == [False, False, True], "above one percent"


# ---- the step: losses per source, diagnostics, parameter groups, planned work
@pytest.mark.parametrize(("index", "micro_batch_size"), [(2, None), (2, 5), (3, None), (3, 5)])
def test_losses_by_source_add_up_to_the_loss_and_diagnostics_count_every_pair(index, micro_batch_size) -> None:
    """The head classifies every pair as matched."""
    config = tiny_config(micro_batch_size=micro_batch_size)
    stage = config.stages[index].model_copy(update={"sources": {"pairs": 0.5, "more_pairs": 0.5}})
    config, size = config.model_copy(update={"stages": (*config.stages[:index], stage)}), stage.global_batch_size
    model, batch = tiny_model(config, index), tiny_batch(config, 0, 0, 1, size)
    with torch.no_grad():
        model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))
    step = build_engine(config, index, model=model, plain=True).step
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
    read = size // stage.objectives["itm"].every
    matched, mismatched = (read, 2 * read) if stage.negatives == "hard" else (read // 2, read - read // 2)
    diagnostics = {name: float(value) for name, value in step.diagnostics.items()}
    assert diagnostics["itm_matched"] == diagnostics["itm_matched_correct"] == matched
    assert (diagnostics["itm_mismatched"], diagnostics["itm_mismatched_correct"]) == (mismatched, 0)
    if "itc" in stage.objectives:
        metrics = diagnostic_metrics(diagnostics, [0.0], [0.0])
        assert metrics["train/itc_temperature"] == pytest.approx(0.07, rel=1e-6)


ONE_OF_A_KIND = {f"{cell.kind}-{cell.objective}": cell for cell in cells() if "visual_tokens" not in str(cell)}


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


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_every_objective_of_every_model_can_be_planned(name: str) -> None:
    stage = Stage(trial_config(ONE_OF_A_KIND[name]), 0)
    costs = workload.run_step(stage, VOCABULARY, "cuda")
    assert min(costs.flops, costs.activations, costs.tokens) > 0


def work(index: int, **engine: object) -> Any:
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
    """On each of the release's ranks, gathers are differentiable in the rank's own rows; then DDP takes the mean."""
    ranks, rows, log_scale, of_ranks = 4, 12, torch.tensor(2.0), list[tuple[Tensor, ...]]()
    image, text = F.normalize(torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(0)), dim=2)
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
        configs = (released(reproduces, index, objectives={"mlm": {}}) for reproduces in (False, True))
        (ours, our_losses), (theirs, their_losses) = (gradients_and_losses(config, plain=True) for config in configs)
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
    ours, theirs = (
        {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
        for groups in (
            parameter_groups(model, OptimizerConfig(weight_decay=0.1), released) for released in (False, True)
        )
    )
    only_theirs = r".*(gamma|log_scale|log_scale_vl|cls|modality|vqa_head\.norm\.weight)|.*\.experts\..*norm\.weight"
    assert ours == {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert theirs - ours == {name for name in names.values() if re.fullmatch(only_theirs, name)}
    assert ours - theirs == {"positions.image", "positions.cross", "positions.text"}
    assert "blocks.0.experts.vision.norm.weight" in theirs
    assert not theirs & {"blocks.0.norm.weight", "mlm_head.norm.weight", "blocks.0.attention.query_bias"}


def test_reproduce_vlmo_release_requires_vlmo() -> None:
    values = released(True, 0).model_dump(mode="json") | {"model": {"kind": "vit", "image_size": 16, "patch_size": 8}}
    with pytest.raises(ConfigError, match=r"reproduce_vlmo_release: applies to model\.kind vlmo"):
        validate(values, "tiny")
