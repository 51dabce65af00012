"""Runs of a few steps on drawn scenes through `train`, called on the rank itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.tracking import tracker
from pipeline.tracking.journal import Journal
from pipeline.training.callbacks import Callback
from pipeline.training.loop import train
from tests.support.journals import all_records

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
STEPS = 8
MODEL = {
    "width": 32,
    "init_std": 0.02,
    "layers": 2,
    "heads": 2,
    "vision_language_layers": 1,
    "image_size": 24,
    "patch_size": 8,
}


def short_config(folder: str, name: str = "run", data: str = "", **overrides: Any) -> RunConfig:
    """Return a config of two stages of `STEPS` steps, a checkpoint every third; `a__b=c` overrides the key a.b.

    The scenes are in `data` (default: `folder`).
    """
    stages = [
        {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}},
        {"name": "pairs", "sources": {"scenes": 1.0}, "objectives": {"itc": {}, "mlm": {}}},
    ]
    shared = {"steps": STEPS, "global_batch_size": 8, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    shards = f"{data or folder}/scenes"
    scenes = {"shards": shards, "synthetic": {"scenes": 60, "image_size": 24}}
    values: dict[str, Any] = {
        "output": folder, "name": name, "model": MODEL, "stages": [stage | shared for stage in stages],
        "sources": {"scenes": scenes, "pictures": {"shards": shards, "type": "images"}},
        "engine.zero_stage": 2, "cluster.workers": 2, "evaluation.source": None, "checkpoint.every": 3,
        "tracking.metrics_every": 1, "tracking.required": False,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(DEMO, [f"{key}={json.dumps(value)}" for key, value in values.items()])


class NoUploader:
    """A replacement for the tracker's uploader that uploads nothing, so that only journals are written."""

    def __init__(self, *_: Any) -> None: ...
    def send(self, command: str) -> None: ...
    def close(self, timeout: float | None) -> None: ...


def train_short(
    folder: str, name: str = "run", callbacks: Sequence[Callback] = (), options: Any = None, **overrides: Any
) -> None:
    """Train a short run on this rank, without an upload process; `options` are further arguments of `train`."""
    tracker.Uploader = NoUploader  # type: ignore[misc, assignment]
    train(short_config(folder, name, **overrides), lambda progress: None, callbacks=callbacks, **(options or {}))


def losses(folder: str | Path, name: str = "run") -> dict[int, str]:
    """Return step -> loss, exactly as the journal has it; fail if a step was recorded twice."""
    records = [record for record in journal(folder, name) if "train/loss" in record.get("values", {})]
    by_step = {record["step"]: repr(record["values"]["train/loss"]) for record in records}
    assert len(by_step) == len(records), "a step was journaled twice"
    return by_step


def journal(folder: str | Path, name: str = "run") -> list[dict[str, Any]]:
    """Return all whole records, in order."""
    return all_records(Journal(Path(folder, name, "journal")))


def committed(run: str | Path) -> list[str]:
    """Return the names of a run's committed checkpoints and stages, without their suffixes."""
    return sorted(file.parent.name.partition(".")[0] for file in Path(run).glob("*/*/COMMIT.json"))


class BeforeStep(Callback):
    """Callback that calls `act(state)` before the forward over the batch `step` of any stage."""

    def __init__(self, step: int, act: Callable[[Any], object]):
        self._step, self._act = step, act

    def before_step(self, step: int, batch: Batch) -> None:
        if batch.step == self._step:
            self._act(self.state)
