"""Metrics of a stage: losses, throughput, differences between ranks, data counts, and evaluation during training.

Collecting them is a collective call and, besides the health check, the only place where a step waits for the device.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.labelled import class_names
from pipeline.objectives import evaluation_tasks
from pipeline.tracking.journal import Dataset
from pipeline.training.callbacks import Callback, Progress, StepEvent
from pipeline.training.checkpoint.weights import finished_stage
from pipeline.training.collectives import Collectives
from pipeline.training.goodput import goodput_metrics
from pipeline.training.stages import Stage
from pipeline.training.workload import peak_step_seconds


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
                tags |= {"resumed_at": str(stage.global_step(start)), "resumed_from": state.resumed_from}
            if context.coverage is not None and stage.run.model.READS_TEXT:
                tags["unknown_tokens"] = f"{max(context.coverage.unknown.values(), default=0.0):.4f}"
            datasets = [
                Dataset(name=name, source=stage.run.sources[name].shards, digest=digest, context="training")
                for name, digest in state.loader.sources.items()
            ]
            context.tracker.begin_stage(stage.index, stage.config, tags, datasets)
            if state.rollback is not None:
                context.tracker.rewind(stage.global_step(start))
                context.tracker.tag(*state.rollback)
        self._clock = time.perf_counter(), start, state.loader.wait_seconds  # at the last collection

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.state.context.tracker.metrics(self.state.stage.global_step(step + 1), metrics)
        # Exclude the evaluation's time.
        self._clock = time.perf_counter(), step + 1, self.state.loader.wait_seconds

    def after_step(self, event: StepEvent) -> None:
        """Collect the metrics of a completed step, if it is a metrics step. A collective call."""
        state, stage, context, completed = self.state, self.state.stage, self.state.context, event.step + 1
        if not stage.is_metrics_step(event.step):
            return
        assert event.health is not None, "every metrics step has a health check"
        collectives, batch_size = context.collectives, stage.config.global_batch_size
        world_size = collectives.world_size
        last_time, last_step, last_waited = self._clock
        self._clock = time.perf_counter(), completed, state.loader.wait_seconds
        seconds = max(self._clock[0] - last_time, 1e-9)
        steps_per_second, data_wait = (completed - last_step) / seconds, (self._clock[2] - last_waited) / seconds

        # One reduction sums the diagnostics over ranks and gathers each rank's timings.
        names = sorted(state.step.diagnostics)
        by_rank = torch.zeros(2, world_size, device=collectives.device)
        by_rank[:, collectives.rank] = torch.tensor([data_wait, state.step.forward_seconds()])
        parts = [state.step.diagnostics[name].float().reshape(1) for name in names]
        summed = collectives.sum(torch.cat([*parts, by_rank.flatten()])).tolist()
        timings = summed[len(names) :]
        ranks_data_wait, forward_seconds = timings[:world_size], timings[world_size:]

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
            "train/grad_norm": state.engine.gradient_norm(),
        }
        if self._peak_step_seconds is not None:
            values["perf/mfu"] = steps_per_second * self._peak_step_seconds
        values |= total_data_counts(state.loader, state.data_counts, collectives)
        values |= goodput_metrics(context.supervisor.goodput.seconds())
        step, is_warm = stage.global_step(completed), event.step >= stage.config.optimizer.warmup_steps
        if collectives.rank == 0:
            context.tracker.metrics(step, values | context.supervisor.nodes.take())
            progress = Progress(
                stage=stage.name,
                stage_step=completed,
                stage_steps=stage.steps,
                step=step,
                total_steps=stage.run.total_steps,
                loss=losses["loss"],
                samples_per_second=values["perf/samples_per_s"],
                seconds_left=(stage.steps - completed) / max(steps_per_second, 1e-9),
            )
            context.report(progress)
        snapshot = MetricsSnapshot(step, values, is_warm, ranks_data_wait, forward_seconds)
        state.callbacks.on_metrics(event.step, snapshot)


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


class EvaluationCallback(Callback):
    """Evaluates on `evaluation.source` every `evaluation.every` steps and at the end of each stage but the last.

    All ranks evaluate held-out pairs with the current weights, not their moving average: `eval/<source>/…` over the
    first `max_images_during_training` images, the same on every rank. The training stream is not affected (contracts
    C1, C4): modules return to the mode they were in, no gradient is kept, no random generator is used, and the loader
    keeps its position. Every rank runs the same number of forwards through the engine, which at ZeRO 3 gathers weights
    from all.
    """

    def __init__(self, stage: Stage, storage: Storage):
        """Raises ConfigError if classes that are named by their texts have no names, before anything is built."""
        self._pairs: EvalPairs | None = None  # kept between evaluations
        run, source = stage.run, stage.run.evaluation.source
        self._is_enabled = False
        if run.evaluation.every is not None and source is not None:
            self._is_enabled = bool(evaluation_tasks(stage.config, run.sources[source].type))
            if run.sources[source].type == "labelled" and "itc" in stage.config.objectives:
                class_names(run, source, storage)

    def after_step(self, event: StepEvent) -> None:
        """Evaluate if it is due. `mome train` evaluates the finished run by itself."""
        stage, context, num_steps = self.state.stage, self.state.context, event.step + 1
        section = stage.run.evaluation
        is_due = num_steps % (section.every or 1) == 0
        if num_steps == stage.steps:
            is_due = stage.index + 1 < len(stage.run.stages)
        if not self._is_enabled or not is_due or event.preempted:
            return
        with context.supervisor.during("evaluation", stage.global_step(event.step)):
            result = evaluate(
                self.state.engine.reader,
                context.tokenizer,
                stage.run,
                context.storage,
                limit=min(section.max_images_during_training, section.max_images or section.max_images_during_training),
                stage=stage.name,
                rerank_best=0,
                choices=self.state.choices,
                ranks=context.collectives,
                held_out=self._pairs,
            )
            self._pairs = result.held_out
            metrics = result.metrics()
        self.state.callbacks.on_evaluation(event.step, metrics)

    def close(self) -> None:
        if self._pairs is not None:
            self._pairs.close()
