"""Alerts: conditions of a running stage that need attention.

Each is a tag on its MLflow run and a log line with a remedy. Alerts are evaluated on rank 0 at the metrics steps, from
metrics that are collected anyway, and loss spikes at every health check. An alert is raised once, after several
consecutive steps have met its condition, and cleared after the same number have not.
"""

import logging
import statistics
from collections import Counter, deque
from collections.abc import Iterator

from pipeline.evaluation.evaluate import COLLAPSED
from pipeline.models.model import MAX_SCALE
from pipeline.training.callbacks import Callback
from pipeline.training.health import StepHealth
from pipeline.training.metrics import MetricsSnapshot

log = logging.getLogger(__name__)

CONSECUTIVE = 5  # metrics steps until an alert is raised or cleared
CLAMPED = 0.999  # of the contrastive loss's maximum scale
MAX_DATA_WAIT = 0.1  # fraction of its time that a rank may wait for data
MAX_SLOWDOWN = 1.5  # of a rank's forward, relative to the median rank
JUMP = 3.0  # of the loss, relative to the median of the last `LOSSES`
LOSSES = 50


class Alerts(Callback):
    """The alerts of one stage; used on rank 0 only."""

    def on_stage_start(self, start: int) -> None:
        self._run_length: Counter[str] = Counter()  # consecutive steps that met the condition; negative: that did not
        self._raised: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)
        coverage = self.state.context.coverage
        if coverage is not None and coverage.alert is not None:
            self.on_fault(start, "unknown_tokens", coverage.alert)

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        """Evaluate the conditions of all alerts except the loss spike."""
        met = dict(conditions(snapshot))
        for name in sorted(met.keys() | self._run_length.keys()):
            length = self._run_length[name]
            self._run_length[name] = length = max(length, 0) + 1 if name in met else min(length, 0) - 1
            if length >= CONSECUTIVE and name not in self._raised:
                self.on_fault(step + 1, name, met[name])
            elif length <= -CONSECUTIVE and name in self._raised:
                text = f"over at step {snapshot.step}; {self._raised.pop(name)}"
                stage = self.state.stage.name
                extra = {"alert": f"{stage}/{name}", "over": True}
                log.warning("stage %s: alert %s is over at step %d", stage, name, snapshot.step, extra=extra)
                self.state.context.tracker.tag(f"mome.alert.{name}", text)

    def on_health(self, step: int, health: StepHealth) -> None:
        """Check the global batch's loss for a spike."""
        loss = health.losses["loss"]
        if len(self._losses) == LOSSES and loss > JUMP * (median := statistics.median(self._losses)):
            message = (
                f"the loss jumped to {loss:.4g} (median of the last {LOSSES}: {median:.4g}). If it does not recover, "
                "resume from an earlier checkpoint with a lower optimizer.lr or with optimizer.max_grad_norm; "
                "guards.spike rolls back and skips the data automatically"
            )
            self.on_fault(step, "loss_spike", message)
            self._losses.clear()  # one jump raises one alert
        self._losses.append(loss)

    def on_fault(self, step: int, name: str, message: str) -> None:
        """Raise an alert; `message` states the observation and the remedy."""
        stage = self.state.stage
        self._raised[name] = text = f"since step {stage.global_step(step)}: {message}"
        log.warning("stage %s: ALERT %s, %s", stage.name, name, text, extra={"alert": f"{stage.name}/{name}"})
        self.state.context.tracker.tag(f"mome.alert.{name}", text)


def conditions(metrics: MetricsSnapshot) -> Iterator[tuple[str, str]]:
    """Yield each alert whose condition is met, with the observation and the remedy."""
    values = metrics.values
    names = [f"train/itm_recall_{kind}" for kind in ("matched", "mismatched")]
    recalls = [values[name] for name in names if name in values]
    if metrics.is_warm and len(recalls) == 2 and min(recalls) < COLLAPSED:
        yield (
            "itm_collapse",
            f"image-text matching is right for {recalls[0]:.0%} of the matched pairs and {recalls[1]:.0%} of the "
            "mismatched ones: it predicts nearly the same class for all. Check that the stage started from the "
            "intended weights (tag start_from), lower optimizer.lr or warm up longer, or begin with negatives=random",
        )
    if values.get("train/itc_temperature", 1.0) <= 1 / (CLAMPED * MAX_SCALE):
        yield (
            "itc_clamp",
            f"the contrastive temperature has reached its minimum ({1 / MAX_SCALE:g}), where its gradient is cut off. "
            "This is common if batches are too easy: use a larger batch, or look for duplicate images with different "
            "image ids",
        )
    if (worst := max(metrics.data_wait)) >= MAX_DATA_WAIT:
        yield (
            "data_starvation",
            f"rank {metrics.data_wait.index(worst)} waits for data {worst:.0%} of its time. Raise "
            "data.loader.num_workers or data.loader.threads_per_worker, cache shards on the node with data.cache, or "
            "let CPU nodes prepare batches with cluster.loader_actors; `mome bench loader` measures the throughput per "
            "core",
        )
    if (ratio := values.get("perf/slowest_rank_ratio", 1.0)) >= MAX_SLOWDOWN:
        slowest = metrics.forward_seconds.index(max(metrics.forward_seconds))
        yield (
            "straggler",
            f"rank {slowest} needs {ratio:.1f} times as long for its forward as the median rank, and all wait for it. "
            "Check its machine for other processes or a throttled GPU; run `mome doctor` there, or exclude the node",
        )
