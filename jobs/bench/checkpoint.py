"""`mome bench checkpoint`: how long asynchronous and synchronous saves of a real model's sizes stall training."""

import math
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config.errors import CheckpointError
from pipeline.config.load import load_config
from pipeline.config.schema import CheckpointConfig, VLMoConfig
from pipeline.data.storage import PartReader, Storage, join
from pipeline.models import skeleton
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment

VOCABULARY = 30522
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class ThrottledStorage(Storage):
    """Store whose writers together are limited to `bytes_per_second`."""

    bytes_per_second = math.inf
    _turn, _free = threading.Lock(), 0.0

    def write_parts(self, url: str, size: int, part: PartReader, create: bool = False) -> bool:
        def read_slowly(start: int, stop: int) -> bytes:
            with self._turn:
                self._free = ready = max(self._free, time.monotonic()) + (stop - start) / self.bytes_per_second
            data = part(start, stop)
            time.sleep(max(ready - time.monotonic(), 0.0))
            return data

        return super().write_parts(url, size, read_slowly, create)


def bench_checkpoint(
    config: Path | None, url: str | None, mb_per_second: float, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure how long saves stall training (medians); `mb_per_second` (10^6 bytes) limits the store, 0 does not."""
    section = VLMoConfig() if config is None else load_config(config).model
    progress("creating the state")
    sizes = {name: parameter.numel() for name, parameter in skeleton(section, VOCABULARY).named_parameters()}
    fragments = [Fragment(name, 0, {kind: torch.rand(size) for kind in KINDS}) for name, size in sizes.items()]
    with ExitStack() as stack:
        url = url or stack.enter_context(tempfile.TemporaryDirectory(prefix="mome-bench-"))
        storage, folder = ThrottledStorage(), join(url, "mome-bench-checkpoint")
        storage.bytes_per_second = mb_per_second * 1e6 or math.inf
        store = CheckpointStore(storage, folder, Collectives(), CheckpointConfig(keep=1))
        stack.callback(storage.delete, store.url)
        stack.callback(store.close)
        started = time.perf_counter()
        store.host_copy.reserve(fragments)
        reserved = time.perf_counter() - started
        alone = _train(lambda step: step < 50)  # while nothing is saved
        seconds: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}  # until training may continue
        overlapping = []
        for step in range(2 * rounds):
            kind = "asynchronous" if step % 2 else "synchronous"
            progress(f"round {step // 2 + 1} of {rounds}: {kind} save")
            metadata = {"step": step, "stage": "bench", "stage_step": step, "plan_digest": "", "zero_stage": 0}
            started = time.perf_counter()
            store.save(fragments, {**metadata, "data_counts": {}})
            if kind == "synchronous":
                store.wait()
            seconds[kind].append(time.perf_counter() - started)
            if kind == "asynchronous":
                overlapping.append(_train(lambda _: not store.check()))
                store.wait()
        progress("restoring")
        started = time.perf_counter()
        latest = store.latest()
        if latest is None:
            raise CheckpointError(f"{store.url}: no checkpoint found, although one was saved")
        saved = [(fragment.name, kind, value) for fragment in fragments for kind, value in fragment.values.items()]
        differing = sum(not torch.equal(latest[1].read(name, kind, 0, len(v)), v) for name, kind, v in saved)
        if differing:
            raise CheckpointError(f"{store.url}: {differing} restored tensors differ from the saved ones")
        restored = time.perf_counter() - started
    synchronous, stall = median(seconds["synchronous"]), median(seconds["asynchronous"])
    size = {"parameters": sum(sizes.values()), "bytes": sum(value.nbytes for _, _, value in saved)}
    saves = {"synchronous_seconds": synchronous, "stall_seconds": stall, "ratio": stall / synchronous}
    settings = {"store_mb_per_second": mb_per_second or None, "rounds": rounds, "reserve_seconds": reserved}
    step_seconds = {"alone": alone, "beside_a_save": median(overlapping)}
    return {**size, **settings, **saves, "step_seconds": step_seconds, "restore_seconds": restored}


def _train(go_on: Callable[[int], bool]) -> float:
    """Return the median seconds of a step, of one at least; `go_on` receives the number of steps."""
    matrix = torch.rand(512, 512)
    seconds = list[float]()
    while not seconds or go_on(len(seconds)):
        started = time.perf_counter()
        for _ in range(3):
            matrix = torch.softmax(matrix @ matrix, dim=1)
        seconds.append(time.perf_counter() - started)
    return median(seconds)
