"""Alerts: what a run that goes on should still be looked at for, each a tag on its run and a line that says what to do.

They are judged at the steps whose metrics are read, on rank 0, from numbers that are read there anyway; the loss at
every look. An alert that several readings in a row give cause for is raised once, and taken back when as many give
none. What ends a run at once (a loss that is not finite) is raised by who ends it.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.evaluation.results import COLLAPSED
from pipeline.models.heads import MAX_SCALE
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)

READINGS = 5  # in a row, for or against
CLAMPED = 0.999  # of the contrast's largest scale
STARVED = 0.1  # share of its time that a rank waits for data
BEHIND = 1.5  # x the median rank's forward
JUMP = 3.0  # x the median of the last losses …
LOSSES = 50  # … so many


@dataclass(frozen=True)
class Reading:
    """The run at one step of a stage."""

    step: int  # over all stages
    warm: bool  # past the stage's warm-up
    signs: dict[str, float]  # of the global batch, as `terms` and the contrast name them
    waits: list[float]  # share of its time that each rank waited for data since the last reading
    forwards: list[float]  # seconds of each rank's forward, their median since the last reading


def sign_metrics(signs: dict[str, float]) -> dict[str, float]:
    """What the signs come to, under MLflow's names."""
    found = {}
    if scale := signs.get("itc_scale"):
        found["train/itc_temperature"] = 1 / scale
    for kind in ("matched", "wrong"):
        if rows := signs.get(f"itm_{kind}"):
            found[f"train/itm_recall_{kind}"] = signs[f"itm_{kind}_right"] / rows
    return found


def rank_metrics(reading: Reading) -> dict[str, float]:
    """How unlike the ranks are."""
    found = {"perf/data_wait_share_worst": max(reading.waits)}
    if (ratio := _slowest(reading)) is not None:
        found["perf/slowest_rank_ratio"] = ratio[1]
    return found


class Alerts:
    """One stage's alerts. Nothing here is asked by another rank."""

    def __init__(self, stage: str, tracker: Tracker):
        self._stage, self._tracker = stage, tracker
        self._for: dict[str, int] = {}  # readings in a row that gave cause
        self._against: dict[str, int] = {}
        self._raised: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)

    def read(self, reading: Reading) -> None:
        """Judge everything but the loss."""
        for name, judge in CHECKS.items():
            told = judge(reading)
            self._for[name] = self._for.get(name, 0) + 1 if told else 0
            self._against[name] = 0 if told else self._against.get(name, 0) + 1
            if told and self._for[name] >= READINGS and name not in self._raised:
                self.sound(name, reading.step, told)
            elif name in self._raised and self._against[name] >= READINGS:
                self._take_back(name, reading.step)

    def see_loss(self, step: int, loss: float) -> None:
        """One step's loss of the global batch, before its update."""
        if len(self._losses) == LOSSES and loss > JUMP * (median := statistics.median(self._losses)):
            self.sound(
                "loss_spike",
                step,
                f"the loss jumped to {loss:.4g} (median of the last {LOSSES}: {median:.4g}). Where it does not come "
                "down again, go back to a checkpoint before it with a lower optimizer.lr or with "
                "optimizer.max_grad_norm; guards.spike goes back by itself, past the data that did it",
            )
            self._losses.clear()  # one jump is one alert
        self._losses.append(loss)

    def sound(self, name: str, step: int, told: str) -> None:
        """Raise an alert. `told`: what was seen, and what to do."""
        self._raised[name] = text = f"since step {step}: {told}"
        log.warning("stage %s: ALERT %s, %s", self._stage, name, text, extra={"alert": f"{self._stage}/{name}"})
        self._tracker.tag(f"mome.alert.{name}", text)

    def _take_back(self, name: str, step: int) -> None:
        text = f"over at step {step}; {self._raised.pop(name)}"
        told = {"alert": f"{self._stage}/{name}", "over": True}
        log.warning("stage %s: alert %s is over at step %d", self._stage, name, step, extra=told)
        self._tracker.tag(f"mome.alert.{name}", text)


def _collapsed_matching(reading: Reading) -> str | None:
    found = sign_metrics(reading.signs)
    matched, wrong = found.get("train/itm_recall_matched"), found.get("train/itm_recall_wrong")
    if not reading.warm or matched is None or wrong is None or min(matched, wrong) >= COLLAPSED:
        return None
    return (
        f"matching is right for {matched:.0%} of the true pairs and {wrong:.0%} of the wrong ones: "
        "it gives nearly all the same answer and has learnt nothing of pairs. Check that the stage started from the "
        "weights it should have (tag start_from); lower optimizer.lr or warm up longer; begin with "
        "negatives=random"
    )


def _clamped_temperature(reading: Reading) -> str | None:
    if reading.signs.get("itc_scale", 0.0) < CLAMPED * MAX_SCALE:
        return None
    return (
        f"the contrast's temperature is at its clamp ({1 / MAX_SCALE:g}): it cannot get sharper and its gradient is "
        "cut off. Common where a batch is too easy: use a larger batch, or look for repeated pictures that have "
        "different image ids"
    )


def _starved(reading: Reading) -> str | None:
    worst = max(reading.waits)
    if worst < STARVED:
        return None
    return (
        f"rank {reading.waits.index(worst)} waits for data {worst:.0%} of its time. Raise data.loader.num_workers or "
        "data.loader.threads_per_worker, keep shards on the node with data.cache, or let CPU nodes prepare batches "
        "with cluster.loader_actors; `mome bench loader` tells what a core can do"
    )


def _out_of_step(reading: Reading) -> str | None:
    slowest = _slowest(reading)
    if slowest is None or slowest[1] < BEHIND:
        return None
    return (
        f"rank {slowest[0]} needs {slowest[1]:.1f} times as long for its forward as the median rank, and all wait for "
        "it. Look at its machine: other processes, a GPU that throttles; run `mome doctor` there, or leave it out"
    )


def _slowest(reading: Reading) -> tuple[int, float] | None:
    """The slowest rank, and its forward's seconds by the median rank's; None where there is nobody to compare with."""
    median = statistics.median_low(reading.forwards)
    if len(reading.forwards) < 2 or median <= 0:
        return None
    slowest = max(reading.forwards)
    return reading.forwards.index(slowest), slowest / median


CHECKS: dict[str, Callable[[Reading], str | None]] = {
    "itm_collapse": _collapsed_matching,
    "itc_clamp": _clamped_temperature,
    "loader_starved": _starved,
    "ranks_out_of_step": _out_of_step,
}
