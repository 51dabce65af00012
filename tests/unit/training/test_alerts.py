"""When an alert is raised, once, and when it is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.models import build_model
from pipeline.models.heads import MAX_SCALE
from pipeline.models.model import HeadConfig
from pipeline.tracking.tracker import Tracker
from pipeline.training.alerts import JUMP, LOSSES, READINGS, Alerts, Reading, sign_metrics
from pipeline.training.collectives import Collectives
from pipeline.training.plain_engine import PlainEngine
from pipeline.training.steps import TrainingStep
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

LEARNT = {"itm_matched": 10, "itm_matched_right": 8, "itm_wrong": 20, "itm_wrong_right": 15}


class Tags(Tracker):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def tag(self, key: str, value: str) -> None:
        self.said.append((key, value))


def reading(step: int, **changed: Any) -> Reading:
    values = {"warm": True, "signs": LEARNT, "waits": [0.0, 0.01], "forwards": [1.0, 1.1]} | changed
    return Reading(step, **values)


CAUSES: dict[str, dict[str, Any]] = {
    "itm_collapse": {"signs": LEARNT | {"itm_wrong_right": 0}},
    "itc_clamp": {"signs": {"itc_scale": MAX_SCALE}},
    "loader_starved": {"waits": [0.0, 0.4]},
    "ranks_out_of_step": {"forwards": [1.0, 1.0, 2.0]},
}


@pytest.mark.parametrize("name", CAUSES)
def test_an_alert_is_raised_once_after_as_many_readings_and_taken_back_after_as_many(name: str) -> None:
    tags = Tags()
    alerts = Alerts("pairs", tags)
    for step in range(READINGS - 1):
        alerts.read(reading(step, **CAUSES[name]))
    alerts.read(reading(READINGS))
    assert tags.said == [], "one good reading in between"
    for step in range(10, 13 + READINGS):
        alerts.read(reading(step, **CAUSES[name]))
    (key, text), *more = tags.said
    assert (key, more) == (f"mome.alert.{name}", [])
    assert text.startswith(f"since step {9 + READINGS}: ")
    for step in range(30, 30 + READINGS):
        alerts.read(reading(step))
    assert [key for key, _ in tags.said] == [key, key]
    assert tags.said[1][1] == f"over at step {29 + READINGS}; {text}"


def test_matching_is_not_judged_before_its_stage_is_warm() -> None:
    tags = Tags()
    alerts = Alerts("pairs", tags)
    for step in range(3 * READINGS):
        alerts.read(reading(step, warm=False, **CAUSES["itm_collapse"]))
    assert tags.said == []


def test_the_rank_that_is_behind_or_starved_is_named() -> None:
    tags = Tags()
    alerts = Alerts("pairs", tags)
    for step in range(READINGS):
        alerts.read(reading(step, waits=[0.0, 0.4, 0.1], forwards=[1.0, 1.1, 3.3]))
    said = dict(tags.said)
    assert "rank 1 waits for data 40%" in said["mome.alert.loader_starved"]
    assert "rank 2 needs 3.0 times" in said["mome.alert.ranks_out_of_step"]


def test_a_jump_of_the_loss_is_one_alert_and_a_falling_loss_is_none() -> None:
    tags = Tags()
    alerts = Alerts("pairs", tags)
    for step in range(2 * LOSSES):
        alerts.see_loss(step, 10.0 - step / LOSSES)
    assert tags.said == []
    for step in range(3):
        alerts.see_loss(200 + step, 10 * JUMP)
    assert [key for key, _ in tags.said] == ["mome.alert.loss_spike"]
    assert tags.said[0][1].startswith("since step 200: the loss jumped to 30")


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_signs_count_every_pair_of_each_class_however_the_batch_is_cut(
    stage: int, micro_batch_size: int | None
) -> None:
    """The head is made to call every pair matched."""
    config = tiny_config(micro_batch_size=micro_batch_size)
    one = config.stages[stage]
    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    with torch.no_grad():
        model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))  # type: ignore[union-attr, operator]
    step = TrainingStep(PlainEngine(model, one.optimizer), config, one, Collectives())
    step(tiny_batch(config, 0, 0, 1, one.global_batch_size), tell=True)
    read = one.global_batch_size // one.objectives["itm"].every
    matched, wrong = (read, 2 * read) if one.negatives == "hard" else (read // 2, read - read // 2)
    signs = {name: float(value) for name, value in step.signs.items()}
    assert signs["itm_matched"] == signs["itm_matched_right"] == matched
    assert (signs["itm_wrong"], signs["itm_wrong_right"]) == (wrong, 0)
    if "itc" in one.objectives:
        assert sign_metrics(signs)["train/itc_temperature"] == pytest.approx(0.07, rel=1e-6)
