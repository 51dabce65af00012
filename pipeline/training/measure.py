"""Measured memory of a running engine by category, to validate the estimate of `pipeline.planning`.

Tensors are identified by their storages. Activations are the storages that autograd saves for backward; the peak is the
allocator's own (CUDA's counter, or the CPU allocator's events as the profiler records them).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pipeline.config.background import PeriodicThread
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.training.deepspeed_engine import DeepSpeedEngine

Storages = dict[int, int]  # address -> bytes


def storages_of(tensors: Iterable[Tensor]) -> Storages:
    """Return the distinct storages behind some tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def living(device: torch.device) -> Storages:
    """Return every storage on a device that a Python object still refers to, gradients among them."""
    gc.collect()
    tensors: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance on deprecated objects warns
        for candidate in gc.get_objects():
            try:
                if isinstance(candidate, Tensor):
                    tensors += _with_gradient(candidate)
            except (ReferenceError, RuntimeError):
                continue
    return storages_of(tensor for tensor in tensors if tensor.device.type == device.type)


def states_of(engine: DeepSpeedEngine) -> Storages:
    """Return the storages of weights that the forward reads, master weights, moments and moving averages."""
    tensors = [*engine.module.parameters(), *engine._averages.values(), *engine._optimized_tensors()]
    tensors += [parameter.ds_tensor for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    for group in engine._adam.param_groups:
        tensors += group["params"]
    for state in engine._adam.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return storages_of(tensors)


def gradients_of(engine: DeepSpeedEngine) -> Storages:
    """Return the storages of gradients: tensors of parameters and optimizer other than state and buckets."""
    buckets: list[Tensor] = []  # through which DeepSpeed reduces gradients
    for bucket in getattr(engine._engine.optimizer, "ipg_buckets", {}).values():
        buckets += [bucket.buffer] if isinstance(bucket.buffer, Tensor) else (bucket.buffer or [])
    others = states_of(engine) | storages_of(buckets)

    def nested(value: Any, depth: int = 4) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield from _with_gradient(value)
        elif depth and isinstance(value, dict | list | tuple | set):
            for item in value.values() if isinstance(value, dict) else value:
                yield from nested(item, depth - 1)

    held = list(nested(vars(engine._engine.optimizer)))
    for parameter in engine.module.parameters():
        held += [g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None]
    return {address: size for address, size in storages_of(held).items() if address not in others}


def _with_gradient(tensor: Tensor) -> list[Tensor]:
    return [tensor] if not tensor.is_leaf or tensor.grad is None else [tensor, tensor.grad]


class MeasuredEngine:
    """The engine as a training step sees it, and what autograd had saved whenever backward began."""

    def __init__(self, engine: DeepSpeedEngine):
        self._engine = engine
        self.saved_bytes = 0
        self._saved: Storages = {}
        self.after_backward: Callable[[], None] | None = None

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While entered, what is saved is counted."""

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
                self._saved |= storages_of([tensor])
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return self._engine(passes)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.saved_bytes = max(self.saved_bytes, sum(self._saved.values()))
        self._saved.clear()
        self._engine.backward(loss, last)
        self._saved.clear()
        if last and self.after_backward is not None:
            self.after_backward()


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that `run` allocates at any time beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    alive = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += change
        peak = max(peak, alive)
    return peak


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory since the block was entered, in bytes.

    On a GPU the allocator's peak; on a CPU the process's resident memory, sampled every few milliseconds.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    process, peak = psutil.Process(), 0

    def update() -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    update()
    sampler = PeriodicThread(update, 0.01, "peak memory").start()
    try:
        yield lambda: peak
    finally:
        sampler.stop()
