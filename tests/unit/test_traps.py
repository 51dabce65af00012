"""The fifteen traps of the papers' published code: each has tests that fail if this project repeats the mistake.

Every test is named after its trap (`test_trap_NN_…`); this module has those that belong to no other module.

    trap                                                        tests
     1  gather and averaging give 1/W of ITC's gradient         training/test_step; integration/test_world_size
     2  a confident softmax leaves no negative to draw          objectives/test_itm
     3  captions of one image are each other's negatives        objectives/test_itc, test_itm
     4  ITM settles at the label frequencies unnoticed          here; floors: training/test_every_objective
     5  whole-word masking masks padding, halves or nothing     data/examples/test_masking
     6  words are predicted with a mismatched image             here; training/test_image_objectives
     7  loss "weights" only switch losses on                    here
     8  weight decay is chosen by fragments of names            training/test_step
     9  a model is selected by its test results                 here; evaluation/test_labelled
    10  half precision, masked rows and unbounded scales        objectives/test_wpa; training/test_step; models/
    11  parameters that no objective reads                      training/test_stages; models/test_kinds
    12  accumulation shrinks ITC's batch                        here
    13  the text stage changes what images share                training/test_stages, test_image_recipes
    14  masked images and ITC in one stage                      training/test_image_recipes
    15  ranks with unequal examples wait for each other         integration/test_rank_agreement
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig, SourceType
from pipeline.evaluation.evaluate import is_collapsed, stages_trained_on
from pipeline.models.forward import ForwardInput
from pipeline.training.collectives import Collectives
from tests.support.trial import begin, tiny_run

ROOT = Path(__file__).resolve().parents[2]


def test_every_trap_has_a_test_named_after_it() -> None:
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    found = {int(number) for text in texts for number in re.findall(r"def test_trap_(\d\d)_\w+", text)}
    assert found == set(range(1, 16))


def test_trap_04_constant_predictions_are_collapsed() -> None:
    accuracies = [(0.0, 1.0), (1.0, 0.01), (0.3, 0.9)]
    collapsed = [is_collapsed({"accuracy_matched": a, "accuracy_mismatched": b}) for a, b in accuracies]
    assert collapsed == [True, True, False]


def test_trap_09_training_source_is_recognised_under_any_name() -> None:
    values = tiny_run("vlmo", "pairs", {"itc": {}}).model_dump(mode="json")
    values["sources"] |= {
        "renamed": {"shards": values["sources"]["trial"]["shards"] + "/"},
        "held_out": {"shards": "elsewhere"},
    }
    config = RunConfig.model_validate_json(json.dumps(values))
    assert stages_trained_on(config, "trial") == stages_trained_on(config, "renamed") == ("trial",)
    assert stages_trained_on(config, "held_out") == ()


# ---- 6, 7, 12: the training step


@pytest.mark.parametrize(
    ("kind", "source_type", "objectives", "negatives"),
    [
        ("vlmo", "pairs", ("itc", "itm", "mlm"), "hard"),
        ("vilt", "pairs", ("itm", "mlm", "wpa"), "random"),
        ("imagebert", "regions", ("itm", "mlm", "moc", "mrfr"), "random"),
    ],
)
def test_trap_06_masked_objectives_read_matched_pairs_only(
    kind: str, source_type: SourceType, objectives: tuple[str, ...], negatives: str, collectives: Collectives
) -> None:
    begun = begin(tiny_run(kind, source_type, {name: {} for name in objectives}, negatives=negatives), collectives)
    seen: dict[str, ForwardInput] = {}
    begun.engine.model.register_forward_hook(lambda module, arguments, outputs: seen.update(arguments[0]))
    begun.step(begun.batch)
    batch = begun.batch
    guessing = [name for name, inputs in seen.items() if {"mlm", "moc", "mrfr"} & {*inputs.heads}]
    assert guessing == ["masked"]
    assert torch.equal(seen["masked"].text, batch.masked_text)
    if source_type == "pairs":
        assert torch.equal(seen["masked"].image, batch.image)
    else:
        own = batch.region_features.masked_fill(batch.region_hidden.unsqueeze(-1), 0)  # type: ignore[union-attr]
        assert torch.equal(seen["masked"].regions.features, own)
    own_image = batch.image if source_type == "pairs" else batch.region_features
    other_pairs = [
        not torch.equal(inputs.text, batch.text)
        or not torch.equal(inputs.image if inputs.regions is None else inputs.regions.features, own_image)
        for inputs in seen.values()
        if "itm" in inputs.heads
    ]
    assert any(other_pairs), "there are negatives that it could have been guessed on"


def gradients(config: RunConfig, collectives: Collectives) -> tuple[dict[str, Tensor], dict[str, float]]:
    begun = begin(config, collectives)
    losses = begun.step(begun.batch)
    return begun.engine.gradients(), {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_trap_07_an_objectives_weight_multiplies_its_gradient(weight: float, collectives: Collectives) -> None:
    for objective in ("itc", "mlm"):
        plain, losses = gradients(tiny_run("vlmo", "pairs", {objective: {}}), collectives)
        weighted, more = gradients(tiny_run("vlmo", "pairs", {objective: {"weight": weight}}), collectives)
        torch.testing.assert_close(weighted, {name: weight * g for name, g in plain.items()}, rtol=1e-4, atol=1e-6)
        assert more["loss"] == pytest.approx(weight * losses["loss"], rel=1e-5)
        assert more[objective] == pytest.approx(losses[objective], rel=1e-5), "reported as it is"


@pytest.mark.parametrize("kind", ["vlmo", "dual_encoder"])
def test_trap_12_accumulated_itc_equals_the_whole_batch(kind: str, collectives: Collectives) -> None:
    whole = tiny_run(kind, "pairs", {"itc": {}})
    cut = whole.model_copy(update={"engine": whole.engine.model_copy(update={"micro_batch_size": 5})})
    (expected, loss), (found, same_loss) = gradients(whole, collectives), gradients(cut, collectives)
    # The step multiplies by the number of micro-batches, because a real engine divides by it.
    found = {name: gradient / 3 for name, gradient in found.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert same_loss == pytest.approx(loss, rel=1e-5)
