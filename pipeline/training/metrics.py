"""Metrics, alerts and evaluation of a stage. Collecting metrics is a collective call that waits for the device."""

import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import COLLAPSED, evaluate
from pipeline.evaluation.labelled import class_names
from pipeline.models.model import MAX_SCALE
from pipeline.objectives import evaluation_tasks
from pipeline.tracking.journal import Dataset
from pipeline.training.callbacks import Callback, Progress, StepEvent
from pipeline.training.checkpoint.weights import finished_stage
from pipeline.training.collectives import Collectives
from pipeline.training.health import StepHealth
from pipeline.training.prepare import coverage_alert
from pipeline.training.stages import Stage
from pipeline.training.workload import peak_step_seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricsSnapshot:
    """Metrics after one step; the same on every rank except the throughput."""

    step: int  # global number of steps completed
    values: dict[str, float]  # everything to record, by MLflow name
    is_warm: bool  # past the stage's learning-rate warm-up
    data_wait: list[float]  # by rank: fraction of time spent waiting for data since the last collection
    forward_seconds: list[float]  # by rank: median duration of a forward since the last collection


def diagnostic_metrics(
    diagnostics: dict[str, float], data_wait: list[float], forward_seconds: list[float]
) -> dict[str, float]:
    """Return the objectives' diagnostics and the differences between ranks by their MLflow names."""
    metrics = {"perf/data_wait_share_worst": max(data_wait)}
    if scale := diagnostics.get("itc_scale"):
        metrics["train/itc_temperature"] = 1 / scale
    if "itc_spread" in diagnostics:
        metrics["train/itc_spread"] = diagnostics["itc_spread"]
    for kind in ("matched", "mismatched"):
        if rows := diagnostics.get(f"itm_{kind}"):
            metrics[f"train/itm_recall_{kind}"] = diagnostics[f"itm_{kind}_correct"] / rows
    median = statistics.median_low(forward_seconds)
    if len(forward_seconds) > 1 and median > 0:
        metrics["perf/slowest_rank_ratio"] = max(forward_seconds) / median
    return metrics


class MetricsCollector(Callback):
    """Collects metrics at the stage's metrics steps; rank 0 passes them, and the stage's tags, to the tracker."""

    def on_stage_start(self, start: int) -> None:
        state, stage, context = self.state, self.state.stage, self.state.context
        device, world_size = context.collectives.device, context.collectives.world_size
        self._peak_step_seconds = None  # duration of a step at the GPU's peak performance
        if context.collectives.rank == 0:
            if device.type == "cuda":
                gpu = torch.cuda.get_device_name(device)
                self._peak_step_seconds = peak_step_seconds(gpu, stage, context.tokenizer.size, world_size)
            start_from = stage.start_url or "random"
            if stage.config.start_from != "previous" and stage.start_url is not None:
                start_from = finished_stage(context.storage, stage.start_url)
            tags = {"plan_digest": state.loader.digest[:36], "start_from": start_from}
            if start:
                tags |= {"resumed_at": str(stage.first_step + start), "resumed_from": state.resumed_from}
            if context.coverage is not None and stage.run.model.READS_TEXT:
                tags["unknown_tokens"] = f"{max(context.coverage.values(), default=0.0):.4f}"
            datasets = [
                Dataset(name=name, source=stage.run.sources[name].shards, digest=digest, context="training")
                for name, digest in state.loader.sources.items()
            ]
            context.tracker.begin_stage(stage.index, stage.config, tags, datasets)
            if state.rollback is not None:
                context.tracker.rewind(stage.first_step + start)
                context.tracker.tag(*state.rollback)
        state.measured_from = time.perf_counter(), start, state.loader.wait_seconds

    def after_step(self, event: StepEvent) -> None:
        state, stage, context, completed = self.state, self.state.stage, self.state.context, event.step + 1
        if not event.with_metrics:
            return
        assert event.health is not None, "every metrics step has a health check"
        collectives, batch_size = context.collectives, stage.config.global_batch_size
        world_size = collectives.world_size
        (last_time, last_step, last_waited), now = state.measured_from, time.perf_counter()
        state.measured_from = now, completed, state.loader.wait_seconds
        seconds = max(now - last_time, 1e-9)
        steps_per_second = (completed - last_step) / seconds
        data_wait = (state.measured_from[2] - last_waited) / seconds

        # One reduction sums the diagnostics over ranks and gathers each rank's timings.
        names = sorted(state.step.diagnostics)
        by_rank = torch.zeros(2, world_size, device=collectives.device)
        by_rank[:, collectives.rank] = torch.tensor([data_wait, state.step.forward_seconds()])
        parts = [state.step.diagnostics[name].float().reshape(1) for name in names]
        summed = collectives.sum(torch.cat([*parts, by_rank.flatten()])).tolist()
        ranks_data_wait, forward_seconds = summed[len(names) : -world_size], summed[-world_size:]

        losses = event.health.losses
        values = {("train/loss" if name == "loss" else f"train/loss_{name}"): loss for name, loss in losses.items()}
        if by_source := state.step.by_source:  # each source's mean loss over its own rows, if the stage mixes sources
            objectives, sources = sorted(by_source), sorted(stage.config.sources)
            totals = collectives.sum(torch.stack([by_source[objective] for objective in objectives])).tolist()
            values |= {
                f"train/{source}/loss_{objective}": total / count
                for objective, rows in zip(objectives, totals, strict=True)
                for source, (total, count) in zip(sources, rows, strict=True)
                if count  # a source may have no row in a batch
            }
        values |= diagnostic_metrics(dict(zip(names, summed, strict=False)), ranks_data_wait, forward_seconds)
        values |= {
            "perf/samples_per_s": steps_per_second * batch_size,
            "perf/samples_per_s_per_gpu": steps_per_second * batch_size / world_size,
            "perf/data_wait_share": data_wait,
            "samples_seen": float(completed * batch_size),
            "train/lr": event.lr,
            "train/grad_norm": float(state.engine.gradient_norm),
        }
        if "train/loss_itc" in values and batch_size > 1:
            values["train/itc_loss_to_chance"] = values["train/loss_itc"] / math.log(batch_size)
        if self._peak_step_seconds is not None:
            values["perf/mfu"] = steps_per_second * self._peak_step_seconds
        values |= total_data_counts(state.loader, state.data_counts, collectives)
        phases = context.supervisor.goodput.seconds()
        values |= {f"time/{phase}_s": spent for phase, spent in phases.items()}
        values["perf/goodput"] = phases["training"] / max(sum(phases.values()), 1e-9)  # time in steps that were kept
        step, is_warm = stage.first_step + completed, event.step >= stage.config.optimizer.warmup_steps
        if collectives.rank == 0:
            nodes = context.supervisor.nodes.newest
            context.tracker.metrics(step, values | (nodes.pop() if nodes else {}))
            total_steps, rate = stage.run.total_steps, values["perf/samples_per_s"]
            left = (stage.steps - completed) / max(steps_per_second, 1e-9)
            by_objective = {name: loss for name, loss in losses.items() if name != "loss"}
            reached = (stage.name, completed, stage.steps, step, total_steps)
            context.report(Progress(*reached, losses["loss"], rate, left, event.lr, by_objective))
        state.metrics = values
        snapshot = MetricsSnapshot(step, values, is_warm, ranks_data_wait, forward_seconds)
        state.callbacks.on_metrics(event.step, snapshot)


def total_data_counts(loader: Loader, previous: dict[str, float], collectives: Collectives) -> dict[str, float]:
    """Return the loaders' counters, summed over ranks, plus those of the restored checkpoint. A collective call."""
    counts = dict(sorted(loader.counts().items()))
    values = torch.tensor(list(counts.values()), dtype=torch.float64)  # float32 would be exact only up to 2^24
    # Epochs follow from the step; the other counters restart at zero with the process.
    return {
        f"data/{name}": value + (0.0 if name.startswith("epochs/") else previous.get(f"data/{name}", 0.0))
        for name, value in zip(counts, collectives.sum(values.to(collectives.device)).tolist(), strict=True)
    }


# ---- evaluation


class EvaluationCallback(Callback):
    """Evaluates on `evaluation.source` every `evaluation.every` steps and at the end of each stage but the last.

    All ranks run the same number of forwards (at ZeRO 3 each gathers weights from all) with the current weights, not
    their moving average. Modes, random generators and the loader's position stay as they are (contracts C1, C4).
    """

    def __init__(self, stage: Stage, storage: Storage):
        """Raises ConfigError if classes that are named by their texts have no names, before anything is built."""
        self._pairs: EvalPairs | None = None  # kept between evaluations
        run, source, self._is_enabled = stage.run, stage.run.evaluation.source, False
        if run.evaluation.every is not None and source is not None:
            self._is_enabled = bool(evaluation_tasks(stage.config, run.sources[source].type))
            if run.sources[source].type == "labelled" and "itc" in stage.config.objectives:
                class_names(run, source, storage)

    def after_step(self, event: StepEvent) -> None:
        """Evaluate if it is due. `mome train` evaluates the finished run by itself."""
        state, stage, context, num_steps = self.state, self.state.stage, self.state.context, event.step + 1
        section, is_last = stage.run.evaluation, stage.index + 1 == len(stage.run.stages)
        is_due = not is_last if num_steps == stage.steps else num_steps % (section.every or 1) == 0
        if not self._is_enabled or not is_due or event.preempted:
            return
        context.report_phase(f"evaluating at step {stage.first_step + num_steps:,}")
        with context.supervisor.during("evaluation", stage.first_step + event.step):
            result = evaluate(
                state.engine.reader,
                context.tokenizer,
                stage.run,
                context.storage,
                limit=min(section.max_images_during_training, section.max_images or section.max_images_during_training),
                stage=stage.name,
                rerank_best=0,
                choices=state.choices,
                ranks=context.collectives,
                held_out=self._pairs,
            )
            self._pairs = result.held_out
            metrics = result.metrics()
        state.metrics = state.metrics | metrics
        context.tracker.metrics(stage.first_step + num_steps, metrics)
        state.measured_from = time.perf_counter(), num_steps, state.loader.wait_seconds  # excludes the evaluation
        context.report_phase(f"training {stage.name}")

    def close(self) -> None:
        if self._pairs is not None:
            self._pairs.close()


# ---- alerts

CONSECUTIVE = 5  # metrics steps until an alert is raised or cleared
AT_CHANCE = 0.02  # relative difference of the contrastive loss from that of equal embeddings
EQUAL_FEATURES = 0.002  # variance of embeddings around their mean; 1 if they cancel out
CLAMPED = 0.999  # of the contrastive loss's maximum scale
MAX_DATA_WAIT = 0.1  # fraction of its time that a rank may wait for data
MAX_SLOWDOWN = 1.5  # of a rank's forward, relative to the median rank
JUMP = 3.0  # of the loss, relative to the median of the last `LOSSES`
LOSSES = 50


class Alerts(Callback):
    """Tags the stage's MLflow run, and logs remedies, for conditions that need attention. Attached on rank 0 only."""

    def on_stage_start(self, start: int) -> None:
        self._run_length: Counter[str] = Counter()  # consecutive steps that met the condition; negative: that did not
        self._raised: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)
        if alert := coverage_alert(self.state.context.coverage or {}):
            self.on_fault(start, "unknown_tokens", alert)

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        met = dict(conditions(snapshot))
        for name in sorted(met.keys() | self._run_length.keys()):
            length = self._run_length[name]
            self._run_length[name] = length = max(length, 0) + 1 if name in met else min(length, 0) - 1
            if length >= CONSECUTIVE and name not in self._raised:
                self.on_fault(step + 1, name, met[name])
            elif length <= -CONSECUTIVE and name in self._raised:
                text, stage = f"resolved at step {snapshot.step}; {self._raised.pop(name)}", self.state.stage.name
                extra = {"alert": f"{stage}/{name}", "over": True}
                log.warning("stage %s: alert %s resolved at step %d", stage, name, snapshot.step, extra=extra)
                self.state.context.tracker.tag(f"mome.alert.{name}", text)

    def on_health(self, step: int, health: StepHealth) -> None:
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
        self._raised[name] = text = f"since step {stage.first_step + step}: {message}"
        log.warning("stage %s: ALERT %s, %s", stage.name, name, text, extra={"alert": f"{stage.name}/{name}"})
        self.state.context.tracker.tag(f"mome.alert.{name}", text)


def conditions(metrics: MetricsSnapshot) -> Iterator[tuple[str, str]]:
    """Yield each alert whose condition is met, with the observation and the remedy."""
    values = metrics.values
    recalls = [values[n] for kind in ("matched", "mismatched") if (n := f"train/itm_recall_{kind}") in values]
    if metrics.is_warm and len(recalls) == 2 and min(recalls) < COLLAPSED:
        yield (
            "itm_collapse",
            f"image-text matching is right for {recalls[0]:.0%} of the matched pairs and {recalls[1]:.0%} of the "
            "mismatched ones: it predicts nearly the same class for all. Check that the stage started from the "
            "intended weights (tag start_from), lower optimizer.lr or warm up longer, or begin with negatives=random",
        )
    loss, spread = values.get("train/itc_loss_to_chance", 0.0), values.get("train/itc_spread", 1.0)
    if metrics.is_warm and abs(loss - 1) < AT_CHANCE and spread < EQUAL_FEATURES:
        yield (
            "itc_collapse",
            f"the contrastive loss stays at chance, ln(global_batch_size), because all embeddings are nearly equal "
            f"(their variance is {spread:.2g} of 1). Check that the stage started from the intended weights (tag "
            "start_from); set model.init_std=auto, since 0.02 is too small for widths below 768; raise optimizer.lr if "
            "the loss never moved, lower it or warm up longer if it returned to this value",
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
