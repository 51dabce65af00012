"""Data of the training loop: the objects that a run's stages share, and a stage's state on this rank."""

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
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.health import Spike, SpikeGuard
from pipeline.training.ownership import Ownership
from pipeline.training.prepare import Coverage
from pipeline.training.progress import Report
from pipeline.training.step import TrainingStep
from pipeline.training.supervisor import RankSupervisor


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
