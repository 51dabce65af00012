"""Every objective with every model that supports it learns a fixed tiny batch and trains the modules it declares."""

import math

import pytest
import torch

from pipeline.config.schema import MODEL_SECTIONS, objective_names
from pipeline.objectives import trained_modules
from pipeline.training.collectives import Collectives
from tests.support.gradients import TOLERANCE, relative_errors
from tests.support.trial import Cell, Trial, begin, cells, train, trial_config

SHIFTS = {"ranking_head.score.bias"}  # added to every logit of the softmax, so its gradient is 0 up to rounding


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_loss_falls_in_thirty_steps_on_one_batch(cell: Cell, collectives: Collectives) -> None:
    trial = train(cell, collectives)
    assert trial.is_learnt, [round(loss, 3) for loss in trial.losses]


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_declared_modules_are_those_with_a_gradient(cell: Cell, collectives: Collectives) -> None:
    begun = begin(trial_config(cell), collectives)
    model = begun.engine.model.requires_grad_(True)  # including parameters that the stage froze
    begun.step(begun.batch)
    moved = {name for name, gradient in begun.engine.gradients().items() if gradient.abs().max() > 0}
    expected = trained_modules(model, begun.step.stage.config.objectives, cell.source_type)
    declared = {name for name, _ in model.named_parameters() if model.part_of(name) in expected}
    assert declared - SHIFTS == moved - SHIFTS


def test_every_model_kind_and_objective_is_tested() -> None:
    tried = list(cells())
    assert {cell.kind for cell in tried} == set(MODEL_SECTIONS)
    assert {cell.objective for cell in tried} == set(objective_names())


@pytest.mark.parametrize(("negatives", "collapsed"), [("hard", 0.6365), ("random", 0.6931)])
def test_collapsed_itm_head_does_not_count_as_learnt(negatives: str, collapsed: float) -> None:
    """A constant prediction reaches 0.6365 where one pair in three matches, and 0.6931 where one in two does."""
    cell = Cell("itm", "vlmo", "pairs", {"negatives": negatives})
    assert Trial(cell, []).floor == pytest.approx(collapsed, abs=1e-4)
    assert not Trial(cell, [2.0, collapsed]).is_learnt
    assert Trial(cell, [2.0, collapsed / 2]).is_learnt


def test_error_of_gradients_equals_the_tolerance_where_c2_is_just_met() -> None:
    expected = {"large": torch.full((4,), 3.0), "small": torch.full((2,), 1e-6)}
    allowed = 1e-5 * math.sqrt(2) * 1e-6 + 1e-7 * math.sqrt(4 * 9.0 + 2 * 1e-12)
    gradients = {"large": expected["large"], "small": expected["small"].double() + allowed / math.sqrt(2)}
    assert relative_errors(expected, gradients) == {"large": 0, "small": pytest.approx(TOLERANCE, rel=1e-4)}
    misshapen = relative_errors({"a": torch.ones(3), "b": torch.ones(3)}, {"b": torch.ones(4), "c": torch.ones(1)})
    assert misshapen == {"a": math.inf, "b": math.inf, "c": math.inf}
