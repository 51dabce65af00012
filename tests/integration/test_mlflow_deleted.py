"""MLflow after runs were deleted and restored, and after a stage was rolled back (C6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder
from pipeline.tracking.mlflow_replay import MlflowUploader, pending_bytes
from pipeline.tracking.mlflow_server import ServerUnavailable
from pipeline.tracking.tracker import Tracker
from tests.support.short_run import NoUploader
from tests.support.tracked_run import checkpoint, config_of, record


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/mlflow.db"


@pytest.fixture(autouse=True)
def shipped_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)


def ship(config: RunConfig, uri: str, said: Callable[[str], None] = print) -> MlflowUploader:
    uploader = MlflowUploader(journal_folder(config.folder), uri, said)
    uploader.upload()
    return uploader


def run_ids(config: RunConfig, client: MlflowClient) -> list[str]:
    """Return the run ids of the parent, then of the stages."""
    (run,) = {record["run"] for record in Journal(journal_folder(config.folder)).run_records()}
    experiments = [item.experiment_id for item in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`mome.run` = '{run}'", order_by=["start_time ASC"])
    return [item.info.run_id for item in sorted(runs, key=lambda item: item.data.tags["mome.role"])]


def losses(client: MlflowClient, run: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run, "train/loss")
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.timestamp, point.step))]


@pytest.mark.parametrize("what", ["stage", "run", "experiment"])
@pytest.mark.parametrize("fresh", [False, True], ids=["same uploader", "another process"])
def test_metrics_of_a_deleted_run_arrive_after_its_restore(tmp_path: Path, uri: str, what: str, fresh: bool) -> None:
    config = config_of(tmp_path, uri, f"run-{what}-{fresh}")
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": config.name})})
    tracker, client = Tracker.open(config, Storage()), MlflowClient(uri)
    record(tracker, config, 0, range(10))
    uploader = ship(config, uri)
    parent, stage = run_ids(config, client)
    experiment = client.get_run(stage).info.experiment_id
    delete, restore = {
        "stage": (lambda: client.delete_run(stage), lambda: client.restore_run(stage)),
        "run": (lambda: client.delete_run(parent), lambda: client.restore_run(parent)),
        "experiment": (lambda: client.delete_experiment(experiment), lambda: client.restore_experiment(experiment)),
    }[what]

    delete()
    for step in range(10, 20):
        tracker.metrics(step, {"train/loss": 1 / (step + 1)})
    tracker.end_stage()
    tracker.tag("after", "deletion")  # on the parent run
    said: list[str] = []
    for _ in range(2):
        uploader = MlflowUploader(journal_folder(config.folder), uri, said.append) if fresh else uploader
        with pytest.raises(ServerUnavailable, match="is deleted: restore it"):
            uploader.upload()
    assert pending_bytes(journal_folder(config.folder), uri) > 0
    assert said == []
    restore()
    tracker.close()
    ship(config, uri)

    assert run_ids(config, client) == [parent, stage], "no run was created a second time"
    assert losses(client, stage) == [(step, 1 / (step + 1)) for step in range(20)]
    assert client.get_run(parent).data.tags["after"] == "deletion"
    assert pending_bytes(journal_folder(config.folder), uri) == 0


def test_metrics_after_a_rollback_replace_earlier_ones(tmp_path: Path, uri: str) -> None:
    config = config_of(tmp_path, uri, "rollback")
    tracker, client = Tracker.open(config, Storage()), MlflowClient(uri)
    record(tracker, config, 0, range(1, 11))
    for step in range(11, 31):
        tracker.metrics(step, {"train/loss": 50.0})
    tracker.rewind(10)
    for step in range(11, 31):
        tracker.metrics(step, {"train/loss": 2.0})
    tracker.log_checkpoints([checkpoint(config, 20)])
    tracker.close()
    ship(config, uri)

    _, stage = run_ids(config, client)
    points = losses(client, stage)
    assert points[-20:] == [(step, 2.0) for step in range(11, 31)]
    assert client.get_run(stage).data.metrics["train/loss"] == 2.0
    experiment = client.get_run(stage).info.experiment_id
    (model,) = client.search_logged_models([experiment], f"tags.`mome.url` = '{checkpoint(config, 20).url}'")
    assert [metric.value for metric in model.metrics if metric.key == "train/loss"] == [2.0]


def test_rollback_below_uploaded_steps_after_a_lost_node(tmp_path: Path, uri: str) -> None:
    """The server has metrics that are no longer valid; the remaining journal resumes below its last step."""
    config = config_of(tmp_path, uri, "marks")
    tracker, client = Tracker.open(config, Storage()), MlflowClient(uri)
    record(tracker, config, 0, range(1, 31))
    ship(config, uri)
    journal = Journal(journal_folder(config.folder))
    journal.restored.touch()  # as after a node was lost: the server may have more than this journal
    tracker.close()
    again = Tracker.open(config, Storage())
    again.begin_stage(0, config.stages[0], {"resumed_at": "10"}, [])
    again.rewind(10)
    for step in range(11, 31):
        again.metrics(step, {"train/loss": 2.0})
    again.close()
    ship(config, uri)

    _, stage = run_ids(config, client)
    assert losses(client, stage)[-20:] == [(step, 2.0) for step in range(11, 31)]


def test_run_opened_by_an_evaluation_is_ended(tmp_path: Path, uri: str) -> None:
    """Imported weights have no training run that would end it."""
    config, client = config_of(tmp_path, uri, "imported"), MlflowClient(uri)
    for _ in range(2):
        tracker = Tracker.open(config, Storage())
        tracker.metrics(0, {"eval/r1": 0.5})
        tracker.close()
        ship(config, uri)

    (parent,) = run_ids(config, client)
    assert client.get_run(parent).info.status == "FINISHED"
