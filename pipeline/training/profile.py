"""`--profile A:B`: record a trace of these steps, to be opened with chrome://tracing or Perfetto.

Rank 0 records its own steps A to B - 1, counted over all stages. The trace is written to RUN/profile and logged in
MLflow. Without the option no profiler is created.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.errors import ConfigError
from pipeline.config.schema import parse_steps
from pipeline.data.storage import join
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from pipeline.training.context import RunContext
    from pipeline.training.stages import Stage

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0  # limit for writing the last trace at the end of a stage


def profile_override(window: str) -> str:
    """Return `--profile A:B` as an override of the config. Raises ConfigError."""
    try:
        first, last = parse_steps(window)
    except ValueError as error:
        raise ConfigError(f"--profile {window}: {error}, over all stages") from None
    return f'tracking.profile="{first}:{last}"'  # quoted: YAML 1.1 reads a bare 3:6 as minutes and seconds


class Profiler(Callback):
    """Records the stage's steps within the window 'A:B'. A step's part of the trace includes its wait for data."""

    def __init__(self, stage: Stage, context: RunContext, window: str):
        self._stage, self._context = stage, context
        self._window = range(*parse_steps(window))  # global steps
        self._writer = BackgroundWriter(context.storage)
        self._profile: profile | None = None
        self._first = self._next = 0  # global step of the trace's beginning, and the one after the current step

    def before_batch(self, step: int) -> None:
        global_step = self._stage.global_step(step)
        if global_step not in self._window:
            self._save(global_step)
        elif self._profile is None:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
            self._profile.start()
            self._first = global_step
        self._next = global_step + 1

    def _save(self, last: int) -> None:
        """Write the trace of the steps before `last`, if one is being recorded, in the background."""
        if self._profile is None:
            return
        self._profile.stop()
        name = f"profile/steps-{self._first:08d}-{last:08d}.json.gz"
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json.gz"
            self._profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
        self._profile = None
        url = join(self._stage.run.folder, name)
        self._context.tracker.artifact(name, trace)
        self._writer.write(url, trace)
        log.info("the trace of steps %d:%d is being written to %s", self._first, last, url)

    def close(self) -> None:
        self._save(self._next)
        self._writer.close(UPLOAD_SECONDS)
