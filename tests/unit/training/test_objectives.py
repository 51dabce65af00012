"""Every objective with every model that supports it, and the training step on images and regions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import MODEL_SECTIONS, OBJECTIVES, RunConfig
from pipeline.data.contents.text import SPECIALS
from pipeline.data.storage import Storage
from pipeline.models import skeleton
from pipeline.models.model import HeadConfig
from pipeline.objectives import Objective, objective_type, trained_modules
from pipeline.objectives.itm import matched_examples
from pipeline.objectives.wpa import wpa_loss
from pipeline.training.collectives import Collectives
from pipeline.training.prepare import choose_tokenizer
from pipeline.training.stages import Stage, check_stages, stage_skeleton
from tests.support import trial as trials
from tests.support.gradients import TOLERANCE, relative_errors
from tests.support.trial import ROWS, VISUAL_TOKENS, Cell, TrialState, begin, tiny_run

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHIFTS = {"ranking_head.score.bias"}  # added to every logit of the softmax, so its gradient is 0 up to rounding


@pytest.mark.parametrize("cell", trials.cells(), ids=str)
def test_loss_falls_in_thirty_steps_and_declared_modules_are_those_with_a_gradient(
    cell: Cell, collectives: Collectives
) -> None:
    losses = trials.train(cell, collectives)
    assert cell.is_learnt(losses), [round(loss, 3) for loss in losses]
    begun = begin(trials.trial_config(cell), collectives)
    model = begun.engine.model.requires_grad_(True)  # including parameters that the stage froze
    begun.step(begun.batch)
    moved = {name for name, gradient in begun.engine.gradients().items() if gradient.abs().max() > 0}
    expected = trained_modules(model, begun.step.stage.config.objectives, cell.source_type)
    declared = {name for name, _ in model.named_parameters() if model.part_of(name) in expected}
    assert declared - SHIFTS == moved - SHIFTS


def test_every_model_kind_and_objective_is_tried_and_a_collapsed_itm_head_does_not_count_as_learnt() -> None:
    """A constant prediction reaches 0.6365 where one pair in three matches, and 0.6931 where one in two does."""
    assert {cell.kind for cell in trials.cells()} == set(MODEL_SECTIONS)
    assert {cell.objective for cell in trials.cells()} == set(OBJECTIVES)
    for negatives, collapsed in (("hard", 0.6365), ("random", 0.6931)):
        cell = Cell("itm", "vlmo", "pairs", {"negatives": negatives})
        assert trials.COLLAPSED[negatives] == pytest.approx(collapsed, abs=1e-4)
        assert [cell.is_learnt([2.0, end]) for end in (collapsed, collapsed / 2)] == [False, True]


def test_error_of_gradients_equals_the_tolerance_where_c2_is_just_met() -> None:
    expected = {"large": torch.full((4,), 3.0), "small": torch.full((2,), 1e-6)}
    allowed = 1e-5 * math.sqrt(2) * 1e-6 + 1e-7 * math.sqrt(4 * 9.0 + 2 * 1e-12)
    gradients = {"large": expected["large"], "small": expected["small"].double() + allowed / math.sqrt(2)}
    assert relative_errors(expected, gradients) == {"large": 0, "small": pytest.approx(TOLERANCE, rel=1e-4)}
    misshapen = relative_errors({"a": torch.ones(3), "b": torch.ones(3)}, {"b": torch.ones(4), "c": torch.ones(1)})
    assert misshapen == {"a": math.inf, "b": math.inf, "c": math.inf}


MASKING = {"image_mask_ratio": 0.3, "mask_token_prob": 0.5, "random_patch_prob": 0.3}
TOKENIZER = {"weights": "nowhere", "tokens": VISUAL_TOKENS}
IMAGES: dict[str, dict[str, Any]] = {
    "covered": {"image_target": "mean_colour"},
    "shown in part": {"image_target": "mean_colour", "masking": MASKING},
    "decoded": {"image_target": "pixels", "image_decoder": {"width": 16, "layers": 1, "heads": 2}},
    "named by tokens": {"image_target": "visual_tokens", "image_tokenizer": TOKENIZER},
    "classified": {},
}
VARIANTS = IMAGES | {"contrasted": {}}
SOURCES: dict[str, Any] = {"classified": ("labelled", "classification"), "contrasted": ("pairs", "itc")}


def run_config(kind: str, variant: str, micro_batch_size: int | None = None) -> RunConfig:
    source_type, objective = SOURCES.get(variant, ("images", "mim"))
    model, engine = {"drop_path": 0.3, "image_size": 24}, {"micro_batch_size": micro_batch_size}
    return tiny_run(kind, source_type, {objective: {}}, model, engine, **VARIANTS[variant])


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("vlmo", name) for name in VARIANTS), *(("vit", name) for name in IMAGES), ("dual_encoder", "contrasted")],
)
def test_trap_12_micro_batches_have_the_whole_gradient_and_an_encoder_reads_no_decoded_patch(
    kind: str, variant: str, collectives: Collectives
) -> None:
    results: list[tuple[dict[str, Tensor], float]] = []
    for micro_batch_size in (5, None):
        config = run_config(kind, variant, micro_batch_size)
        check_stages(config)
        begun = begin(config, collectives)
        batch, heads = begun.batch, begun.engine.model.heads
        if variant == "shown in part":  # some masked patches show another patch
            shown = torch.randint(0, 9, batch.patch_positions.shape, generator=torch.Generator().manual_seed(3))
            batch = replace(batch, patch_replacements=shown.index_fill(1, torch.tensor([0]), -1))
        loss = float(begun.step(batch)["loss"])
        results.append(({name: g / begun.step.accumulation for name, g in begun.engine.gradients().items()}, loss))
    (parts, same_loss), (whole, loss) = results
    assert same_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    trained = {name for name, parameter in begun.engine.model.named_parameters() if parameter.requires_grad}
    assert whole.keys() == trained
    tokens = VISUAL_TOKENS if variant == "named by tokens" else 0
    assert (heads.visual_tokens, heads.image_decoder is not None) == (tokens, variant == "decoded")
    if variant == "decoded":
        (forward,) = begun.engine.forwards.values()
        both = torch.cat([forward.visible_patches, forward.patch_positions], dim=1)
        assert torch.equal(both.sort(dim=1).values, torch.arange(9).expand(ROWS, -1))


MIM, ITM_EVERY_2 = {"mim": {}}, {"wpa": {}, "itm": {"every": 2}}


@pytest.mark.parametrize(
    ("kind", "source_type", "objectives", "keys", "fault"),
    [
        ("vit", "images", MIM, {"image_decoder": {}, "masking": MASKING}, "reads no masked patch"),
        ("vilt", "images", MIM, {"image_decoder": {}}, "supported by models of kind vlmo and vit"),
        ("vilt", "images", MIM, {"masking": {"patch_shape": "blocks"}}, "blocks are defined on square images"),
        ("vilt", "images", MIM, {"image_target": "visual_tokens"}, "visual_tokens are defined on square images"),
        ("vlmo", "images", MIM, {"image_target": "visual_tokens"}, "image_tokenizer: required"),
        ("vit", "labelled", {"classification": {}}, {"num_classes": None}, "num_classes: required"),
        ("vit", "images", MIM, {"masking": {"mask_token_prob": 0.8, "random_patch_prob": 0.3}}, "exceeds 1"),
        ("vit", "images", MIM, {"image_decoder": {"heads": 7}}, "multiple of heads 7"),
        ("vlmo", "text", MIM, {}, "mim needs sources of type images or pairs"),
        ("vlmo", "pairs", {"itm": {}}, {"negatives": "hard"}, "add itc, or set negatives: random"),
        ("vlmo", "pairs", {"wpa": {}}, {}, "add itm and set negatives: random"),
        ("vlmo", "pairs", ITM_EVERY_2, {"negatives": "random"}, "set the same `every` for both"),
    ],
)
def test_unsupported_stage_is_rejected(
    kind: str, source_type: Any, objectives: dict[str, Any], keys: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        check_stages(tiny_run(kind, source_type, objectives, **keys))


def test_vit_has_the_published_size_and_masking_and_its_alternatives_can_be_built(tmp_path: Path) -> None:
    """ViT-B/16 has 86 M parameters (table 1); 86,567,656 with the head of ImageNet's 1,000 classes."""
    plain, masked = (load_config(CONFIGS / f"{name}.yaml") for name in ("vit_b16", "vit_b16_masked_patches"))
    model = skeleton(plain.model, heads=HeadConfig(classes=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656
    for config in (plain, masked):
        check_stages(config)
        sizes = [stage_skeleton(Stage(config, index)).config.image_size for index in range(len(config.stages))]
        assert sizes == [224, 384]
        config = config.model_copy(update={"output": str(tmp_path)})
        assert choose_tokenizer(config, Storage()).tokens == SPECIALS, "the stages read no text"
    masking, target = masked.stages[0].masking, masked.stages[0].image_target
    probabilities = (masking.image_mask_ratio, masking.mask_token_prob, masking.random_patch_prob)
    assert (probabilities, target) == ((0.5, 0.8, 0.1), "mean_colour")
    mae = ("masking={image_mask_ratio: 0.75}", "image_decoder={}", "image_target=pixels")
    blocks, tokenizer = "masking={image_mask_ratio: 0.4, patch_shape: blocks}", "image_tokenizer={weights: nowhere}"
    for keys in (mae, (blocks, tokenizer, "image_target=visual_tokens")):  # the latter is BEiT
        overrides = [f"stages.masked_patches.{key}" for key in keys]
        check_stages(load_config(CONFIGS / "vit_b16_masked_patches.yaml", overrides))


def test_wpa_reads_the_forward_of_itm(collectives: Collectives) -> None:
    config = tiny_run("vilt", "pairs", {"itm": {}, "wpa": {"weight": 0.1}}, negatives="random")
    begun, outputs = begin(config, collectives), list[Any]()
    begun = begun._replace(batch=trials.invented_batch(config.model, "pairs", 1, ROWS))  # every example is another one
    hook = begun.engine.model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    losses = begun.step(begun.batch)
    hook.remove()
    (output,), matched = outputs, matched_examples(begun.batch, begun.step.stage.config)
    aligned = {name: output["pair"][name] for name in ("words", "patches", "words_keep", "patches_keep")}
    torch.testing.assert_close(losses["wpa"], wpa_loss(**aligned, matched=matched).detach() / ROWS)
    swapped = begun.engine.forwards["pair"].image != begun.batch.image
    assert torch.equal(swapped.flatten(1).any(dim=1), ~matched)
    torch.testing.assert_close(losses["loss"], losses["itm"] + 0.1 * losses["wpa"])
    none, objectives = begun.batch.rows(slice(0, 0)), begun.step.objectives
    loss = objectives["wpa"].loss(begun.engine({"pair": objectives["itm"].fusion_forward(none, "pair")}), none)
    loss.backward()  # every rank takes part
    assert loss == 0


def test_masked_patches_are_read_with_their_text(collectives: Collectives) -> None:
    begun = begin(tiny_run("vilt", "pairs", {"mim": {}}, image_target="mean_colour"), collectives)
    mim, batch = begun.step.objectives["mim"], begun.batch
    assert mim.forwards(batch)["hidden"].text is batch.text
    assert int(mim.count(batch)) == int((batch.patch_positions >= 0).sum())
    size, colours = begun.engine.model.config.patch_size, torch.zeros_like(batch.patch_positions)
    for row, place in torch.nonzero(batch.patch_positions >= 0).tolist():
        down, across = divmod(int(batch.patch_positions[row, place]), int(batch.image_size[row, 1]) // size)
        patch = batch.image[row, size * down :, size * across :][:size, :size]
        red, green, blue = (patch.float().mean(dim=(0, 1)).long() // 32).tolist()
        colours[row, place] = 64 * red + 8 * green + blue
    confident = 50.0 * torch.nn.functional.one_hot(colours, 512)
    assert mim.loss({"hidden": {"mim": confident}}, batch) < 1e-3


def region_trial(collectives: Collectives, dropout: float = 0.0) -> TrialState:
    objectives = {name: {} for name in ("itm", "mlm", "moc", "mrfr")}
    return begin(tiny_run("imagebert", "regions", objectives, {"dropout": dropout}, negatives="random"), collectives)


def test_trap_06_masked_objectives_share_one_forward_of_true_pairs_and_a_negative_swaps_text_or_regions(
    collectives: Collectives,
) -> None:
    """The paper's conditional mask: MLM, MOC and MRFR read matched pairs only, so they swap no rows."""
    begun = region_trial(collectives)
    batch, swapped = begun.batch, torch.zeros(2)
    begun.step(batch)
    masked, pair = (begun.engine.forwards[name] for name in ("masked", "pair"))
    assert begun.engine.forwards.keys() == {"masked", "pair"}
    assert (masked.heads, pair.heads) == (("mlm", "moc", "mrfr"), ("itm",))
    zeroed = batch.region_features.masked_fill(batch.region_hidden.unsqueeze(-1), 0)  # type: ignore[union-attr]
    assert torch.equal(masked.regions.features, zeroed)
    assert not (pair.regions.features[pair.regions.keep] == 0).any()
    assert torch.equal(masked.text, batch.masked_text)
    assert all(objective_type(name).swaps is Objective.swaps for name in ("mlm", "moc", "mrfr"))
    for number in range(20):
        begun.step(replace(batch, step=number))
        pair = begun.engine.forwards["pair"]
        other_text = (pair.text != batch.text).any(dim=1)
        other_regions = (pair.regions.location != batch.region_location).flatten(1).any(dim=1)
        assert not (other_text & other_regions).any()
        assert int((other_text | other_regions).sum()) == ROWS / 2
        swapped += torch.stack([other_text.sum(), other_regions.sum()])
    assert swapped.min() > 0.3 * swapped.sum()


def test_dropout_depends_on_the_step_alone(collectives: Collectives) -> None:
    begun = region_trial(collectives, dropout=0.1)
    begun.engine.model.train()
    torch.manual_seed(1)
    first = begun.step(begun.batch)
    torch.manual_seed(2)
    torch.testing.assert_close(begun.step(begun.batch), first, rtol=0, atol=0)
    assert begun.step(replace(begun.batch, step=1))["mlm"] != first["mlm"]
