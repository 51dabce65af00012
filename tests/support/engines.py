"""Engines of tiny runs on the calling rank, for tests of gradients, optimizer state and checkpoints."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import CheckpointConfig, RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.model import Model
from pipeline.objectives import head_config
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.stages import Stage, freeze_untrained
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine
from tests.support.small_checkpoint import metadata
from tests.support.tiny_model import tiny_batch
from tests.support.trial import VOCABULARY


class ReadableEngine(DeepSpeedEngine):
    def gradients(self) -> dict[str, Tensor]:
        """Return the global batch's full gradients; valid between the last `backward` and `step`."""
        from deepspeed.utils import safe_get_full_grad

        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        return {name: safe_get_full_grad(p).detach().float().clone() for name, p in trained.items()}


@dataclass(frozen=True)
class EngineOnRank:
    """A stage's engine and training step on this rank."""

    config: RunConfig
    stage: StageConfig
    collectives: Collectives
    engine: Any
    step: TrainingStep

    def batch(self, step: int) -> Batch:
        """Return this rank's examples of the tiny batch of a step."""
        ranks = (self.collectives.rank, self.collectives.world_size)
        batch = tiny_batch(self.config, step, *ranks, self.stage.global_batch_size)
        return replace(batch, image=None) if self.config.source_type_of(self.stage) == "text" else batch

    def losses(self, batch: Batch) -> dict[str, float]:
        """Run forward and backward on this rank's examples and return the losses of the global batch."""
        return {name: float(self.collectives.sum(loss)) for name, loss in self.step(batch).items()}

    def train(self, steps: Iterable[int], learning_rate: float = 1e-3) -> list[float]:
        """Make optimizer steps on tiny batches and return their global losses."""
        losses = []
        for step in steps:
            losses.append(self.losses(self.batch(step))["loss"])
            self.engine.step(learning_rate)
        return losses

    def save(self, folder: str, step: int) -> CheckpointStore:
        """Begin to write a checkpoint of `step` steps; `wait` for it on the returned store."""
        store = self.store(folder)
        store.save(self.engine.fragments(), metadata(step) | {"stage": self.stage.name})
        return store

    def restore(self, folder: str) -> bool | None:
        """Load the newest checkpoint; return whether the engine equals it bit for bit, or None without one."""
        if (latest := self.store(folder).latest()) is None:
            return None
        saved = latest[1]
        self.engine.restore(saved)
        return all(
            torch.equal(value, saved.read(fragment.name, kind, fragment.start, fragment.start + len(value)))
            for fragment in self.engine.fragments()
            for kind, value in fragment.values.items()
            if (fragment.name, kind) in saved.parts  # a moving average may be new
        )

    def store(self, folder: str) -> CheckpointStore:
        return CheckpointStore(Storage(self.config.storage), folder, self.collectives, CheckpointConfig(keep=9))


def tiny_model(config: RunConfig, index: int = 0, freeze: Iterable[str] = ()) -> Model:
    """Build a stage's model with random weights; the parts that it does not train, and `freeze`, need no gradient."""
    model = build_model(config.model, VOCABULARY, head_config(config, index), seed=5)
    freeze_untrained(model, Stage(config, index))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and model.part_of(name) not in set(freeze))
    return model


def build_engine(config: RunConfig, index: int = 0, model: Model | None = None, plain: bool = False) -> EngineOnRank:
    """Build the engine of stage `index` on this rank. `plain` selects autograd and Adam in one process."""
    collectives, stage = Collectives(), Stage(config, index)
    model = model or tiny_model(config, index)
    engine = PlainEngine(model, stage.config.optimizer) if plain else ReadableEngine(model, stage, collectives)
    return EngineOnRank(config, stage.config, collectives, engine, TrainingStep(engine, stage, collectives))


def gradients_and_losses(
    config: RunConfig, index: int = 0, plain: bool = False, batch: Callable[[RunConfig, int, int], Batch] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradient and losses of one global batch (`batch(config, rank, world_size)`; default: a tiny batch)."""
    built = build_engine(config, index, plain=plain)
    rank, world_size = built.collectives.rank, built.collectives.world_size
    losses = built.losses(batch(config, rank, world_size) if batch else built.batch(1))
    gradients = built.engine.gradients()
    if not plain:
        built.engine.close()
    return gradients, losses
