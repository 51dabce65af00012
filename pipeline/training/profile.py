"""Profiling: traces of training steps for Perfetto or chrome://tracing, and an engine's memory by category.

`--profile A:B` makes rank 0 trace its steps A to B - 1, counted over all stages, to RUN/profile and MLflow.
"""

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.config.background import in_background
from pipeline.config.schema import parse_steps
from pipeline.data.storage import join
from pipeline.training.callbacks import Callback
from pipeline.training.deepspeed_engine import DeepSpeedEngine

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0  # limit for writing the last trace at the end of a stage
Storages = dict[int, int]  # address -> bytes


class Profiler(Callback):
    """Records the stage's steps within `tracking.profile`. A step's part of the trace includes its wait for data."""

    _profile: profile | None = None
    _upload: Future[bool] | None = None
    _first = _next = 0  # global step of the trace's beginning, and the one after the current step

    def before_batch(self, step: int) -> None:
        global_step, window = self.state.stage.first_step + step, self.state.stage.run.tracking.profile
        assert window is not None
        if global_step not in range(*parse_steps(window)):
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
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json.gz"
            self._profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
        self._profile, name = None, f"profile/steps-{self._first:08d}-{last:08d}.json.gz"
        url = join(self.state.stage.run.folder, name)
        self.state.context.tracker.artifact(name, trace)
        self._upload = in_background(partial(self.state.context.storage.write, url, trace), "mome-profile")
        log.info("the trace of steps %d:%d is being written to %s", self._first, last, url)

    def close(self) -> None:
        self._save(self._next)
        if self._upload is not None:
            try:
                self._upload.result(UPLOAD_SECONDS)
            except Exception as error:  # no failure here is a reason to stop the run
                log.warning("the trace was not written: %s: %s", type(error).__name__, error)


# ---- memory


def living(device: torch.device) -> Storages:
    """Return every storage on a device that a Python object still refers to, gradients among them."""
    gc.collect()
    storages: Storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance on deprecated objects warns
        for candidate in gc.get_objects():
            with suppress(ReferenceError, RuntimeError):
                if isinstance(candidate, Tensor) and candidate.device.type == device.type:
                    gradient = candidate.grad if candidate.is_leaf else None
                    for tensor in [candidate] if gradient is None else [candidate, gradient]:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return storages


class MeasuredEngine(DeepSpeedEngine):
    """An engine that measures activations, if `record_saved` is the pack hook of `saved_tensors_hooks`."""

    activation_bytes = 0  # most bytes that were saved when the backward of a micro-batch began

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._saved: Storages = {}

    def record_saved(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves for backward, unless it is a parameter or a view of one."""
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            self._saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def backward(self, loss: Tensor, last: bool) -> None:
        self.activation_bytes = max(self.activation_bytes, sum(self._saved.values()))
        super().backward(loss, last)
        self._saved.clear()


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that `run` allocates at any time beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    alive = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += change
        peak = max(peak, alive)
    return peak
