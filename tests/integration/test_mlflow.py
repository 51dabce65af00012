"""A run in MLflow: one parent, one child per stage, every metric once, through crashes, outages and deletions (C6).

An outage of the server on PostgreSQL lasts seconds; MOME_OUTAGE_SECONDS=600 makes it ten minutes.
"""

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.configs import Caller
from jobs.tracking import sync
from pipeline.config.errors import TrackingError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking.journal import RESTORED
from pipeline.tracking.locations import journal_folder, read_run_id
from pipeline.tracking.mlflow_replay import MlflowUploader, pending_bytes
from pipeline.tracking.mlflow_server import ServerUnavailable
from pipeline.tracking.tracker import Tracker
from tests.support.journals import PHOTOS, checkpoint, config_of, losses, record, record_steps, tracked, weights
from tests.support.mlflow_server import ADMIN, PASSWORD, Postgres, Server
from tests.support.short_run import NoUploader

OUTAGE_SECONDS = float(os.environ.get("MOME_OUTAGE_SECONDS", "4"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of an SQLite store shared by this module, because creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/mlflow.db"


@pytest.fixture
def uploader_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MlflowUploader]:
    """Let trackers upload nothing; return a function that returns an uploader of a run's journal."""
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    return lambda config, uri, report=print: MlflowUploader(journal_folder(config.folder), uri, report)


def runs_of(uri: str, config: RunConfig) -> dict[str, Run]:
    """Return the run's MLflow runs by name: the parent and its children."""
    client = MlflowClient(uri)
    experiments = [item.experiment_id for item in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`mome.run` = '{read_run_id(config, Storage())}'")
    assert len({item.info.run_name for item in runs}) == len(runs), "a run was created twice"
    return {item.info.run_name: client.get_run(item.info.run_id) for item in runs}


def points(uri: str, run: Run, key: str = "train/loss") -> list[tuple[int, float]]:
    """Return (step, value) in MLflow's order."""
    history = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.timestamp, point.step))]


def content(uri: str) -> list[list[tuple[Any, ...]]]:
    """Return all rows that a repeated upload could duplicate, with run statuses and times."""
    tables = ("runs", "metrics", "latest_metrics", "params", "tags", "datasets", "inputs")
    tables += ("logged_models", "logged_model_metrics", "logged_model_params", "logged_model_tags")
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return [sorted(connection.execute(f"select * from {table}"), key=repr) for table in tables]


def finish(tracker: Tracker, timeout: float = 20.0) -> None:
    tracker.finish()
    tracker.close(timeout)


def sync_without_cursor(config: RunConfig) -> int:
    for cursor in journal_folder(config.folder).glob("cursor-*"):
        cursor.unlink()
    return sync(config.folder, caller=Caller.of(config))["points"]


def test_uploader_survives_a_failed_connection_and_another_run_in_its_folder(tmp_path, uri, uploader_of, monkeypatch):
    """The uploader of a killed trainer may still run when the folder is deleted and the run started anew."""
    config = config_of(tmp_path, "replaced", uri=uri)
    uploader, parents = uploader_of(config, uri), []
    for number in range(2):
        tracked(config, range(5)).close()
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.tracking.mlflow_server.experiment_id", Mock(side_effect=OSError("EIO")))
            with pytest.raises(ServerUnavailable, match="EIO"):  # the connection fails halfway, and is made again
                uploader.upload()
        uploader.upload()
        runs = runs_of(uri, config)
        assert points(uri, runs["vision"]) == losses(range(5)), number
        parents.append(runs["replaced"].info.run_id)
        shutil.rmtree(config.folder)
    assert len(set(parents)) == 2


def test_restarted_run_is_one_parent_with_a_child_per_stage_and_models_of_its_kept_checkpoints(tmp_path, uri):
    config = config_of(tmp_path, "kept.models", uri=uri)
    first = tracked(config, range(1, 91))
    first.log_checkpoints([checkpoint(config, 30), checkpoint(config, 60)])
    first.metrics(60, {"eval/unseen/r1": 0.2})  # of an existing checkpoint
    first.close(timeout=None)
    second = tracked(config, range(61, 101), attempt="2")
    second.metrics(90, {"eval/unseen/r1": 0.5})  # of a checkpoint that is being written
    second.log_checkpoints([checkpoint(config, 60), checkpoint(config, 90)])
    second.log_weights(weights(config, 0))
    second.end_stage()
    record(second, config, 1, range(101, 131))
    second.close(timeout=None)
    third = tracked(config, range(121, 201), stage=1, attempt="3")
    third.artifact("report/index.html", b"<p>good</p>")
    third.log_weights(weights(config, 1))
    third.end_stage()
    third.metrics(200, {"eval/unseen/r1": 0.75})  # of the last stage, after the run
    finish(third, 60)
    before = content(uri)
    sync_without_cursor(config)
    assert content(uri) == before
    runs = runs_of(uri, config)
    parent, vision, last = (runs[name] for name in (config.name, "vision", "second"))
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 3
    assert points(uri, vision) == losses(range(1, 101))
    assert points(uri, last, "train/lr") == [(step, step / 3) for step in range(101, 201)]
    assert points(uri, parent, "eval/unseen/r1") == [(200, 0.75)]
    tags = {"mlflow.parentRunId": parent.info.run_id, "mome.restarts": "1", "mome.resumed_at_step": "61"}
    assert vision.data.tags.items() >= tags.items()
    assert parent.data.tags.items() >= {"attempt": "3", "mome.restarts": "2"}.items()
    assert parent.data.tags["mlflow.note.content"].startswith("**kept.models**: vlmo, 200 steps")
    for run, origin in ((vision, "random weights"), (last, weights(config, 0).url)):
        assert run.data.tags["mlflow.note.content"].endswith(f" steps of 16 samples. Started from {origin}.")
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / "vlmo"
    assert (artifacts / last.info.run_id / "artifacts" / "report" / "index.html").read_bytes() == b"<p>good</p>"
    assert (artifacts / parent.info.run_id / "artifacts" / "config.yaml").exists()
    assert [run.inputs.dataset_inputs[0].dataset.digest for run in runs.values()] == [PHOTOS["digest"][:36]] * 3

    condition = f"tags.`mome.run` = '{parent.data.tags['mome.run']}'"
    order = [{"field_name": "metrics.eval/unseen/r1", "ascending": False}]
    models = MlflowClient(uri).search_logged_models([parent.info.experiment_id], condition, order_by=order)
    logged = [(m.params["step"], m.source_run_id, {metric.key: metric.value for metric in m.metrics}) for m in models]
    assert logged == [
        ("200", last.info.run_id, {"train/loss": 1 / 201, "train/lr": 200 / 3, "eval/unseen/r1": 0.75}),
        ("90", vision.info.run_id, {"train/loss": 1 / 91, "train/lr": 90 / 3, "eval/unseen/r1": 0.5}),
        ("60", vision.info.run_id, {"train/loss": 1 / 61, "train/lr": 60 / 3, "eval/unseen/r1": 0.2}),
        ("100", vision.info.run_id, {"train/loss": 1 / 101, "train/lr": 100 / 3}),
    ]
    outputs, inputs, handed_over = vision.outputs.model_outputs, last.inputs.model_inputs, models[-1]
    assert handed_over.tags["mome.url"] == weights(config, 0).url
    assert [item.model_id for item in (*outputs, *inputs)] == [handed_over.model_id] * 2
    assert last.data.tags["start_from.run_id"] == vision.info.run_id


def test_journal_of_a_killed_trainer_is_uploaded(tmp_path, uri):
    config = config_of(tmp_path, "killed", uri=uri, tensorboard=True)
    program = """if True:
        import os, signal, sys, time
        from pipeline.config.schema import RunConfig
        from tests.support.journals import tracked
        tracker = tracked(RunConfig.model_validate_json(sys.stdin.read()), range(2000))
        while tracker._uploader._process is None: time.sleep(0.01)
        print(tracker._uploader._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    command, text = [sys.executable, "-c", program], config.model_dump_json()
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    status, deadline = Path(f"/proc/{int(done.stdout)}/status"), time.monotonic() + 40
    while status.exists() and "\nState:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the uploader outlives its trainer"
        time.sleep(0.1)
    vision = runs_of(uri, config)["vision"]
    assert vision.info.status == "RUNNING", "whether it will be resumed is not known"
    assert points(uri, vision) == losses(range(2000))
    events = EventAccumulator(f"{config.folder}/tensorboard/0-vision", size_guidance={"scalars": 0}).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(range(2000))]


def test_metric_uploaded_before_a_node_loss_is_not_repeated(tmp_path, uri, monkeypatch):
    config = config_of("memory://bucket/lost-node", uri=uri)
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "first-node"))
    first = tracked(config, range(0, 60))
    first.commit()
    record_steps(first, range(60, 80))
    first.close(timeout=None)
    MlflowUploader(journal_folder(config.folder), uri, print).upload()  # as its own, a moment before the loss
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "second-node"))
    finish(tracked(config, range(60, 100)), 60)
    vision = runs_of(uri, config)["vision"]
    assert (vision.info.status, points(uri, vision)) == ("FINISHED", losses(range(100)))
    Storage().delete(config.folder)


def test_repeated_upload_changes_nothing_and_evaluation_ends_a_run(tmp_path, uri, uploader_of):
    config = config_of(tmp_path, uri=uri)
    tracker = tracked(config, range(1500))  # more than one batch
    tracker.metrics(1500, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    finish(tracker)
    assert sync(config.folder, caller=Caller.of(config))["points"] == 3003
    before = content(uri)
    assert (sync_without_cursor(config), content(uri)) == (3003, before)
    assert sync(config.folder, caller=Caller.of(config))["points"] == 0
    vision = runs_of(uri, config)["vision"]
    assert points(uri, vision) == losses(range(1500))
    assert {"nan", "up", "down"} <= vision.data.metrics.keys()

    config = config_of(tmp_path, "imported", uri=uri)  # weights without a training run that would end the run
    for _ in range(2):
        tracker = Tracker.open(config, Storage())
        tracker.metrics(0, {"eval/r1": 0.5})
        tracker.close()
        uploader_of(config, uri).upload()
    assert [run.info.status for run in runs_of(uri, config).values()] == ["FINISHED"]


@pytest.mark.parametrize("what", ["stage", "run", "experiment"])
@pytest.mark.parametrize("fresh", [False, True], ids=["same uploader", "another process"])
def test_metrics_of_a_deleted_run_arrive_after_its_restore(tmp_path, uri, uploader_of, what, fresh):
    config = config_of(tmp_path, f"run-{what}-{fresh}", uri=uri)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": config.name})})
    folder, client, messages = journal_folder(config.folder), MlflowClient(uri), []
    tracker, uploader = tracked(config, range(10)), uploader_of(config, uri, messages.append)
    uploader.upload()
    runs = runs_of(uri, config)
    parent, stage = (runs[name].info.run_id for name in (config.name, "vision"))
    experiment = runs["vision"].info.experiment_id
    kind, deleted = {"stage": ("run", stage), "run": ("run", parent), "experiment": (what, experiment)}[what]
    getattr(client, f"delete_{kind}")(deleted)
    record_steps(tracker, range(10, 20))
    tracker.end_stage()
    tracker.tag("after", "deletion")  # on the parent run
    for _ in range(2):
        uploader = uploader_of(config, uri, messages.append) if fresh else uploader
        with pytest.raises(ServerUnavailable, match="is deleted: restore it"):
            uploader.upload()
    assert (pending_bytes(folder, uri) > 0, messages) == (True, [])
    getattr(client, f"restore_{kind}")(deleted)
    tracker.close()
    uploader_of(config, uri).upload()
    runs = runs_of(uri, config)
    assert {run.info.run_id for run in runs.values()} == {parent, stage}, "no run was created a second time"
    assert (points(uri, runs["vision"]), runs[config.name].data.tags["after"]) == (losses(range(20)), "deletion")
    assert pending_bytes(folder, uri) == 0


@pytest.mark.parametrize("is_node_lost", [False, True])
def test_metrics_after_a_rollback_replace_earlier_ones(tmp_path, uri, uploader_of, is_node_lost):
    """Metrics that are no longer valid may be on the server already, which has more than the remaining journal."""
    config = config_of(tmp_path, f"rollback-{is_node_lost}", uri=uri)
    tracker = tracked(config, range(1, 31))
    if is_node_lost:
        uploader_of(config, uri).upload()
        tracker.close()
        (journal_folder(config.folder) / RESTORED).touch()
        tracker = tracked(config, range(0))
    tracker.rewind(10)
    for step in range(11, 31):
        tracker.metrics(step, {"train/loss": 2.0})
    tracker.log_checkpoints([checkpoint(config, 20)])
    tracker.close()
    uploader_of(config, uri).upload()
    vision = runs_of(uri, config)["vision"]
    assert points(uri, vision)[-20:] == [(step, 2.0) for step in range(11, 31)]
    assert vision.data.metrics["train/loss"] == 2.0
    condition = f"tags.`mome.url` = '{checkpoint(config, 20).url}'"
    (model,) = MlflowClient(uri).search_logged_models([vision.info.experiment_id], condition)
    assert [metric.value for metric in model.metrics if metric.key == "train/loss"] == [2.0]


REPORT = b"<p>recorded while the server was away</p>"


def train_through_outage(config: RunConfig, server: Server, seconds: float) -> Run:
    """Record steps while the server is killed for `seconds`; return the stage's run, in which nothing is missing."""
    tracker, steps, slowest = tracked(config, range(0)), 0, 0.0

    def train(seconds: float) -> None:
        nonlocal steps, slowest
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            tracker.metrics(steps, {"train/loss": 1 / (steps + 1), "train/lr": steps / 3, "nan": math.nan})
            slowest, steps = max(slowest, time.perf_counter() - began), steps + 1
            time.sleep(0.01)

    while not (run := runs_of(server.uri, config).get("vision")) or not points(server.uri, run):
        train(1)
    server.kill()
    train(seconds / 2)
    tracker.log_checkpoints([checkpoint(config, 50)])
    tracker.artifact("report.html", REPORT)
    train(seconds / 2)
    server.start()
    train(1)
    tracker.log_weights(weights(config, 0))
    finish(tracker, 120 + seconds)
    assert slowest < 0.5 * seconds, "a call waited for the server"
    runs = runs_of(server.uri, config)
    assert {name: run.info.status for name, run in runs.items()} == {"run": "FINISHED", "vision": "FINISHED"}
    run = runs["vision"]
    assert (points(server.uri, run), len(points(server.uri, run, "nan"))) == (losses(range(steps)), steps)
    models = MlflowClient(server.uri).search_logged_models([run.info.experiment_id])
    assert sorted(model.tags["mome.step"] for model in models) == ["100", "50"]
    return run


def test_outage_delays_no_step_and_loses_no_metric(tmp_path, server):
    train_through_outage(config_of(tmp_path, uri=server.uri), server, 3.0)
    assert [path.read_bytes() for path in server.folder.rglob("report.html")] == [REPORT]


def test_run_without_server_is_uploaded_later(tmp_path, server):
    config = config_of(tmp_path, "offline", uri="http://127.0.0.1:1")
    finish(tracked(config, range(50)), 0)
    with pytest.raises(TrackingError, match="is unavailable"):
        sync(config.folder, caller=Caller.of(config))
    with pytest.raises(TrackingError, match="no tracking journal"):
        sync(str(tmp_path / "nothing"))
    assert sync(config.folder, caller=Caller(tracking_uri=server.uri))["points"] == 100
    runs = runs_of(server.uri, config)
    assert {name: run.info.status for name, run in runs.items()} == {"offline": "FINISHED", "vision": "FINISHED"}
    assert points(server.uri, runs["vision"]) == losses(range(50))


@pytest.mark.slow
@pytest.mark.timeout(900 + OUTAGE_SECONDS)
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_outage_on_postgres_and_s3_loses_no_metric(s3, tmp_path):
    """Only the server has the credentials of the store and the database; the run has one URL."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    postgres = Postgres()
    environment = {**s3.environment, "MLFLOW_S3_ENDPOINT_URL": s3.endpoint}
    with closing(postgres), Server(tmp_path, postgres.uri, s3.url("artifacts"), environment) as server:
        run = train_through_outage(config_of(tmp_path / "runs", uri=server.uri), server, OUTAGE_SECONDS)
        folder = s3.url("artifacts", run.info.experiment_id, run.info.run_id, "artifacts")
        assert Storage(s3.config).read(f"{folder}/report.html") == REPORT


@pytest.mark.slow
def test_server_with_login_needs_the_environment_variables(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="mlflow's login needs the package Flask-WTF")
    with Server(tmp_path, login=True) as server:
        config = config_of(tmp_path / "runs", uri=server.uri)
        folder = journal_folder(config.folder)
        finish(tracked(config, range(50)), 5)
        assert (folder / "uploader.log").exists()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert MlflowClient(server.uri).get_experiment_by_name("vlmo") is None
        assert (sync(config.folder, caller=Caller.of(config))["points"], len(runs_of(server.uri, config))) == (100, 2)
    assert not any(PASSWORD.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
