"""Data of the training loop: the run's shared objects, one of its stages, and the stage's state on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.backends import BackendFactory
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.callbacks import Callbacks
from pipeline.training.checkpoint import CheckpointStore, stage_url
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.health import Spike, SpikeGuard
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import Coverage
from pipeline.training.progress import Report
from pipeline.training.step import TrainingStep
from pipeline.training.supervisor import RankSupervisor


class Stage:
    """One stage of a run. Its steps count from 0; `run` is the run's config with the stage's overrides applied."""

    def __init__(self, run: RunConfig, index: int):
        self.run = run.for_stage(run.stages[index])
        self.index = index
        self.config = self.run.stages[index]
        self.name, self.steps = self.config.name, self.config.steps
        self.first_step = run.stage_start(index)  # global step
        self.url = stage_url(run, index)  # folder of the weights it hands over

    def global_step(self, step: int) -> int:
        return self.first_step + step

    def is_checkpoint_step(self, step: int) -> bool:
        """Return whether to save after this step. The last step hands over weights instead."""
        return (step + 1) % self.run.checkpoint.every == 0 and step + 1 < self.steps

    def is_metrics_step(self, step: int) -> bool:
        """Return whether to collect metrics, always done before a save so that no non-finite state is ever saved."""
        is_due = (step + 1) % self.run.tracking.metrics_every == 0
        return is_due or self.is_checkpoint_step(step) or step + 1 == self.steps

    def is_health_check_step(self, step: int) -> bool:
        return (step + 1) % self.run.guards.health_check_every == 0 or self.is_metrics_step(step)


@dataclass(frozen=True)
class RunContext:
    """Objects that all stages of a run share on one rank."""

    config: RunConfig
    storage: Storage
    tokenizer: Tokenizer
    collectives: Collectives
    tracker: Tracker
    report: Report
    loader_backend: BackendFactory
    supervisor: RankSupervisor
    ownership: Ownership
    coverage: Coverage | None = None  # of the vocabulary; on rank 0


@dataclass
class StageState:
    """A stage's state on one rank, and the position it resumed from."""

    engine: DeepSpeedEngine
    step: TrainingStep
    loader: Loader
    checkpoints: CheckpointStore
    spikes: SpikeGuard
    callbacks: Callbacks
    shapes: dict[str, list[int]]  # of the parameters by name, before ZeRO partitions them
    choices: Mapping[str, Choices]  # label lists of the heads, by file name
    resumed_from: str = ""  # URL of the checkpoint
    rollback: tuple[str, str] | None = None  # tag and description of the rollback that led here
    data_counts: dict[str, float] = field(default_factory=dict)  # of the checkpoint the stage resumed from


@dataclass(frozen=True)
class StageResult:
    """Outcome of `train_stage`: all steps completed, preempted after saving, or stopped at a loss spike."""

    num_steps: int  # completed
    preempted: bool = False
    spike: Spike | None = None
