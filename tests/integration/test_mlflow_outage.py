"""A run in MLflow: one parent, one child per stage, every metric once, through crashes and outages (C6)."""

from __future__ import annotations

import math
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs.caller import Caller
from jobs.tracking import sync
from pipeline.config.errors import TrackingError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder
from pipeline.tracking.tracker import Tracker
from tests.support.mlflow_server import Server
from tests.support.tracked_run import PHOTOS, checkpoint, config_of, record, weights


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an SQLite store shared by this module, because creating one takes seconds."""
    return tmp_path_factory.mktemp("sqlite") / "mlflow.db"


def rows(database: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query, values).fetchall()


def runs_of(database: Path, config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return name -> (MLflow run id, status) of the parent and its children."""
    (run,) = {record["run"] for record in Journal(journal_folder(config.folder)).run_records()}
    runs = rows(
        database,
        "select name, runs.run_uuid, status from runs join tags on tags.run_uuid = runs.run_uuid "
        "where tags.key = 'mome.run' and tags.value = ?",
        run,
    )
    assert len({name for name, _, _ in runs}) == len(runs), "a run was created twice"
    return {name: (run_id, status) for name, run_id, status in runs}


def tags_of(database: Path, run_id: str) -> dict[str, str]:
    return dict(rows(database, "select key, value from tags where run_uuid = ?", run_id))  # type: ignore[arg-type]


def points_of(database: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) in the order in which the server received them."""
    query = "select step, value from metrics where run_uuid = ? and key = ? order by rowid"
    return rows(database, query, run_id, key)  # type: ignore[return-value]


def content(database: Path) -> list[list[tuple[Any, ...]]]:
    """Return all rows that a repeated upload could duplicate, with run statuses and times."""
    tables = ("runs", "metrics", "latest_metrics", "params", "tags", "datasets", "inputs")
    tables += ("logged_models", "logged_model_metrics", "logged_model_params", "logged_model_tags")
    return [sorted(rows(database, f"select * from {table}"), key=repr) for table in tables]


def test_restarted_run_is_one_parent_with_a_child_per_stage(tmp_path: Path, database: Path) -> None:
    config = config_of(tmp_path, f"sqlite:///{database}")
    first = Tracker.open(config, Storage(), {"attempt": "1"})
    record(first, config, 0, range(0, 60))
    first.abandon()
    second = Tracker.open(config, Storage(), {"attempt": "2"})
    record(second, config, 0, range(40, 100))
    second.end_stage()
    record(second, config, 1, range(100, 130))
    second.abandon()
    third = Tracker.open(config, Storage(), {"attempt": "3"})
    record(third, config, 1, range(120, 200))
    third.artifact("report/index.html", b"<p>good</p>")
    third.end_stage()
    third.metrics(200, {"eval/r1": 0.25})
    third.finish()
    third.close(timeout=60)

    runs = runs_of(database, config)

    assert {name: status for name, (_, status) in runs.items()} == dict.fromkeys(
        ("run", "vision", "second"), "FINISHED"
    )
    parent, vision, second_stage = (runs[name][0] for name in ("run", "vision", "second"))
    assert points_of(database, vision, "train/loss") == [(step, 1 / (step + 1)) for step in range(100)]
    assert points_of(database, second_stage, "train/lr") == [(step, step / 3) for step in range(100, 200)]
    assert points_of(database, parent, "eval/r1") == [(200, 0.25)]
    assert tags_of(database, vision)["mlflow.parentRunId"] == parent
    assert tags_of(database, vision)["mome.restarts"] == "1"
    assert tags_of(database, vision)["mome.resumed_at_step"] == "40"
    assert tags_of(database, parent)["attempt"] == "3"
    assert tags_of(database, parent)["mome.restarts"] == "2"
    artifacts = database.parent / "mlartifacts" / "vlmo"
    assert (artifacts / second_stage / "artifacts" / "report" / "index.html").read_bytes() == b"<p>good</p>"
    assert (artifacts / parent / "artifacts" / "config.yaml").exists()
    digests = "select count(*) from datasets join inputs on source_id = dataset_uuid where digest = ?"
    assert rows(database, digests, PHOTOS.digest[:36]) == [(3,)]


def test_repeated_upload_without_cursor_changes_nothing(tmp_path: Path, database: Path) -> None:
    config = config_of(tmp_path, f"sqlite:///{database}")
    tracker = Tracker.open(config, Storage())
    record(tracker, config, 0, range(1500))  # more than one batch
    tracker.metrics(1500, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    tracker.end_stage()
    tracker.finish()
    tracker.close(timeout=0)
    shipped = sync(config.folder, caller=Caller.of(config))
    before = content(database)

    for cursor in journal_folder(config.folder).glob("cursor-*"):
        cursor.unlink()
    again = sync(config.folder, caller=Caller.of(config))

    assert content(database) == before
    assert shipped["points"] == again["points"] == 3003
    assert sync(config.folder, caller=Caller.of(config))["points"] == 0
    (run_id, _) = runs_of(database, config)["vision"]
    assert points_of(database, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(1500)]
    assert len(rows(database, "select * from metrics where run_uuid = ? and key in ('nan', 'up', 'down')", run_id)) == 3


def test_metric_uploaded_before_a_node_loss_is_not_repeated(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("memory://bucket/lost-node", f"sqlite:///{database}")
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "first-node"))
    first = Tracker.open(config, Storage())
    record(first, config, 0, range(0, 60))
    first.commit(60)
    for step in range(60, 80):
        first.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": step / 3})
    first.abandon()
    sync(
        str(journal_folder(config.folder).parent), caller=Caller.of(config)
    )  # as its shipper would have, a moment before the loss

    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "second-node"))
    second = Tracker.open(config, Storage())
    record(second, config, 0, range(60, 100))
    second.end_stage()
    second.finish()
    second.close(timeout=60)

    (run_id, status) = runs_of(database, config)["vision"]
    assert status == "FINISHED"
    assert points_of(database, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(100)]
    Storage().delete(config.folder)


def test_journal_of_a_killed_trainer_is_uploaded(tmp_path: Path, database: Path) -> None:
    config = config_of(tmp_path, f"sqlite:///{database}", name="killed")
    program = (
        "import os, signal, sys, time\n"
        "from pipeline.config.schema import RunConfig\n"
        "from pipeline.data.storage import Storage\n"
        "from pipeline.tracking.tracker import Tracker\n"
        "config = RunConfig.model_validate_json(sys.stdin.read())\n"
        "tracker = Tracker.open(config, Storage())\n"
        "tracker.begin_stage(0, config.stages[0], {}, [])\n"
        "for step in range(2000): tracker.metrics(step, {'train/loss': 1 / (step + 1)})\n"
        "while tracker._uploader._process is None: time.sleep(0.01)\n"
        "print(tracker._uploader._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], input=config.model_dump_json(), capture_output=True, text=True, check=False
    )
    deadline = time.monotonic() + 40
    while is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)

    assert done.returncode == -signal.SIGKILL
    assert not is_running(int(done.stdout))
    (run_id, status) = runs_of(database, config)["vision"]
    assert status == "RUNNING", "whether it will be resumed is not known"
    assert points_of(database, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(2000)]


def is_running(process: int) -> bool:
    """Return True while the process runs; False once it is a zombie or gone."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_outage_delays_no_step_and_loses_no_metric(tmp_path: Path, server: Server) -> None:
    config = config_of(tmp_path, server.uri)
    tracker = Tracker.open(config, Storage(), {"world_size": "2"})
    tracker.begin_stage(0, config.stages[0], {}, [PHOTOS])
    slowest = 0.0

    def train(first: int, last: int) -> None:
        nonlocal slowest
        for step in range(first, last):
            start = time.perf_counter()
            tracker.metrics(step, {"train/loss": 1 / (step + 1), "nan": math.nan})
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.005)

    train(0, 300)
    deadline = time.monotonic() + 30
    while not rows_if_there(server.database, "select * from metrics") and time.monotonic() < deadline:
        time.sleep(0.1)
    train(300, 400)
    server.kill()
    train(400, 1000)  # three seconds without a server
    server.start()
    train(1000, 1200)
    tracker.artifact("report.html", b"<p>after the outage</p>")
    tracker.end_stage()
    tracker.finish()
    tracker.close(timeout=60)

    runs = runs_of(server.database, config)
    assert {name: status for name, (_, status) in runs.items()} == {"run": "FINISHED", "vision": "FINISHED"}
    assert points_of(server.database, runs["vision"][0], "train/loss") == [(s, 1 / (s + 1)) for s in range(1200)]
    assert len(points_of(server.database, runs["vision"][0], "nan")) == 1200
    assert [path.read_bytes() for path in server.folder.rglob("report.html")] == [b"<p>after the outage</p>"]
    assert slowest < 2  # no call waited for the server, which was away for three seconds


def test_run_without_server_is_uploaded_later(tmp_path: Path, server: Server) -> None:
    config = config_of(tmp_path, "http://127.0.0.1:1", name="offline")
    tracker = Tracker.open(config, Storage())
    record(tracker, config, 0, range(50))
    tracker.end_stage()
    tracker.finish()
    tracker.close(timeout=0)

    with pytest.raises(TrackingError, match="is unavailable"):
        sync(config.folder, caller=Caller.of(config))
    assert sync(config.folder, caller=Caller(tracking_uri=server.uri))["points"] == 100

    (run_id, status) = runs_of(server.database, config)["vision"]
    assert status == "FINISHED"
    assert points_of(server.database, run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(50)]


def test_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no tracking journal"):
        sync(str(tmp_path / "nothing"))


def rows_if_there(database: Path, query: str) -> list[tuple[Any, ...]]:
    try:
        return rows(database, query)
    except sqlite3.OperationalError:
        return []


def test_kept_checkpoints_are_logged_models_with_metrics(tmp_path: Path, database: Path) -> None:
    config = config_of(tmp_path, f"sqlite:///{database}", name="kept.models")
    first = Tracker.open(config, Storage())
    record(first, config, 0, range(1, 91))
    first.log_checkpoints([checkpoint(config, 30), checkpoint(config, 60)])
    first.metrics(60, {"eval/unseen/r1": 0.2})  # of an existing checkpoint
    first.abandon()
    second = Tracker.open(config, Storage())
    record(second, config, 0, range(61, 101))
    second.metrics(90, {"eval/unseen/r1": 0.5})  # of a checkpoint that is being written
    second.log_checkpoints([checkpoint(config, 60), checkpoint(config, 90)])
    second.log_weights(weights(config, 0))
    second.end_stage()
    record(second, config, 1, range(101, 201))
    second.log_weights(weights(config, 1))
    second.end_stage()
    second.metrics(200, {"eval/unseen/r1": 0.75})  # of the last stage, after the run
    second.finish()
    second.close(timeout=60)
    before = content(database)
    for cursor in journal_folder(config.folder).glob("cursor-*"):
        cursor.unlink()
    sync(config.folder, caller=Caller.of(config))

    assert content(database) == before
    client = MlflowClient(f"sqlite:///{database}")
    runs = {name: client.get_run(run_id) for name, (run_id, _) in runs_of(database, config).items()}
    (run,) = {item.data.tags["mome.run"] for item in runs.values()}
    models = client.search_logged_models(
        [runs[config.name].info.experiment_id],
        filter_string=f"tags.`mome.run` = '{run}'",
        order_by=[{"field_name": "metrics.eval/unseen/r1", "ascending": False}],
    )
    results = [
        (model.params["step"], model.source_run_id, {metric.key: metric.value for metric in model.metrics})
        for model in models
    ]
    vision, second_stage = (runs[name].info.run_id for name in ("vision", "second"))
    assert results == [
        ("200", second_stage, {"train/loss": 1 / 201, "train/lr": 200 / 3, "eval/unseen/r1": 0.75}),
        ("90", vision, {"train/loss": 1 / 91, "train/lr": 90 / 3, "eval/unseen/r1": 0.5}),
        ("60", vision, {"train/loss": 1 / 61, "train/lr": 60 / 3, "eval/unseen/r1": 0.2}),
        ("100", vision, {"train/loss": 1 / 101, "train/lr": 100 / 3}),
    ]
    assert [model.tags["mome.url"] for model in models][-1] == weights(config, 0).url
    handed_over = models[-1].model_id
    assert [item.model_id for item in runs["vision"].outputs.model_outputs] == [handed_over]
    assert [item.model_id for item in runs["second"].inputs.model_inputs] == [handed_over]
    assert runs["second"].data.tags["start_from.run_id"] == vision
    assert points_of(database, vision, "train/loss") == [(step, 1 / (step + 1)) for step in range(1, 101)]
    assert runs[config.name].data.tags["mlflow.note.content"].startswith("**kept.models**: vlmo, 200 steps")
