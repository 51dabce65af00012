"""Measured memory of a running engine by category, to validate the estimate of `pipeline.planning`.

Tensors are identified by their storages. Activations are the storages that autograd saves for backward; the peak is the
allocator's own (CUDA's counter, or the CPU allocator's events as the profiler records them).
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.background import PeriodicThread
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.training.deepspeed_engine import DeepSpeedEngine

Storages = dict[int, int]  # address -> bytes


def storages_of(tensors: Iterable[Tensor]) -> Storages:
    """The distinct storages behind some tensors."""
    storages: Storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def living(device: torch.device) -> Storages:
    """Every storage on a device that a Python object still refers to, gradients among them."""
    gc.collect()
    return storages_of(tensor for tensor in _all_tensors() if tensor.device.type == device.type)


def _all_tensors() -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance on deprecated objects warns
        for candidate in gc.get_objects():
            try:
                if not isinstance(candidate, Tensor):
                    continue
                yield candidate
                if candidate.is_leaf and candidate.grad is not None:
                    yield candidate.grad
            except (ReferenceError, RuntimeError):
                continue


def states_of(engine: DeepSpeedEngine) -> Storages:
    """Weights that forward reads, master weights, moments and moving averages."""
    tensors = [*engine.module.parameters(), *engine._averages.values()]
    tensors += [parameter.ds_tensor for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    for group in engine._adam.param_groups:
        tensors += group["params"]
    tensors += engine._optimized_tensors()
    for state in engine._adam.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return storages_of(tensors)


def gradients_of(engine: DeepSpeedEngine) -> Storages:
    """Return the storages of gradients: tensors of parameters and optimizer other than state and buckets."""
    held = list(_held_by(vars(engine._engine.optimizer)))
    for parameter in engine.module.parameters():
        held += [g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None]
    others = {**states_of(engine), **buckets_of(engine)}
    return {address: size for address, size in storages_of(held).items() if address not in others}


def _held_by(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested lists and dictionaries, and their gradients."""
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif depth and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held_by(item, depth - 1)


def buckets_of(engine: DeepSpeedEngine) -> Storages:
    """The buffers through which DeepSpeed reduces gradients."""
    buckets = getattr(engine._engine.optimizer, "ipg_buckets", {}).values()
    held: list[Tensor] = []
    for bucket in buckets:
        held += [bucket.buffer] if isinstance(bucket.buffer, Tensor) else (bucket.buffer or [])
    return storages_of(held)


class MeasuredEngine:
    """The engine as a training step sees it, and what autograd had saved whenever backward began."""

    def __init__(self, engine: DeepSpeedEngine):
        self._engine = engine
        self.saved_bytes = 0
        self._saved: Storages = {}
        self.after_backward: Callable[[], None] | None = None

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While entered, what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not is_weight:
            self._saved |= storages_of([tensor])
        return tensor

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
    """The most bytes that `run` allocates at any time beyond what was allocated before it."""
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
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
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
    peak = _resident_bytes()

    def update() -> None:
        nonlocal peak
        peak = max(peak, _resident_bytes())

    sampler = PeriodicThread(update, 0.01, "peak memory").start()
    try:
        yield lambda: peak
    finally:
        sampler.stop()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
