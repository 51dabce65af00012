"""Evaluation while a stage trains: at chosen steps all ranks read held-out pairs with the weights as they then are.

The training stream is not touched (contracts C1, C4): modules are in evaluation mode and back in their own afterwards,
no gradient is kept, nothing is drawn from a generator, and the loader goes on where it stood. Every rank makes equally
many forwards through the engine, which at ZeRO 3 gathers weights from all. The weights read are the trained ones, not
their moving average.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.classification import class_names
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.evaluate import can_evaluate, evaluate
from pipeline.training.collectives import Collectives


class StageEvaluation:
    """Of one stage on `evaluation.source`, as `evaluation.every` says. All ranks call it together."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        storage: Storage,
        tokenizer: Tokenizer,
        collectives: Collectives,
        choices: Mapping[str, Choices],
    ):
        self._config, self._stage = config, config.stages[index]
        self._storage, self._tokenizer, self._collectives = storage, tokenizer, collectives
        self._choices = choices
        self._is_last = index + 1 == len(config.stages)
        self._held_out: EvalPairs | None = None  # kept from one evaluation to the next
        self._check_classes()

    def _check_classes(self) -> None:
        """That classes told by their names have some is known before the stage trains. Raises ConfigError."""
        config, source = self._config, self._config.evaluation.source
        if config.evaluation.every is None or source is None or "itc" not in self._stage.objectives:
            return
        if config.sources[source].type == "labelled":
            class_names(config, source, self._storage)

    def is_due(self, step: int) -> bool:
        """After this step of the stage: every so many, and at its end, but not at the run's: that is `evaluate_run`."""
        section, done = self._config.evaluation, step + 1
        if section.every is None or section.source is None:
            return False
        if not can_evaluate(self._config, section.source, self._stage):
            return False
        if done == self._stage.steps:
            return not self._is_last
        return done % section.every == 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`eval/<source>/…` of the first `evaluation.max_images_during_training` samples, the same on every rank."""
        section = self._config.evaluation
        found = evaluate(
            model,
            self._tokenizer,
            self._config,
            self._storage,
            limit=min(section.max_images_during_training, section.max_images or section.max_images_during_training),
            stage=self._stage.name,
            rerank_best=0,
            choices=self._choices,
            ranks=self._collectives,
            held_out=self._held_out,
        )
        self._held_out = found.held_out
        return found.metrics()

    def close(self) -> None:
        if self._held_out is not None:
            self._held_out.close()
