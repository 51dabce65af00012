"""Alerts: conditions of a running stage that need attention.

Each is a tag on its MLflow run and a log line with a remedy. Alerts are evaluated on rank 0 at the metrics steps, from
metrics that are collected anyway, and loss spikes at every health check. An alert is raised once, after several
consecutive steps have met its condition, and cleared after the same number have not.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter, deque
from typing import TYPE_CHECKING

from pipeline.evaluation.results import COLLAPSED
from pipeline.models.heads import MAX_SCALE
from pipeline.tracking.tracker import Tracker
from pipeline.training.callbacks import Callback
from pipeline.training.metrics import MetricsSnapshot, StepMetrics

if TYPE_CHECKING:
    from pipeline.training.context import StageState
    from pipeline.training.health import StepHealth
    from pipeline.training.prepare import Coverage
    from pipeline.training.stages import Stage

log = logging.getLogger(__name__)

CONSECUTIVE = 5  # metrics steps until an alert is raised or cleared
CLAMPED = 0.999  # of the contrastive loss's maximum scale
MAX_DATA_WAIT = 0.1  # fraction of its time that a rank may wait for data
MAX_SLOWDOWN = 1.5  # of a rank's forward, relative to the median rank
JUMP = 3.0  # of the loss, relative to the median of the last `LOSSES`
LOSSES = 50


class Alerts(Callback):
    """The alerts of one stage; used on rank 0 only."""

    def __init__(self, stage: Stage, tracker: Tracker, coverage: Coverage | None = None):
        self._stage, self._tracker, self._coverage = stage, tracker, coverage
        self._met: Counter[str] = Counter()  # consecutive steps that met the condition
        self._unmet: Counter[str] = Counter()
        self._raised: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)

    def on_stage_start(self, state: StageState, start: int) -> None:
        if self._coverage is not None and self._coverage.alert is not None:
            self.raise_alert("unknown_tokens", self._stage.global_step(start), self._coverage.alert)

    def on_fault(self, step: int, name: str, message: str) -> None:
        self.raise_alert(name, self._stage.global_step(step), message)

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        """Evaluate the conditions of all alerts except the loss spike."""
        metrics = snapshot.step_metrics
        for name, message in conditions(metrics).items():
            self._met[name] = self._met[name] + 1 if message else 0
            self._unmet[name] = 0 if message else self._unmet[name] + 1
            if message and self._met[name] >= CONSECUTIVE and name not in self._raised:
                self.raise_alert(name, metrics.step, message)
            elif name in self._raised and self._unmet[name] >= CONSECUTIVE:
                text = f"over at step {metrics.step}; {self._raised.pop(name)}"
                extra = {"alert": f"{self._stage.name}/{name}", "over": True}
                log.warning("stage %s: alert %s is over at step %d", self._stage.name, name, metrics.step, extra=extra)
                self._tracker.tag(f"mome.alert.{name}", text)

    def on_health(self, step: int, health: StepHealth) -> None:
        """Check the global batch's loss for a spike."""
        loss = health.losses["loss"]
        if len(self._losses) == LOSSES and loss > JUMP * (median := statistics.median(self._losses)):
            self.raise_alert(
                "loss_spike",
                self._stage.global_step(step),
                f"the loss jumped to {loss:.4g} (median of the last {LOSSES}: {median:.4g}). If it does not recover, "
                "resume from an earlier checkpoint with a lower optimizer.lr or with optimizer.max_grad_norm; "
                "guards.spike rolls back and skips the data automatically",
            )
            self._losses.clear()  # one jump raises one alert
        self._losses.append(loss)

    def raise_alert(self, name: str, step: int, message: str) -> None:
        """Raise an alert; `message` states the observation and the remedy."""
        self._raised[name] = text = f"since step {step}: {message}"
        source = f"{self._stage.name}/{name}"
        log.warning("stage %s: ALERT %s, %s", self._stage.name, name, text, extra={"alert": source})
        self._tracker.tag(f"mome.alert.{name}", text)


def conditions(metrics: StepMetrics) -> dict[str, str | None]:
    """Return for each alert the observation and the remedy, or None if its condition is not met."""
    met: dict[str, str | None] = dict.fromkeys(("itm_collapse", "itc_clamp", "data_starvation", "straggler"))
    values = metrics.metrics()
    matched, mismatched = values.get("train/itm_recall_matched"), values.get("train/itm_recall_mismatched")
    if metrics.is_warm and matched is not None and mismatched is not None and min(matched, mismatched) < COLLAPSED:
        met["itm_collapse"] = (
            f"image-text matching is right for {matched:.0%} of the matched pairs and {mismatched:.0%} of the "
            "mismatched ones: it predicts nearly the same class for all. Check that the stage started from the "
            "intended weights (tag start_from), lower optimizer.lr or warm up longer, or begin with negatives=random"
        )
    if metrics.diagnostics.get("itc_scale", 0.0) >= CLAMPED * MAX_SCALE:
        met["itc_clamp"] = (
            f"the contrastive temperature has reached its minimum ({1 / MAX_SCALE:g}), where its gradient is cut off. "
            "This is common if batches are too easy: use a larger batch, or look for duplicate images with different "
            "image ids"
        )
    if (worst := max(metrics.data_wait)) >= MAX_DATA_WAIT:
        met["data_starvation"] = (
            f"rank {metrics.data_wait.index(worst)} waits for data {worst:.0%} of its time. Raise "
            "data.loader.num_workers or data.loader.threads_per_worker, cache shards on the node with data.cache, or "
            "let CPU nodes prepare batches with cluster.loader_actors; `mome bench loader` measures the throughput per "
            "core"
        )
    slowest = metrics.slowest_rank()
    if slowest is not None and slowest[1] >= MAX_SLOWDOWN:
        met["straggler"] = (
            f"rank {slowest[0]} needs {slowest[1]:.1f} times as long for its forward as the median rank, and all wait "
            "for it. Check its machine for other processes or a throttled GPU; run `mome doctor` there, or exclude the "
            "node"
        )
    return met
