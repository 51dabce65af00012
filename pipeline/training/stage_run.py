"""A stage on one rank: where it starts, its steps with all that surrounds them, its hand-over."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.config.errors import CheckpointError, Preempted, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.choices import choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage, join
from pipeline.data.storage.errors import NoSpace
from pipeline.tracking.tracker import DatasetInput, SavedWeights, Tracker
from pipeline.training.alerts import Alerts
from pipeline.training.checkpoint import (
    CheckpointStore,
    finished_stage,
    read_manifest,
    save_weights,
    stage_url,
)
from pipeline.training.collectives import Collectives
from pipeline.training.coverage import load_coverage
from pipeline.training.evaluation import StageEvaluation
from pipeline.training.goodput import goodput_metrics
from pipeline.training.instruments import Instruments
from pipeline.training.look import look
from pipeline.training.memory import is_out_of_memory, out_of_memory
from pipeline.training.micro_batch import with_micro_batch
from pipeline.training.non_finite import describe, diagnose
from pipeline.training.ownership import Ownership
from pipeline.training.profile import profiled
from pipeline.training.progress import Progress, Report
from pipeline.training.schedule import learning_rate
from pipeline.training.spikes import Spike, SpikeFound, SpikeGuard
from pipeline.training.supervisor import RankSupervisor
from pipeline.training.trainer import build_trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What the stages of a run share on a rank."""

    config: RunConfig
    storage: Storage
    tokenizer: Tokenizer
    collectives: Collectives
    tracker: Tracker
    report: Report
    loader_backend: BackendFactory
    supervisor: RankSupervisor
    ownership: Ownership


class StageRun:
    """One stage on this rank, from its last whole checkpoint or its starting weights to its hand-over."""

    def __init__(self, run: Run, index: int):
        storage, tokenizer, collectives = run.storage, run.tokenizer, run.collectives
        config = run.config.for_stage(run.config.stages[index])
        config = with_micro_batch(config, index, collectives, tokenizer.size)
        self.config, self.index, self.stage = config, index, config.stages[index]
        self.storage, self.tokenizer = storage, tokenizer
        self.collectives, self.tracker, self.report = collectives, run.tracker, run.report
        self.first = config.stage_start(index)  # global step at which the stage begins
        self.ownership, self.supervisor = run.ownership, run.supervisor
        self.spikes, self.alerts = SpikeGuard(config.guards.spike), Alerts(self.stage.name, run.tracker)
        self._points: dict[str, float] = {}  # the metrics last recorded
        self._resumed_from = ""  # URL of the checkpoint
        rank, world_size = collectives.rank, collectives.world_size
        self.loader = Loader(config, self.stage, storage, tokenizer, rank, world_size, run.loader_backend)
        self.choices = choices_of(config, config.stages[: index + 1], storage)
        self.checkpoints = CheckpointStore(storage, config.folder, collectives, config.checkpoint, run.ownership)
        self.evaluation = StageEvaluation(config, index, storage, tokenizer, collectives, self.choices)
        trainer = build_trainer(config, index, storage, tokenizer.size, collectives)
        self.engine, self.step, self.guard, self.shapes = trainer.engine, trainer.step, trainer.guard, trainer.shapes
        self.instruments = Instruments(config, index, self.loader, collectives, tokenizer.size)

    def run(self, spike: Spike | None = None) -> None:
        """`spike`: what made the run go back to here, and is now to be left out.

        Raises Preempted once the stage is saved, SpikeFound where the stage is to be taken up again, RunFailed.
        """
        start = self._resume()
        self._begin_tracking(start)
        if spike is not None:
            self._leave_out(spike, start)
        try:
            if self.config.checkpoint.every < self.stage.steps - start:
                self.checkpoints.reserve(self.engine.fragments())
            done, noticed = self._train(start)
            if done == self.stage.steps:
                self.supervisor.enter("checkpoint", self.first + done)
                self._hand_over()
        except (RuntimeError, MemoryError, OSError) as error:
            self._stop_if_lasting(error)
            raise
        finally:
            self.checkpoints.close()
            self.loader.close()
            self.evaluation.close()
            self.engine.close()
            gc.collect()
        if noticed and self.first + done < self.config.total_steps:
            raise Preempted(
                f"stage {self.stage.name}, step {self.first + done}: told that a machine is about to go; the run is "
                "saved. Run the same command to go on."
            )

    def _stop_if_lasting(self, error: Exception) -> None:
        """Raises RunFailed for what a restart would only meet again."""
        if isinstance(error, NoSpace):
            raise RunFailed(
                f"stage {self.stage.name}: {error} What is committed stays: run the same command once there is room."
            ) from error
        if is_out_of_memory(error):
            raise out_of_memory(error, self.config, self.stage, self.collectives, self.engine.memory()) from error

    def _train(self, start: int) -> tuple[int, bool]:
        """Steps of the stage that are done at the end, and whether a notice of preemption ended them."""
        self.instruments.begin(start)
        for step, batch in self._profiled(self._steps(start)):
            self.guard.begin(step - start, self.first + start)
            losses = self.step(batch, tell=self._is_metric_step(step))
            self.guard.check(self.first + step)
            noticed = self._look(step, batch, losses)
            rate = learning_rate(step, self.stage.steps, self.stage.optimizer)
            self.engine.step(rate)
            if self._is_metric_step(step):
                self._record(step, losses, rate)
            if self.evaluation.is_due(step) and not noticed:
                self._evaluate(step)
            if self._is_checkpoint_step(step) or (noticed and step + 1 < self.stage.steps):
                with self.supervisor.during("checkpoint", self.first + step):
                    self._save(step + 1)
                    if noticed:
                        self.checkpoints.wait()
            self.checkpoints.check()
            if noticed:
                return step + 1, True
        return self.stage.steps, False

    def _steps(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Steps first: no batch is drawn and lost."""
        batches = self.loader.batches(self.spikes.batch_of(start))
        for step in range(start, self.stage.steps):
            self.supervisor.enter("data_wait", self.first + step)
            batch = next(batches)
            self.supervisor.enter("training", self.first + step)
            yield step, batch
            self.supervisor.step_done()

    def _look(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> bool:
        """What all ranks must know before the update: whether to save and end. Raises RunFailed or SpikeFound."""
        if (step + 1) % self.config.guards.health_check_every and not self._is_metric_step(step):
            return False
        seen = look(losses, self.engine.local_gradients(), self.supervisor.preempted(), self.collectives)
        if seen.bad_losses or seen.bad_gradients:
            found = describe(losses, self.collectives)
            where = diagnose(self.engine.module, lambda: self.step(batch), self.collectives)
            if self.collectives.rank == 0:
                self.alerts.sound("not_finite", self.first + step, f"{found}; {where}")
            raise RunFailed(
                f"stage {self.stage.name}, step {self.first + step}: {found}; {where}. The weights were not updated. A "
                "restart would repeat it: lower optimizer.lr, set optimizer.max_grad_norm, or use float32."
            )
        if self.collectives.rank == 0:
            self.alerts.see_loss(self.first + step, seen.loss)
        try:
            self.spikes.judge(step, seen.loss)
        except SpikeFound:
            with self.supervisor.during("checkpoint", self.first + step):
                self.checkpoints.wait()  # so that what is gone back to does not depend on how fast the store is
            raise
        return seen.notices > 0

    def _profiled(self, steps: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        return profiled(steps, self.first, self.config, self.storage, self.tracker, self.collectives.rank)

    # ---- where it starts

    def _resume(self) -> int:
        """Steps of this stage that a whole checkpoint already holds, after restoring it; 0 without one."""
        found = self.checkpoints.latest()
        self.checkpoints.remove_unfinished()
        if found is None or found[0].stage != self.stage.name:
            self.supervisor.resume_from(self._time_at_hand_over())
            return 0
        checkpoint, state = found
        if checkpoint.plan_digest != self.loader.digest:
            raise CheckpointError(
                f"{checkpoint.url} was made from other data: its plan digest is {checkpoint.plan_digest[:12]}…, "
                f"the sources now give {self.loader.digest[:12]}…. Restore the shards and their manifests as they "
                "were, or begin a new run under another `name`."
            )
        self.engine.restore(state)
        self._resumed_from = checkpoint.url
        self.instruments.counted_before = checkpoint.data_counts
        self.supervisor.resume_from(checkpoint.time_account)
        self.spikes.restore(checkpoint.spikes)
        log.warning("resuming stage %s at step %d from %s", self.stage.name, checkpoint.stage_step, checkpoint.url)
        return checkpoint.stage_step

    def _time_at_hand_over(self) -> dict[str, float]:
        """The time account with which the stage before ended."""
        if self.index == 0:
            return {}
        manifest = read_manifest(self.storage, stage_url(self.config, self.index - 1))
        return manifest.get("time_account", {})

    def _leave_out(self, spike: Spike, start: int) -> None:
        """Go on past what made the loss jump."""
        first, stop = self.spikes.skip(spike, start, self.stage.name)
        told = (
            f"step {self.first + spike.step}: loss {spike.loss:.4g}, median {spike.median:.4g}; "
            f"back to step {self.first + start} without batches {first} to {stop - 1} of the stage"
        )
        log.warning("stage %s: loss spike: %s", self.stage.name, told)
        self.tracker.rewind(self.first + start)
        self.tracker.tag(f"mome.spike.{spike.number}", told)

    def _begin_tracking(self, start: int) -> None:
        datasets = [
            DatasetInput(name, self.config.sources[name].shards, digest) for name, digest in self.loader.sources.items()
        ]
        tags = {"plan_digest": self.loader.digest[:36], "start_from": self._origin()}
        if start:
            tags |= {"resumed_at": str(self.first + start), "resumed_from": self._resumed_from}
        coverage = load_coverage(self.storage, self.config.folder) if self.collectives.rank == 0 else None
        if coverage is not None and self.config.model.READS_TEXT:
            tags["unknown_tokens"] = f"{coverage.worst:.4f}"  # share of [UNK] in the worst source's captions
        self.tracker.begin_stage(self.index, self.stage, tags, datasets)
        if coverage is not None and coverage.alert is not None:
            self.alerts.sound("unknown_tokens", self.first + start, coverage.alert)

    def _origin(self) -> str:
        if self.stage.start_from != "previous":
            start = self.stage.start_from
            return start if start == "random" else finished_stage(self.storage, start)
        return stage_url(self.config, self.index - 1) if self.index else "random"

    # ---- what it leaves

    def _metadata(self, stage_step: int) -> dict[str, object]:
        return {
            "step": self.first + stage_step,
            "stage": self.stage.name,
            "stage_step": stage_step,
            "plan_digest": self.loader.digest,
            "zero_stage": self.config.engine.zero_stage,
            "config": self.config.model_dump(mode="json"),
            "time_account": self.supervisor.goodput.seconds(),
            "spikes": self.spikes.state(),
        }

    def _quarantined(self) -> list[dict[str, Any]]:
        """What was found bad and replaced since the last call, on any rank."""
        return [record for part in self.collectives.gather_json(self.loader.quarantined()) for record in part]

    def _write_quarantine(self, reached: int, records: list[dict[str, Any]]) -> None:
        """One JSON line each, in the run's folder."""
        if records and self.collectives.rank == 0:
            lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()
            name = f"{self.index}-{self.stage.name}-{reached:08d}.jsonl"
            self.storage.write(join(self.config.folder, "quarantine", name), lines)
            self.tracker.artifact(f"quarantine/{name}", lines)
            log.warning("%d bad samples replaced; see %s/quarantine/%s", len(records), self.config.folder, name)

    def _save(self, stage_step: int) -> None:
        """Returns when the state is copied; it is written, and committed with the journal up to here, meanwhile."""
        started = time.perf_counter()
        reached, quarantined = self.first + stage_step, self._quarantined()

        def before_commit() -> None:
            self._write_quarantine(reached, quarantined)
            self.tracker.commit(reached)

        metadata = {**self._metadata(stage_step), "data_counts": self.instruments.data_counts()}
        metadata |= {"metrics": self._points, "shapes": self.shapes}
        self.checkpoints.save(self.engine.fragments(), metadata, before_commit)
        stall = time.perf_counter() - started
        self.tracker.metrics(reached, {"ckpt/stall_s": stall, "ckpt/wait_s": self.checkpoints.waited})
        self._tell_written()

    def _tell_written(self) -> None:
        """Of saves that have ended: how long they took, and which checkpoints there now are."""
        ended = self.checkpoints.written()
        for step, seconds in ended:
            self.tracker.metrics(step, {"ckpt/write_s": seconds})
        if ended:
            names = [stage.name for stage in self.config.stages]
            self.tracker.log_checkpoints(
                [SavedWeights(k.url, k.step, names.index(k.stage)) for k in self.checkpoints.kept() if k.stage]
            )

    def _hand_over(self) -> None:
        self.checkpoints.wait()
        self._tell_written()
        weights = self.engine.weights()
        if self.collectives.rank == 0:
            self.ownership.check()
        self._write_quarantine(self.first + self.stage.steps, self._quarantined())
        url = stage_url(self.config, self.index)
        self.tracker.log_final_weights(SavedWeights(url, self.first + self.stage.steps, self.index))
        self.tracker.end_stage("FINISHED")
        self.tracker.commit(self.first + self.stage.steps)
        if weights is not None:
            metadata = self._metadata(self.stage.steps)
            tokens = list(self.tokenizer.tokens)
            if not save_weights(self.storage, url, weights, tokens, metadata, self.choices, self.ownership):
                self.ownership.check()
                log.warning("%s: an earlier start handed the stage over meanwhile; the run goes on from that", url)
        self.collectives.barrier()

    # ---- what it tells

    def _is_checkpoint_step(self, step: int) -> bool:
        return (step + 1) % self.config.checkpoint.every == 0 and step + 1 < self.stage.steps

    def _is_metric_step(self, step: int) -> bool:
        """Also before every checkpoint and hand-over: what is not finite is found there, and never saved."""
        due = (step + 1) % self.config.tracking.metrics_every == 0
        return due or self._is_checkpoint_step(step) or step + 1 == self.stage.steps

    def _evaluate(self, step: int) -> None:
        """After the update; before a checkpoint of the same step, which may be kept for what is found."""
        with self.supervisor.during("evaluation", self.first + step):
            found = self.evaluation(self.engine.reader)
        self._points = self._points | found
        self.tracker.metrics(self.first + step + 1, found)
        self.instruments.begin(step + 1)

    def _record(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Everything that is worth a point, to the tracker; to the alerts; and how far the stage is."""
        reached, read = self.first + step + 1, self.instruments.read(step, self.step, losses)
        points = read.points | {"train/lr": rate, "train/grad_norm": self.engine.gradient_norm()}
        points |= goodput_metrics(self.supervisor.goodput.seconds())
        self._points = points
        self.tracker.metrics(reached, points | self.supervisor.nodes.take())
        if self.collectives.rank == 0:
            self.alerts.read(read.ranks)
            left = (self.stage.steps - step - 1) / max(read.speed.steps_per_second, 1e-9)
            self.report(
                Progress(
                    stage=self.stage.name,
                    stage_step=step + 1,
                    stage_steps=self.stage.steps,
                    step=reached,
                    total_steps=self.config.total_steps,
                    loss=read.losses["loss"],
                    samples_per_second=read.speed.samples_per_second,
                    seconds_left=left,
                )
            )
