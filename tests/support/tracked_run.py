"""Records of the run of `journals.config_of`, without training; and checks of a real run in MLflow."""

from pathlib import Path

from mlflow import MlflowClient

from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage
from pipeline.tracking.tracker import DatasetInput, SavedWeights, Tracker
from tests.support import journals
from tests.support.train_process import STAGES, TrainProcess

PHOTOS = DatasetInput("photos", "s3://bucket/photos", "ab" * 32)


def config_of(output: Path | str, uri: str, name: str = "run") -> RunConfig:
    return journals.config_of(output, name, uri=uri, flush_seconds=0.2)


def record(tracker: Tracker, config: RunConfig, stage: int, steps: range) -> None:
    """Record what the loop records in these steps of a stage."""
    tags = {"zero_stage": "1"} | ({"start_from": weights(config, stage - 1).url} if stage else {})
    tracker.begin_stage(stage, config.stages[stage], tags, [PHOTOS])
    for step in steps:
        tracker.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": step / 3})


def losses(steps: range) -> list[tuple[int, float]]:
    """Return the train/loss that `record` gives these steps."""
    return [(step, 1 / (step + 1)) for step in steps]


def weights(config: RunConfig, stage: int) -> SavedWeights:
    """Return the final weights of a stage."""
    return SavedWeights(f"{config.folder}/stages/{stage}-{config.stages[stage].name}", 100 * (stage + 1), stage)


def checkpoint(config: RunConfig, step: int) -> SavedWeights:
    return SavedWeights(f"{config.folder}/checkpoints/step-{step:08d}.abcd", step, (step - 1) // 100)


def assert_tracked_once(run: TrainProcess, folder: Path, attempts: int) -> None:
    """Assert that MLflow has a parent, a child per stage, each journaled step once, and the kept checkpoints."""
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
