"""A run of two stages as the tests of tracking record it, without training anything."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.tracking.tracker import DatasetInput, Kept, Tracker

PHOTOS = DatasetInput("photos", "s3://bucket/photos", "ab" * 32)


def config_of(output: Path | str, uri: str, name: str = "run") -> RunConfig:
    stage = {"sources": {"photos": 1.0}, "objectives": {"masked_image": {}}, "steps": 100, "batch": 16}
    values = {
        "name": name,
        "output": str(output),
        "sources": {"photos": {"shards": f"{output}/photos"}},
        "stages": [{"name": "vision", **stage}, {"name": "second", **stage}],
        "tracking": {"uri": uri, "flush_seconds": 0.2},
    }
    return validate(values, "test")


def record(tracker: Tracker, config: RunConfig, stage: int, steps: range) -> None:
    """What the loop records of these steps of a stage."""
    tags = {"zero_stage": "1"} | ({"start_from": weights(config, stage - 1).url} if stage else {})
    tracker.begin_stage(stage, config.stages[stage], tags, [PHOTOS])
    for step in steps:
        tracker.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": step / 3})


def weights(config: RunConfig, stage: int) -> Kept:
    """What a stage hands over."""
    return Kept(f"{config.folder}/stages/{stage}-{config.stages[stage].name}", 100 * (stage + 1), stage)


def checkpoint(config: RunConfig, step: int) -> Kept:
    return Kept(f"{config.folder}/checkpoints/step-{step:08d}.abcd", step, (step - 1) // 100)


def crash(tracker: Tracker) -> None:
    """End the tracker, and the process that ships for it, without any last words."""
    process = tracker._shipper._process
    tracker._shipper._stop.set()
    tracker._shipper._minder.join()
    if process is not None:
        process.kill()
        process.wait()
    tracker._writer.close()
