"""Metrics of a stage: losses, throughput, differences between ranks, and data counts.

Collecting them is a collective call and, besides the health check, the only place where a step waits for the device.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.data.loading.loader import Loader
from pipeline.tracking.tracker import DatasetInput
from pipeline.training.callbacks import Callback, StepEvent
from pipeline.training.checkpoint import finished_stage
from pipeline.training.collectives import Collectives
from pipeline.training.goodput import goodput_metrics
from pipeline.training.progress import Progress
from pipeline.training.workload import peak_step_seconds

if TYPE_CHECKING:
    from pipeline.training.context import RunContext, StageState
    from pipeline.training.stages import Stage


@dataclass(frozen=True)
class StepMetrics:
    """Input of the alerts: diagnostics and per-rank timings at one step."""

    step: int  # global number of steps completed
    is_warm: bool  # past the stage's learning-rate warm-up
    diagnostics: dict[str, float]  # of the global batch, by the names the objectives give
    data_wait: list[float]  # by rank: fraction of time spent waiting for data since the last collection
    forward_seconds: list[float]  # by rank: median duration of a forward since the last collection

    def slowest_rank(self) -> tuple[int, float] | None:
        """Return the slowest rank and its forward time relative to the median rank's; None for a single rank."""
        median = statistics.median_low(self.forward_seconds)
        if len(self.forward_seconds) < 2 or median <= 0:
            return None
        slowest = max(self.forward_seconds)
        return self.forward_seconds.index(slowest), slowest / median

    def metrics(self) -> dict[str, float]:
        """Return the diagnostics and the differences between ranks by their MLflow names."""
        metrics = {"perf/data_wait_share_worst": max(self.data_wait)}
        if scale := self.diagnostics.get("itc_scale"):
            metrics["train/itc_temperature"] = 1 / scale
        for kind in ("matched", "mismatched"):
            if rows := self.diagnostics.get(f"itm_{kind}"):
                metrics[f"train/itm_recall_{kind}"] = self.diagnostics[f"itm_{kind}_correct"] / rows
        if (slowest := self.slowest_rank()) is not None:
            metrics["perf/slowest_rank_ratio"] = slowest[1]
        return metrics


@dataclass(frozen=True)
class MetricsSnapshot:
    """Metrics after one step; the same on every rank except the throughput."""

    losses: dict[str, float]  # of the global batch: `loss` and each objective's
    values: dict[str, float]  # everything to record, by MLflow name
    steps_per_second: float
    samples_per_second: float
    step_metrics: StepMetrics


class MetricsCollector(Callback):
    """Collects metrics at the stage's metrics steps and passes them to the `on_metrics` hooks."""

    def __init__(self, stage: Stage, context: RunContext):
        self._stage, self._collectives, self._supervisor = stage, context.collectives, context.supervisor
        self._peak_step_seconds = None  # duration of a step at the GPU's peak performance
        device = context.collectives.device
        if context.collectives.rank == 0 and device.type == "cuda":
            name, world_size = torch.cuda.get_device_name(device), context.collectives.world_size
            self._peak_step_seconds = peak_step_seconds(name, stage, context.tokenizer.size, world_size)

    def on_stage_start(self, state: StageState, start: int) -> None:
        self._state = state
        self._start_clock(start)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._start_clock(step + 1)  # excludes the evaluation's time

    def _start_clock(self, step: int) -> None:
        """Measure throughput and waiting for data from now on, after `step` completed steps."""
        self._clock = time.perf_counter(), step, self._state.loader.wait_seconds

    def after_step(self, event: StepEvent) -> None:
        if self._stage.is_metrics_step(event.step):
            self._state.callbacks.on_metrics(event.step, self.collect(event))

    def collect(self, event: StepEvent) -> MetricsSnapshot:
        """Collect the metrics of a completed step. A collective call."""
        assert event.health is not None, "every metrics step has a health check"
        stage, state, collectives, completed = self._stage, self._state, self._collectives, event.step + 1
        batch_size, world_size = stage.config.global_batch_size, collectives.world_size
        last_time, last_step, last_waited = self._clock
        self._start_clock(completed)
        seconds = max(self._clock[0] - last_time, 1e-9)
        steps_per_second, data_wait = (completed - last_step) / seconds, (self._clock[2] - last_waited) / seconds

        # One reduction sums the diagnostics over ranks and gathers each rank's timings.
        names = sorted(state.step.diagnostics)
        by_rank = torch.zeros(2, world_size, device=collectives.device)
        by_rank[:, collectives.rank] = torch.tensor([data_wait, state.step.forward_timer.read()])
        parts = [state.step.diagnostics[name].float().reshape(1) for name in names]
        summed = collectives.sum(torch.cat([*parts, by_rank.flatten()])).tolist()
        timings = summed[len(names) :]
        step_metrics = StepMetrics(
            stage.global_step(completed),
            is_warm=event.step >= stage.config.optimizer.warmup_steps,
            diagnostics=dict(zip(names, summed, strict=False)),
            data_wait=timings[:world_size],
            forward_seconds=timings[world_size:],
        )
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
        samples_per_second = steps_per_second * batch_size
        values |= step_metrics.metrics()
        values |= {
            "perf/samples_per_s": samples_per_second,
            "perf/samples_per_s_per_gpu": samples_per_second / world_size,
            "perf/data_wait_share": data_wait,
            "samples_seen": float(completed * batch_size),
            "train/lr": event.lr,
            "train/grad_norm": state.engine.gradient_norm(),
        }
        if self._peak_step_seconds is not None:
            values["perf/mfu"] = steps_per_second * self._peak_step_seconds
        values |= total_data_counts(state.loader, state.data_counts, collectives)
        values |= goodput_metrics(self._supervisor.goodput.seconds())
        return MetricsSnapshot(losses, values, steps_per_second, samples_per_second, step_metrics)


def total_data_counts(loader: Loader, previous: dict[str, float], collectives: Collectives) -> dict[str, float]:
    """Return the loaders' counters, summed over ranks, plus those of the restored checkpoint. A collective call."""
    counts = loader.counts()
    names = sorted(counts)
    values = [float(counts[name]) for name in names]  # float32 would be exact only up to 2^24
    summed = collectives.sum(torch.tensor(values, dtype=torch.float64, device=collectives.device)).tolist()
    # Epochs follow from the step; the other counters restart at zero with the process.
    return {
        f"data/{name}": value + (0.0 if name.startswith("epochs/") else previous.get(f"data/{name}", 0.0))
        for name, value in zip(names, summed, strict=True)
    }


class StageReporter(Callback):
    """Reports the stage, its metrics and its progress to the tracker and the launcher; used on rank 0 only."""

    def __init__(self, stage: Stage, context: RunContext):
        self._stage, self._context, self._tracker = stage, context, context.tracker

    def on_stage_start(self, state: StageState, start: int) -> None:
        stage, coverage = self._stage, self._context.coverage
        start_from = stage.start_url or "random"
        if stage.config.start_from != "previous" and stage.start_url is not None:
            start_from = finished_stage(self._context.storage, stage.start_url)
        tags = {"plan_digest": state.loader.digest[:36], "start_from": start_from}
        if start:
            tags |= {"resumed_at": str(stage.global_step(start)), "resumed_from": state.resumed_from}
        if coverage is not None and stage.run.model.READS_TEXT:
            tags["unknown_tokens"] = f"{coverage.worst:.4f}"
        sources = stage.run.sources
        datasets = [DatasetInput(name, sources[name].shards, digest) for name, digest in state.loader.sources.items()]
        self._tracker.begin_stage(stage.index, stage.config, tags, datasets)
        if state.rollback is not None:
            self._tracker.rewind(stage.global_step(start))
            self._tracker.tag(*state.rollback)

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        stage, completed = self._stage, step + 1
        nodes = self._context.supervisor.nodes.take()
        self._tracker.metrics(stage.global_step(completed), snapshot.values | nodes)
        self._context.report(
            Progress(
                stage=stage.name,
                stage_step=completed,
                stage_steps=stage.steps,
                step=stage.global_step(completed),
                total_steps=stage.run.total_steps,
                loss=snapshot.losses["loss"],
                samples_per_second=snapshot.samples_per_second,
                seconds_left=(stage.steps - completed) / max(snapshot.steps_per_second, 1e-9),
            )
        )

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.metrics(self._stage.global_step(step + 1), metrics)
