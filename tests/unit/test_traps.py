"""The fifteen traps of the papers' published code: each has tests that fail if this project repeats the mistake.

Every test is named after its trap (`test_trap_NN_…`); this module has those that belong to no other module.

    trap                                                        tests
     1  gather and averaging give 1/W of ITC's gradient         training/test_stages; integration/test_world_size
     2  a confident softmax leaves no negative to draw          objectives/test_losses
     3  captions of one image are each other's negatives        objectives/test_losses
     4  ITM settles at the label frequencies unnoticed          here; floors: training/test_objectives
     5  whole-word masking masks padding, halves or nothing     data/examples/test_masking
     6  words are predicted with a mismatched image             here; training/test_objectives
     7  loss "weights" only switch losses on                    here
     8  weight decay is chosen by fragments of names            training/test_stages
     9  a model is selected by its test results                 here; evaluation/test_measures
    10  half precision, masked rows and unbounded scales        objectives/test_losses; training/test_stages; models/
    11  parameters that no objective reads                      training/test_stages; models/test_kinds
    12  accumulation shrinks ITC's batch                        training/test_objectives
    13  the text stage changes what images share                here; training/test_stages
    14  masked images and ITC in one stage                      here
    15  ranks with unequal examples wait for each other         integration/test_rank_agreement
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.evaluation.evaluate import is_collapsed, stages_trained_on
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage, freeze_untrained, stage_skeleton
from tests.support.trial import begin, tiny_run

ROOT = Path(__file__).resolve().parents[2]


def test_every_trap_has_a_test_named_after_it() -> None:
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    named = {int(number) for text in texts for number in re.findall(r"def test_trap_(\d\d)_\w+", text)}
    assert named == set(range(1, 16))


def test_trap_04_constant_predictions_are_collapsed() -> None:
    for (matched, mismatched), expected in {(0.0, 1.0): True, (1.0, 0.01): True, (0.3, 0.9): False}.items():
        assert is_collapsed({"accuracy_matched": matched, "accuracy_mismatched": mismatched}) == expected


def test_trap_09_training_source_is_recognised_under_any_name() -> None:
    values = tiny_run("vlmo", "pairs", {"itc": {}}).model_dump(mode="json")
    shards = values["sources"]["trial"]["shards"]
    values["sources"] |= {"renamed": {"shards": shards + "/"}, "held_out": {"shards": "elsewhere"}}
    config = RunConfig.model_validate_json(json.dumps(values))
    assert stages_trained_on(config, "trial") == stages_trained_on(config, "renamed") == ("trial",)
    assert stages_trained_on(config, "held_out") == ()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_trap_14_mim_and_itc_share_no_stage_images_follow_text(path: Path) -> None:
    """Joint training of MIM and ITC did not converge (unilm#969); a text-only stage moves what images share."""
    config = load_config(path)
    assert not any({"mim", "itc"} <= stage.objectives.keys() for stage in config.stages)
    source_types = [config.source_type_of(stage) for stage in config.stages]
    for index, (source_type, following) in enumerate(pairwise(source_types)):
        if source_type == "text":
            stage, after = Stage(config, index), Stage(config, index + 1)
            drifting = {"norm", "positions.text"} & freeze_untrained(stage_skeleton(stage), stage)
            assert drifting <= freeze_untrained(stage_skeleton(after), after)
            assert following != "text"


@pytest.mark.parametrize(("kind", "other", "negatives"), [("vlmo", "itc", "hard"), ("vilt", "wpa", "random")])
def test_trap_06_mlm_reads_matched_pairs_only(kind: str, other: str, negatives: str, collectives: Collectives) -> None:
    objectives: dict[str, Any] = {"itm": {}, "mlm": {}, other: {}}
    begun = begin(tiny_run(kind, "pairs", objectives, negatives=negatives), collectives)
    forwards, batch = dict[str, object](), begun.batch
    begun.engine.model.register_forward_hook(lambda module, arguments, outputs: forwards.update(arguments[0]))
    begun.step(batch)
    assert [name for name, inputs in forwards.items() if "mlm" in inputs.heads] == ["masked"]
    assert torch.equal(forwards["masked"].text, batch.masked_text)
    assert torch.equal(forwards["masked"].image, batch.image)
    pairs = [inputs for inputs in forwards.values() if "itm" in inputs.heads]
    unchanged = [torch.equal(inputs.text, batch.text) and torch.equal(inputs.image, batch.image) for inputs in pairs]
    assert not all(unchanged), "there are negatives that it could have been guessed on"


@pytest.mark.parametrize("objective", ["itc", "mlm"])
def test_trap_07_an_objectives_weight_multiplies_its_gradient(objective: str, collectives: Collectives) -> None:
    plain, losses = dict[str, Tensor](), dict[str, Tensor]()
    for settings in ({}, {"weight": 0.5}, {"weight": 3.0}):
        begun, weight = begin(tiny_run("vlmo", "pairs", {objective: settings}), collectives), settings.get("weight", 1)
        own, gradients = begun.step(begun.batch), begun.engine.gradients()
        losses, plain = losses or own, plain or gradients
        torch.testing.assert_close(gradients, {name: weight * g for name, g in plain.items()}, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own["loss"], weight * losses["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(own[objective], losses[objective], rtol=1e-5, atol=0)  # reported as it is
