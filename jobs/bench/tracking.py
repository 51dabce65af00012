"""What recording a step's metrics costs the trainer, while another process ships them to MLflow."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking.tracker import Tracker

LOSSES, DATA = 5, 40  # keys of a step: losses and rates, then counters of sources and nodes


def bench_tracking(points: int, pause_seconds: float) -> dict[str, Any]:
    """Milliseconds that `points` calls took in the calling thread, `pause_seconds` apart: mean, median, 99 % and most.

    The journal and an SQLite database lie in a temporary folder.
    """
    values = {f"train/loss_{number}": 1 / (number + 3) for number in range(LOSSES)}
    values |= {f"data/source_{number}/read": float(number) for number in range(DATA)}
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder)
        tracker = Tracker.open(config, Storage())
        tracker.begin_stage(0, config.stages[0], {}, [])
        seconds, cpu = np.empty(points), time.thread_time()
        for step in range(points):
            started = time.perf_counter()
            tracker.metrics(step, values)
            seconds[step] = time.perf_counter() - started
            time.sleep(pause_seconds)
        cpu = time.thread_time() - cpu
        bytes_a_point = sum(path.stat().st_size for path in Path(folder).glob("*/journal/*.jsonl")) / points
        tracker.abandon()  # its folder goes now
    milliseconds = (1e3 * np.array([seconds.mean(), *np.quantile(seconds, (0.5, 0.99, 1.0))])).tolist()
    return {
        "calls": points,
        "keys_of_a_call": len(values),
        "milliseconds": dict(zip(("mean", "median", "p99", "most"), milliseconds, strict=True)),
        "cpu_milliseconds_of_a_call": 1e3 * cpu / points,
        "journal_bytes_of_a_call": round(bytes_a_point),
    }


def _config(folder: str) -> RunConfig:
    stage = {"name": "one", "sources": {"none": 1.0}, "objectives": {"masked_image": {}}, "steps": 1, "batch": 16}
    values = {"name": "bench", "output": folder, "sources": {"none": {"shards": "none"}}, "stages": [stage]}
    return validate(values, "mome bench tracking")
