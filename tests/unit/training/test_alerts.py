"""Alerts are raised once and cleared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.models import build_model
from pipeline.models.heads import MAX_SCALE
from pipeline.models.model import HeadConfig
from pipeline.tracking.tracker import Tracker
from pipeline.training.alerts import CONSECUTIVE, JUMP, LOSSES, Alerts
from pipeline.training.collectives import Collectives
from pipeline.training.metrics import StepMetrics
from pipeline.training.stages import Stage
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

PAIRS: Any = SimpleNamespace(name="pairs")  # replaces the stage
LEARNT = {"itm_matched": 10, "itm_matched_correct": 8, "itm_mismatched": 20, "itm_mismatched_correct": 15}


class TagRecorder(Tracker):
    def __init__(self) -> None:
        self.tags: list[tuple[str, str]] = []

    def tag(self, key: str, value: str) -> None:
        self.tags.append((key, value))


def metrics_at(step: int, **changed: Any) -> StepMetrics:
    healthy = {"is_warm": True, "diagnostics": LEARNT, "data_wait": [0.0, 0.01], "forward_seconds": [1.0, 1.1]}
    return StepMetrics(step, **healthy | changed)


CAUSES: dict[str, dict[str, Any]] = {
    "itm_collapse": {"diagnostics": LEARNT | {"itm_mismatched_correct": 0}},
    "itc_clamp": {"diagnostics": {"itc_scale": MAX_SCALE}},
    "data_starvation": {"data_wait": [0.0, 0.4]},
    "straggler": {"forward_seconds": [1.0, 1.0, 2.0]},
}


@pytest.mark.parametrize("name", CAUSES)
def test_alert_is_raised_once_and_cleared(name: str) -> None:
    tags = TagRecorder()
    alerts = Alerts(PAIRS, tags)
    for step in range(CONSECUTIVE - 1):
        alerts.evaluate(metrics_at(step, **CAUSES[name]))
    alerts.evaluate(metrics_at(CONSECUTIVE))
    assert tags.tags == [], "one healthy step in between"
    for step in range(10, 13 + CONSECUTIVE):
        alerts.evaluate(metrics_at(step, **CAUSES[name]))
    (key, text), *more = tags.tags
    assert (key, more) == (f"mome.alert.{name}", [])
    assert text.startswith(f"since step {9 + CONSECUTIVE}: ")
    for step in range(30, 30 + CONSECUTIVE):
        alerts.evaluate(metrics_at(step))
    assert [key for key, _ in tags.tags] == [key, key]
    assert tags.tags[1][1] == f"over at step {29 + CONSECUTIVE}; {text}"


def test_itm_collapse_is_not_evaluated_during_warmup() -> None:
    tags = TagRecorder()
    alerts = Alerts(PAIRS, tags)
    for step in range(3 * CONSECUTIVE):
        alerts.evaluate(metrics_at(step, is_warm=False, **CAUSES["itm_collapse"]))
    assert tags.tags == []


def test_straggling_or_starved_rank_is_named() -> None:
    tags = TagRecorder()
    alerts = Alerts(PAIRS, tags)
    for step in range(CONSECUTIVE):
        alerts.evaluate(metrics_at(step, data_wait=[0.0, 0.4, 0.1], forward_seconds=[1.0, 1.1, 3.3]))
    messages = dict(tags.tags)
    assert "rank 1 waits for data 40%" in messages["mome.alert.data_starvation"]
    assert "rank 2 needs 3.0 times" in messages["mome.alert.straggler"]


def test_loss_jump_raises_one_alert() -> None:
    tags = TagRecorder()
    alerts = Alerts(PAIRS, tags)
    for step in range(2 * LOSSES):
        alerts.observe_loss(step, 10.0 - step / LOSSES)
    assert tags.tags == []
    for step in range(3):
        alerts.observe_loss(200 + step, 10 * JUMP)
    assert [key for key, _ in tags.tags] == ["mome.alert.loss_spike"]
    assert tags.tags[0][1].startswith("since step 200: the loss jumped to 30")


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_diagnostics_count_every_pair_for_any_micro_batch_size(stage: int, micro_batch_size: int | None) -> None:
    """The head classifies every pair as matched."""
    config = tiny_config(micro_batch_size=micro_batch_size)
    one = config.stages[stage]
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    with torch.no_grad():
        model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))  # type: ignore[union-attr, operator]
    step = TrainingStep(PlainEngine(model, one.optimizer), Stage(config, stage), Collectives())
    step(tiny_batch(config, 0, 0, 1, one.global_batch_size), with_metrics=True)
    read = one.global_batch_size // one.objectives["itm"].every
    matched, wrong = (read, 2 * read) if one.negatives == "hard" else (read // 2, read - read // 2)
    signs = {name: float(value) for name, value in step.diagnostics.items()}
    assert signs["itm_matched"] == signs["itm_matched_correct"] == matched
    assert (signs["itm_mismatched"], signs["itm_mismatched_correct"]) == (wrong, 0)
    if "itc" in one.objectives:
        assert StepMetrics(0, True, signs, [0.0], [0.0]).metrics()["train/itc_temperature"] == pytest.approx(
            0.07, rel=1e-6
        )
