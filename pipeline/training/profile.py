"""Profiling: traces of training steps, and the memory of an engine by category.

`--profile A:B` records a trace of these steps, counted over all stages, to be opened with chrome://tracing or Perfetto.
Rank 0 records its own steps A to B - 1. The trace is written to RUN/profile and logged in MLflow. Without the option no
profiler is created.

Memory is measured to validate the estimate of `pipeline.planning`. Tensors are identified by their storages.
Activations are the storages that autograd saves for backward; the peak is the allocator's own (CUDA's counter, or the
CPU allocator's events as the profiler records them).
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.config.errors import ConfigError
from pipeline.config.schema import parse_steps
from pipeline.data.storage import join
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.callbacks import Callback, RunContext
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.stages import Stage

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0  # limit for writing the last trace at the end of a stage
Storages = dict[int, int]  # address -> bytes

# ---- traces


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


# ---- memory


def storages_of(tensors: Iterable[Tensor], with_gradients: bool = False) -> Storages:
    """Return the distinct storages behind some tensors and, if requested, their gradients."""
    storages = []
    for tensor in tensors:
        storages.append(tensor.untyped_storage())
        if with_gradients and tensor.is_leaf and tensor.grad is not None:
            storages.append(tensor.grad.untyped_storage())
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def living(device: torch.device) -> Storages:
    """Return every storage on a device that a Python object still refers to, gradients among them."""
    gc.collect()
    storages: Storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance on deprecated objects warns
        for candidate in gc.get_objects():
            try:
                if isinstance(candidate, Tensor) and candidate.device.type == device.type:
                    storages |= storages_of([candidate], with_gradients=True)
            except (ReferenceError, RuntimeError):
                continue
    return storages


def states_of(engine: DeepSpeedEngine) -> Storages:
    """Return the storages of weights that the forward reads, master weights, moments and moving averages."""
    tensors = [*engine.module.parameters(), *engine.averages.values(), *engine.optimized_tensors()]
    tensors += [parameter.ds_tensor for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    tensors += [parameter for group in engine.adam.param_groups for parameter in group["params"]]
    tensors += [value for state in engine.adam.state.values() for value in state.values() if isinstance(value, Tensor)]
    return storages_of(tensors)


def gradients_of(engine: DeepSpeedEngine) -> Storages:
    """Return the storages of gradients: tensors of parameters and optimizer other than state and buckets."""
    optimizer = engine.deepspeed.optimizer
    buckets: list[Tensor] = []  # through which DeepSpeed reduces gradients
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buckets += [bucket.buffer] if isinstance(bucket.buffer, Tensor) else (bucket.buffer or [])

    def nested(value: Any, depth: int = 4) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, dict | list | tuple | set):
            for item in value.values() if isinstance(value, dict) else value:
                yield from nested(item, depth - 1)

    held = list(nested(vars(optimizer)))
    for parameter in engine.module.parameters():
        held += [g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None]
    others = states_of(engine) | storages_of(buckets)
    return {address: size for address, size in storages_of(held, True).items() if address not in others}


class MeasuredEngine:
    """The engine as a training step sees it, with the memory of activations and gradients while `measuring`."""

    def __init__(self, engine: DeepSpeedEngine):
        self._engine, self._is_measuring = engine, False
        self._saved: Storages = {}
        self.saved_bytes = 0  # by autograd when backward began
        self.gradients: Storages = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the steps in the block."""

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
                self._saved |= storages_of([tensor])
            return tensor

        self._is_measuring = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            self._is_measuring = False

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return self._engine(passes)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.saved_bytes = max(self.saved_bytes, sum(self._saved.values()))
        self._saved.clear()
        self._engine.backward(loss, last)
        self._saved.clear()
        if last and self._is_measuring:
            self.gradients |= gradients_of(self._engine)


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
