"""`--profile A:B`: where the time of some steps goes, as a trace that chrome://tracing and Perfetto open.

Rank 0 records its own steps A to B - 1, counted over all stages; the trace is written to RUN/profile and logged in
MLflow. A run that is not profiled makes no profiler and pays nothing.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, parse_steps
from pipeline.data.storage import Storage, join
from pipeline.training.background_writer import BackgroundWriter

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0  # that the end of a stage waits for a trace to be written

Step = TypeVar("Step", bound="tuple[int, Any]")


class Artifacts(Protocol):
    def artifact(self, name: str, content: str | Path | bytes) -> None: ...


@dataclass(frozen=True)
class Window:
    """Global steps `first` to `last` - 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, told: str) -> Window:
        """From 'A:B'. Raises ConfigError."""
        try:
            return cls(*parse_steps(told))
        except ValueError as error:
            raise ConfigError(f"--profile {told}: {error}, over all stages") from None

    @property
    def override(self) -> str:
        """As a key of the config; in quotes, because other readers of YAML take a bare 3:6 for minutes and seconds."""
        return f'tracking.profile="{self.first}:{self.last}"'


def profiled(
    steps: Iterator[Step], first: int, config: RunConfig, storage: Storage, tracker: Artifacts, rank: int
) -> Iterator[Step]:
    """A stage's steps, as (step of the stage, …), those in `tracking.profile` recorded.

    `first` is the stage's first global step. A step's part of the trace ends where the next one's begins, so that
    waiting for data is in it.
    """
    if config.tracking.profile is None or rank != 0:
        return steps
    return _profiled(steps, first, Window.parse(config.tracking.profile), config.folder, storage, tracker)


def _profiled(
    steps: Iterator[Step], first: int, window: Window, folder: str, storage: Storage, tracker: Artifacts
) -> Iterator[Step]:
    recording: _Recording | None = None
    reached, writer = first, BackgroundWriter(storage)
    try:
        for item in steps:
            reached = first + item[0]
            inside = window.first <= reached < window.last
            if inside and recording is None:
                recording = _Recording(reached)
            elif not inside and recording is not None:
                recording.end(reached, folder, writer, tracker)
                recording = None
            yield item
            reached += 1
    finally:
        if recording is not None:
            recording.end(reached, folder, writer, tracker)
        writer.close(UPLOAD_SECONDS)


class _Recording:
    """A trace from global step `first` on."""

    def __init__(self, first: int):
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first = first
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.start()

    def end(self, last: int, folder: str, writer: BackgroundWriter, tracker: Artifacts) -> None:
        """Write the trace of the steps up to `last`, which is not in it; the upload goes on in the background."""
        self._profile.stop()
        name = f"profile/steps-{self._first:08d}-{last:08d}.json.gz"
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json.gz"
            self._profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
        tracker.artifact(name, trace)
        writer.write(join(folder, name), trace)
        log.warning("the trace of steps %d:%d goes to %s", self._first, last, join(folder, name))
