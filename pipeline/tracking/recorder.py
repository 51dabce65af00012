"""What training and evaluation may record of a run, and the recorder of those ranks that must record nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pipeline.config.schema import StageConfig

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetInput:
    """Data that a stage reads: the source's name, the URL of its shards, the digest of its manifest."""

    name: str
    source: str
    digest: str
    context: str = "training"


@dataclass(frozen=True)
class Kept:
    """Weights that a run keeps: their URL, the global step, the index of their stage."""

    url: str
    step: int
    stage: int


class Recorder(Protocol):
    """What training and evaluation may record. `Tracker` does; `SilentTracker` is for the ranks that must not."""

    def begin_stage(
        self, index: int, stage: StageConfig, tags: dict[str, str], datasets: list[DatasetInput]
    ) -> None: ...
    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def tag(self, key: str, value: str) -> None: ...
    def artifact(self, name: str, content: str | Path | bytes) -> None: ...
    def keeps(self, checkpoints: Sequence[Kept]) -> None: ...
    def hands_over(self, weights: Kept) -> None: ...
    def end_stage(self, status: Status = "FINISHED") -> None: ...
    def finish(self, status: Status = "FINISHED") -> None: ...
    def commit(self, step: int) -> None: ...
    def close(self, timeout: float = 20.0) -> None: ...
    def abandon(self) -> None: ...


class SilentTracker:
    """Records nothing."""

    def begin_stage(self, index: int, stage: StageConfig, tags: dict[str, str], datasets: list[DatasetInput]) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def tag(self, key: str, value: str) -> None:
        pass

    def artifact(self, name: str, content: str | Path | bytes) -> None:
        pass

    def keeps(self, checkpoints: Sequence[Kept]) -> None:
        pass

    def hands_over(self, weights: Kept) -> None:
        pass

    def end_stage(self, status: Status = "FINISHED") -> None:
        pass

    def finish(self, status: Status = "FINISHED") -> None:
        pass

    def commit(self, step: int) -> None:
        pass

    def close(self, timeout: float = 20.0) -> None:
        pass

    def abandon(self) -> None:
        pass
