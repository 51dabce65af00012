"""MLflow as clusters run it: a server on PostgreSQL, artifacts in an S3 store, and a login.

The outage lasts seconds; MOME_OUTAGE_SECONDS=600 makes it ten minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs.caller import Caller
from jobs.tracking import sync
from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder
from pipeline.tracking.tracker import Tracker
from tests.support.mlflow_server import ADMIN, PASSWORD, Server
from tests.support.postgres import USER, Postgres
from tests.support.stores import S3
from tests.support.tracked_run import PHOTOS, checkpoint, config_of, record, weights

OUTAGE_SECONDS = float(os.environ.get("MOME_OUTAGE_SECONDS", "4"))
STEP_SECONDS = 0.01
KEYS = ("train/loss", "train/lr", "samples_seen")
Point = tuple[Any, ...]  # step, value, milliseconds


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    postgres = Postgres()
    yield postgres.start()
    postgres.stop()


def rows(postgres: Postgres, query: str, *values: Any) -> list[tuple[Any, ...]]:
    import psycopg2

    connection = psycopg2.connect(host="127.0.0.1", port=postgres.port, user=USER, dbname="postgres")
    try:
        with connection.cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchall()
    finally:
        connection.close()


def journaled(folder: str, stage: int) -> dict[str, list[Point]]:
    """Return a stage's metrics by key, as the journal has them."""
    records = Journal(journal_folder(folder)).all_records()
    mine = (record for record in records if record["kind"] == "metrics" and record["stage"] == stage)
    return _by_key((key, r["step"], float(value), r["at"]) for r in mine for key, value in r["values"].items())


def stored(postgres: Postgres, run_id: str) -> dict[str, list[Point]]:
    """Return a run's metrics in MLflow's order; PostgreSQL guarantees no order of rows."""
    query = "select key, step, value, timestamp from metrics where run_uuid = %s order by timestamp, step"
    return _by_key(rows(postgres, query, run_id))


def _by_key(points: Iterable[tuple[Any, ...]]) -> dict[str, list[Point]]:
    metrics: dict[str, list[Point]] = {}
    for key, *point in points:
        metrics.setdefault(key, []).append(tuple(point))
    return metrics


@pytest.mark.slow
@pytest.mark.timeout(900 + OUTAGE_SECONDS)
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_outage_of_the_server_loses_and_repeats_no_metric(postgres: Postgres, s3: S3, tmp_path: Path) -> None:
    """Only the server has the credentials of the store and the database; the run has one URL."""
    environment = {**s3.environment, "MLFLOW_S3_ENDPOINT_URL": s3.endpoint}
    server = Server(tmp_path, postgres.uri, s3.url("artifacts"), environment)
    server.start()
    config = config_of(tmp_path / "runs", server.uri)
    tracker = Tracker.open(config, Storage(), {"world_size": "1"})
    tracker.begin_stage(0, config.stages[0], {}, [PHOTOS])
    steps, slowest = 0, 0.0

    def train(seconds: float) -> None:
        nonlocal steps, slowest
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            steps += 1
            began = time.perf_counter()
            tracker.metrics(steps, dict(zip(KEYS, (1 / steps, steps / 3, 16.0 * steps), strict=True)))
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(STEP_SECONDS)

    while not rows(postgres, "select step from metrics limit 1"):
        train(1)
    server.kill()
    train(OUTAGE_SECONDS / 2)
    tracker.log_checkpoints([checkpoint(config, 50)])
    tracker.artifact("report.html", b"<p>recorded while the server was away</p>")
    train(OUTAGE_SECONDS / 2)
    server.start()
    train(2)
    tracker.log_weights(weights(config, 0))
    tracker.end_stage()
    tracker.finish()
    tracker.close(timeout=120 + OUTAGE_SECONDS)
    try:
        client = MlflowClient(server.uri)
        (experiment,) = (record.experiment_id for record in client.search_experiments() if record.name == "vlmo")
        query = f"dataset.digest = '{PHOTOS.digest[:36]}' and tags.`mome.role` = 'stage'"
        (run,) = client.search_runs([experiment], filter_string=query)
        shipped = stored(postgres, run.info.run_id)
        assert run.info.status == "FINISHED"
        assert shipped == journaled(config.folder, 0)
        assert {key: len(points) for key, points in shipped.items()} == dict.fromkeys(KEYS, steps)
        assert slowest < 0.5 * OUTAGE_SECONDS, "no step waited for the server"
        models = client.search_logged_models([experiment])
        assert sorted(model.tags["mome.step"] for model in models) == ["100", "50"]
        storage, folder = Storage(s3.config), s3.url("artifacts", experiment, run.info.run_id, "artifacts")
        assert storage.read(f"{folder}/report.html") == b"<p>recorded while the server was away</p>"
        print(
            f"{steps} steps, {len(KEYS) * steps} points, away for {OUTAGE_SECONDS:.0f} s, slowest call {slowest:.4f} s"
        )
    finally:
        server.kill()


@pytest.mark.slow
def test_server_with_login_needs_the_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flask_wtf", reason="mlflow's login needs the package Flask-WTF")
    server = Server(tmp_path, login=True)
    server.start()
    config = config_of(tmp_path / "runs", server.uri)
    try:
        tracker = Tracker.open(config, Storage())
        record(tracker, config, 0, range(50))
        tracker.finish()
        tracker.close(timeout=5)
        assert journal_folder(config.folder).joinpath("uploader.log").exists()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        client = MlflowClient(server.uri)
        assert client.get_experiment_by_name("vlmo") is None
        assert sync(config.folder, caller=Caller.of(config))["points"] == 100
        experiment = client.get_experiment_by_name("vlmo")
        assert experiment is not None
        assert len(client.search_runs([experiment.experiment_id])) == 2
    finally:
        server.kill()
    folder = journal_folder(config.folder)
    assert not any(PASSWORD.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
