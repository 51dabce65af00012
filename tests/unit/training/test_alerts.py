"""Alerts are raised once and cleared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.models.heads import MAX_SCALE
from pipeline.tracking.tracker import Tracker
from pipeline.training.alerts import CONSECUTIVE, JUMP, LOSSES, Alerts
from pipeline.training.health import StepHealth
from pipeline.training.metrics import StepMetrics

LEARNT = {"itm_matched": 10, "itm_matched_correct": 8, "itm_mismatched": 20, "itm_mismatched_correct": 15}
CAUSES: dict[str, dict[str, Any]] = {
    "itm_collapse": {"diagnostics": LEARNT | {"itm_mismatched_correct": 0}},
    "itc_clamp": {"diagnostics": {"itc_scale": MAX_SCALE}},
    "data_starvation": {"data_wait": [0.0, 0.4, 0.1]},
    "straggler": {"forward_seconds": [1.0, 1.1, 3.3]},
}
MESSAGES = {"data_starvation": "rank 1 waits for data 40%", "straggler": "rank 2 needs 3.0 times"}


class AlertRig(Tracker):
    """The alerts of a stage, which evaluates metrics at successive steps, and the tags that they set."""

    def __init__(self) -> None:
        self.tags: list[tuple[str, str]] = []
        stage: Any = SimpleNamespace(name="pairs", global_step=lambda step: step)
        self.alerts = Alerts(stage, self)

    def tag(self, key: str, value: str) -> None:
        self.tags.append((key, value))

    def evaluate(self, start: int, count: int, **changed: Any) -> None:
        healthy = {"is_warm": True, "diagnostics": LEARNT, "data_wait": [0.0, 0.01], "forward_seconds": [1.0, 1.1]}
        for step in range(start, start + count):
            snapshot: Any = SimpleNamespace(step_metrics=StepMetrics(step, **healthy | changed))
            self.alerts.on_metrics(step, snapshot)

    def observe_loss(self, step: int, loss: float) -> None:
        self.alerts.on_health(step, StepHealth({"loss": loss}, is_finite=True, preempted=False))


@pytest.mark.parametrize("name", CAUSES)
def test_alert_is_raised_once_and_cleared(name: str) -> None:
    rig = AlertRig()
    rig.evaluate(0, CONSECUTIVE - 1, **CAUSES[name])
    rig.evaluate(CONSECUTIVE, 1)
    assert rig.tags == [], "one healthy step in between"
    rig.evaluate(10, 3 + CONSECUTIVE, **CAUSES[name])
    ((key, text),) = rig.tags
    assert key == f"mome.alert.{name}"
    assert text.startswith(f"since step {9 + CONSECUTIVE}: {MESSAGES.get(name, '')}")
    rig.evaluate(30, CONSECUTIVE)
    assert rig.tags[1:] == [(key, f"over at step {29 + CONSECUTIVE}; {text}")]


def test_itm_collapse_is_not_evaluated_during_warmup() -> None:
    rig = AlertRig()
    rig.evaluate(0, 3 * CONSECUTIVE, is_warm=False, **CAUSES["itm_collapse"])
    assert rig.tags == []


def test_loss_jump_raises_one_alert() -> None:
    rig = AlertRig()
    for step in range(2 * LOSSES):
        rig.observe_loss(step, 10.0 - step / LOSSES)
    assert rig.tags == []
    for step in range(3):
        rig.observe_loss(200 + step, 10 * JUMP)
    ((key, text),) = rig.tags
    assert key == "mome.alert.loss_spike"
    assert text.startswith("since step 200: the loss jumped to 30")
