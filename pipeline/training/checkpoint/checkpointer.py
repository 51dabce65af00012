"""The callback that saves checkpoints during a stage."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from pipeline.data.storage import join
from pipeline.tracking.tracker import SavedWeights
from pipeline.training.callbacks import Callback, StepEvent
from pipeline.training.metrics import MetricsSnapshot, total_data_counts

if TYPE_CHECKING:
    from pipeline.training.callbacks import RunContext, StageResult, StageState
    from pipeline.training.stages import Stage

log = logging.getLogger(__name__)


class Checkpointer(Callback):
    """Saves every `checkpoint.every` steps and on preemption, with the journal and the list of bad samples."""

    def __init__(self, stage: Stage, context: RunContext):
        self._stage, self._context = stage, context
        self._metrics: dict[str, float] = {}  # latest, for `checkpoint.keep_best`

    def on_stage_start(self, state: StageState, start: int) -> None:
        self._state = state
        if self._stage.run.checkpoint.every < self._stage.steps - start:
            state.checkpoints.host_copy.reserve(state.engine.fragments())

    def on_metrics(self, step: int, snapshot: MetricsSnapshot) -> None:
        self._metrics = snapshot.values

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics = self._metrics | metrics

    def after_step(self, event: StepEvent) -> None:
        """Copy the state; it is written and committed, with the journal, in the background."""
        num_steps, state, context = event.step + 1, self._state, self._context
        if self._stage.is_checkpoint_step(event.step) or (event.preempted and num_steps < self._stage.steps):
            step = self._stage.global_step(num_steps)
            with context.supervisor.during("checkpoint", step - 1):
                started = time.perf_counter()
                quarantine = context.collectives.gather_json(state.loader.quarantined())

                def before_commit() -> None:
                    self._write_quarantine(step, quarantine)
                    context.tracker.commit(step)

                metadata = checkpoint_metadata(self._stage, context, state, num_steps) | {
                    "data_counts": total_data_counts(state.loader, state.data_counts, context.collectives),
                    "metrics": self._metrics,
                    "shapes": state.shapes,
                }
                url = state.checkpoints.save(state.engine.fragments(), metadata, before_commit)
                stall = time.perf_counter() - started
                context.tracker.metrics(step, {"ckpt/stall_s": stall, "ckpt/wait_s": state.checkpoints.waited})
                self._record_finished_saves()
                if event.preempted:
                    state.checkpoints.wait()
            state.callbacks.on_checkpoint(num_steps, url)
        state.checkpoints.check()

    def on_stage_end(self, result: StageResult) -> None:
        """Wait for the save in progress, so that a rollback does not depend on how fast the store is."""
        step = self._stage.global_step(result.num_steps)
        self._context.supervisor.enter("checkpoint", step)
        self._state.checkpoints.wait()
        self._record_finished_saves()
        if result.num_steps == self._stage.steps:
            if self._context.collectives.rank == 0:
                self._context.ownership.check()
            self._write_quarantine(step, self._context.collectives.gather_json(self._state.loader.quarantined()))

    def _record_finished_saves(self) -> None:
        """Record how long finished saves took and which checkpoints the run now keeps."""
        finished = self._state.checkpoints.written()
        for step, seconds in finished:
            self._context.tracker.metrics(step, {"ckpt/write_s": seconds})
        if finished:
            names = [stage.name for stage in self._stage.run.stages]
            kept = self._state.checkpoints.retention.kept
            self._context.tracker.log_checkpoints(
                [SavedWeights(info.url, info.step, names.index(info.stage)) for info in kept if info.stage]
            )

    def _write_quarantine(self, step: int, records_by_rank: list[list[dict[str, Any]]]) -> None:
        """Write the bad samples that any rank replaced to the run's folder as JSON lines, on rank 0."""
        records = [record for records in records_by_rank for record in records]
        if records and self._context.collectives.rank == 0:
            lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()
            name = f"quarantine/{self._stage.index}-{self._stage.name}-{step:08d}.jsonl"
            url = join(self._stage.run.folder, name)
            self._context.storage.write(url, lines)
            self._context.tracker.artifact(name, lines)
            log.warning("%d bad samples were replaced; see %s", len(records), url)


def checkpoint_metadata(stage: Stage, context: RunContext, state: StageState, num_steps: int) -> dict[str, Any]:
    """Return the metadata that checkpoints and final weights share, after `num_steps` steps of the stage."""
    return {
        "step": stage.global_step(num_steps),
        "stage": stage.name,
        "stage_step": num_steps,
        "plan_digest": state.loader.digest,
        "zero_stage": stage.run.engine.zero_stage,
        "config": stage.run.model_dump(mode="json"),
        "time_account": context.supervisor.goodput.seconds(),
        "spikes": state.spikes.state(),
    }
