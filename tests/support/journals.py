"""Configs, records, stores and trackers of runs that are not trained; and a check of a trained run in MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import ObjectInfo, Storage
from pipeline.tracking.journal import CommittedJournal, Dataset, Journal, JournalWriter
from pipeline.tracking.tracker import SavedWeights, Tracker

if TYPE_CHECKING:
    from tests.support.train_process import TrainProcess

RUN = "memory://run"
URL = f"{RUN}/journal"
STAGE_START = {"kind": "stage", "at": 1, "stage": 0, "name": "one", "params": {}, "tags": {}, "datasets": []}
REPORT = "0123456789abcdef/report.html"  # file of an artifact in a journal
PHOTOS = Dataset(name="photos", source="s3://bucket/photos", digest="ab" * 32, context="training")


def config_of(output: Path | str, name: str = "run", **tracking: Any) -> RunConfig:
    """Return the config of a run of two stages of 100 steps."""
    stage = {"sources": {"photos": 1.0}, "objectives": {"mim": {}}, "steps": 100, "global_batch_size": 16}
    stages, photos = [{"name": name, **stage} for name in ("vision", "second")], {"shards": f"{output}/photos"}
    values = {"name": name, "output": str(output), "sources": {"photos": photos}, "stages": stages}
    return validate(values | {"tracking": {"flush_seconds": 0.2, **tracking}}, "test")


def point(step: int, stage: int | None = 0) -> dict[str, Any]:
    return {"kind": "metrics", "at": 1000 + step, "stage": stage, "step": step, "values": {"loss": float(step)}}


def artifact(file: str = REPORT, name: str = "report.html") -> dict[str, Any]:
    return {"kind": "artifact", "at": 1, "stage": None, "name": name, "file": file}


def encode(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


def all_records(journal: Journal) -> list[dict[str, Any]]:
    return [record for session in journal.sessions() for _, record in journal.records(session)]


def steps(journal: Journal) -> list[int]:
    return [record["step"] for record in all_records(journal) if record["kind"] == "metrics"]


def training(journal: Journal, first: int, last: int) -> JournalWriter:
    writer = JournalWriter(journal)
    for record in (STAGE_START, *map(point, range(first, last + 1))):
        writer.append(record)
    return writer


class Objects(dict[str, bytes]):
    read, write, exists = dict.__getitem__, dict.__setitem__, dict.__contains__

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        names = {key.removeprefix(f"{url}/"): data for key, data in self.items() if key.startswith(f"{url}/")}
        return {name: ObjectInfo(len(data), None) for name, data in names.items() if "/" not in name}


def restored(store: Any, folder: Path, run: str = RUN) -> Journal:
    """Return a new journal of `run` in `folder`, as another machine restores it from the store."""
    journal = Journal(folder)
    CommittedJournal(store, run).restore(journal)
    return journal


def tracked(config: RunConfig, steps: range, stage: int = 0, attempt: str = "1") -> Tracker:
    """Return a new tracker of the run that has recorded these steps of a stage."""
    tracker = Tracker.open(config, Storage(), {"attempt": attempt})
    record(tracker, config, stage, steps)
    return tracker


def record(tracker: Tracker, config: RunConfig, stage: int, steps: range) -> None:
    tags = {"zero_stage": "1"} | ({"start_from": weights(config, stage - 1).url} if stage else {})
    tracker.begin_stage(stage, config.stages[stage], tags, [PHOTOS])
    record_steps(tracker, steps)


def record_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": step / 3})


def losses(steps: range) -> list[tuple[int, float]]:
    """Return the train/loss that `record_steps` gives these steps."""
    return [(step, 1 / (step + 1)) for step in steps]


def weights(config: RunConfig, stage: int) -> SavedWeights:
    return SavedWeights(f"{config.folder}/stages/{stage}-{config.stages[stage].name}", 100 * (stage + 1), stage)


def checkpoint(config: RunConfig, step: int) -> SavedWeights:
    return SavedWeights(f"{config.folder}/checkpoints/step-{step:08d}.abcd", step, (step - 1) // 100)


def assert_tracked_once(run: TrainProcess, folder: Path, attempts: int) -> None:
    """Assert that MLflow has a parent, a child per stage, each journaled step once, and the kept checkpoints."""
    from mlflow import MlflowClient

    from tests.support.train_process import STAGES

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (item.experiment_id for item in client.search_experiments() if item.name == "vlmo")
    digest = load_manifest(Storage(), f"{folder}/scenes").digest[:36]
    runs = client.search_runs([experiment], filter_string=f"dataset.digest = '{digest}'")
    (parent,) = (item for item in runs if item.data.tags["mome.role"] == "run" and item.info.run_name == run.name)
    children = [item for item in runs if item.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(item.info.run_name for item in children) == sorted(STAGES)
    assert {item.info.status for item in (parent, *children)} == {"FINISHED"}
    assert parent.data.tags["attempt"] == str(attempts)
    for child in children:
        history = client.get_metric_history(child.info.run_id, "train/loss")
        points, stage = [(point.step, point.value) for point in history], int(child.data.tags["stage_index"])
        assert sorted(points) == sorted((step, loss) for (index, step), loss in run.losses().items() if index == stage)
    kept = client.search_logged_models([experiment], f"tags.`mome.run` = '{parent.data.tags['mome.run']}'")
    handed_over = [model for model in kept if model.tags["mome.role"] == "final_weights"]
    assert sorted(model.params["stage"] for model in handed_over) == sorted(STAGES)
    assert {m.tags["mome.url"] for m in kept if m not in handed_over} == set(run.checkpoints())
