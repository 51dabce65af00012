"""Evaluation during training: all ranks evaluate held-out pairs with the current weights, at configured steps.

The training stream is not affected (contracts C1, C4): modules return to the mode they were in, no gradient is kept, no
random generator is used, and the loader keeps its position. Every rank runs the same number of forwards through the
engine, which at ZeRO 3 gathers weights from all. The trained weights are evaluated, not their moving average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import can_evaluate, evaluate
from pipeline.evaluation.labelled import class_names
from pipeline.training.callbacks import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.training.context import RunContext, StageState
    from pipeline.training.stages import Stage


class EvaluationCallback(Callback):
    """Evaluates on `evaluation.source` every `evaluation.every` steps and at the end of each stage but the last."""

    def __init__(self, stage: Stage, context: RunContext):
        """Raises ConfigError if classes that are named by their texts have no names."""
        self._stage, self._context = stage, context
        self._pairs: EvalPairs | None = None  # kept between evaluations
        run, source = stage.run, stage.run.evaluation.source
        self._is_enabled = False
        if run.evaluation.every is not None and source is not None:
            self._is_enabled = can_evaluate(run, source, stage.config)
            if run.sources[source].type == "labelled" and "itc" in stage.config.objectives:
                class_names(run, source, context.storage)  # fails before the stage trains

    def on_stage_start(self, state: StageState, start: int) -> None:
        self._state = state

    def after_step(self, event: StepEvent) -> None:
        """Evaluate if it is due. `mome train` evaluates the finished run by itself."""
        run, num_steps = self._stage.run, event.step + 1
        is_due = num_steps % (run.evaluation.every or 1) == 0
        if num_steps == self._stage.steps:
            is_due = self._stage.index + 1 < len(run.stages)
        if self._is_enabled and is_due and not event.preempted:
            with self._context.supervisor.during("evaluation", self._stage.global_step(event.step)):
                metrics = self.evaluate()
            self._state.callbacks.on_evaluation(event.step, metrics)

    def evaluate(self) -> dict[str, float]:
        """Return `eval/<source>/…` over the first `max_images_during_training` images, the same on every rank."""
        section, context = self._stage.run.evaluation, self._context
        result = evaluate(
            self._state.engine.reader,
            context.tokenizer,
            self._stage.run,
            context.storage,
            limit=min(section.max_images_during_training, section.max_images or section.max_images_during_training),
            stage=self._stage.name,
            rerank_best=0,
            choices=self._state.choices,
            ranks=context.collectives,
            held_out=self._pairs,
        )
        self._pairs = result.held_out
        return result.metrics()

    def close(self) -> None:
        if self._pairs is not None:
            self._pairs.close()
