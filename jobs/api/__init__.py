"""The package `mome`: load trained models, train and evaluate from Python.

    import mome

    run = mome.train("pairs.yaml", ["stages.pairs.steps=1000"])
    model = mome.load(run)
    model.similarity(["dog.jpg", "cat.jpg"], ["a dog", "a cat"])

`pipeline/README.md` describes it. This module is installed as `mome` (see setup.py); importing it imports neither torch
nor Ray, and each name only what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipeline.config.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        MomeError,
        RunFailed,
        StorageError,
        TrackingError,
    )
    from pipeline.config.schema import RunConfig, StorageConfig
    from pipeline.data.storage import Storage
    from pipeline.inference import TrainedModel

__version__ = metadata.version("mome")

_MODULES = {
    "pipeline.config.errors": (
        *("CheckpointError", "ConfigError", "DataError", "MomeError", "RunFailed", "StorageError", "TrackingError"),
    ),
    "pipeline.config.schema": ("RunConfig", "StorageConfig"),
    "pipeline.data.storage": ("Storage",),
    "pipeline.inference": ("TrainedModel",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [  # noqa: RUF022
    "load",
    "train",
    "evaluate",
    "TrainingResult",
    "TrainedModel",
    "RunConfig",
    "StorageConfig",
    "Storage",
    "MomeError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "RunFailed",
    "StorageError",
    "TrackingError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mome' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: its folder or URL, and what `mome train --json` prints, such as `metrics["retrieval"]`."""

    folder: str
    metrics: dict[str, Any]


def load(
    source: str | Path | TrainingResult,
    device: str | torch.device | None = None,
    storage: Storage | None = None,
    tracking_uri: str | None = None,
) -> TrainedModel:
    """Load trained weights with their tokenizer and answer lists, ready for inference.

    `source` is the folder or URL of a run (its last finished stage), of a stage, of imported weights or of a
    checkpoint, the result of `train`, or `models:/NAME@ALIAS` and `models:/NAME/VERSION` of MLflow's registry at
    `tracking_uri`, which may be a reference 'env:NAME' or 'file:PATH' to it (default: MLflow's own setting). `storage`
    holds the credentials of an object store (default: from the environment); the model runs on the GPU by default.
    Raises CheckpointError for incomplete weights, TrackingError for an unknown model.
    """
    from pipeline import inference

    return inference.load(
        source.folder if isinstance(source, TrainingResult) else source, device, storage, tracking_uri
    )


def train(config: str | Path | Mapping[str, Any] | RunConfig, overrides: Iterable[str] = ()) -> TrainingResult:
    """Train the stages of a run on Ray and evaluate the last one, as `mome train` does; resume the run if it exists.

    `config` is the path of a YAML file, the name of a recipe, its keys as a mapping, or a validated config, and
    `overrides` are `KEY=VALUE` with dotted keys. Progress is printed on standard error. Raises ConfigError listing
    every fault of the config, or what to do where Ray is not installed.
    """
    from jobs.console import RunDisplay
    from jobs.train import run_and_evaluate

    settings = _config(config, overrides)
    with RunDisplay(settings.name) as display:
        return TrainingResult(settings.folder, run_and_evaluate(settings, display))


def evaluate(run: str | Path | TrainingResult, source: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Evaluate a run's last stage on held-out data, as `mome evaluate --json` does, and write a report.

    `source` is a source of the run or the URL of shards (default: `evaluation.source`), `limit` a number of images.
    """
    from jobs.console import RunDisplay
    from jobs.evaluate import evaluate_checkpoint
    from pipeline.evaluation.ranks import SINGLE_PROCESS

    folder = run.folder if isinstance(run, TrainingResult) else str(run)
    with RunDisplay(folder) as display:
        values = evaluate_checkpoint(folder, source, limit, ranks=SINGLE_PROCESS, progress=display.phase)
    assert values is not None
    return values


def _config(config: str | Path | Mapping[str, Any] | RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return a validated config with overrides applied."""
    from pipeline.config.load import apply_override, load_config, validate

    if isinstance(config, str | Path):
        return load_config(config, list(overrides))
    values = dict(config) if isinstance(config, Mapping) else config.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    return validate(values, "config")
