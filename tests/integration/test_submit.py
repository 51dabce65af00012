"""Jobs over Ray's HTTP API on two nodes that require a token run with it and are rejected without it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.ray_nodes import Cluster, raylets
from tests.support.train_process import ROOT, STAGES, TrainProcess

STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "token"
    file.write_text(secrets.token_hex(32), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def cluster(token_file: Path) -> Iterator[Cluster]:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    with raylets([1, 1], environment, dashboard=True) as running:
        yield running


def mome(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without any token except those in `environment`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**known, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "300", **environment}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_job_on_two_nodes_requires_the_token(cluster: Cluster, token_file: Path, tmp_path: Path) -> None:
    keys = ["cluster.workers=2", "cluster.placement=spread"]
    run = TrainProcess(tmp_path, "submitted", STEPS, *keys)
    at, secret = ["--address", cluster.dashboard], f"file:{token_file}"

    refused = mome("submit", *run.arguments, *at, home=tmp_path)
    assert refused.returncode == 1
    assert "asks for a token, and none is known here" in refused.stderr
    refused = mome("submit", *run.arguments, *at, "--token", "env:WRONG", home=tmp_path, WRONG="guessed")
    assert refused.returncode == 1
    assert "does not accept the token" in refused.stderr

    command = ["submit", *run.arguments, *at, "--json", "--token"]
    submitted = mome(*command, secret, "--no-follow", home=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])["job"]
    followed = mome(*command, "env:TOKEN", home=tmp_path, TOKEN=token_file.read_text(encoding="utf-8"))
    assert followed.returncode == 0, followed.stderr
    result = json.loads(followed.stdout.splitlines()[-1])
    assert (result["job"], result["status"]) == (job, "SUCCEEDED")
    assert f"vision_language {STEPS}/{STEPS}" in followed.stderr, "progress was not streamed"
    assert len(run.losses()) == len(STAGES) * STEPS
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, filter_string="tags.`mome.role` = 'run'")
    assert parent.data.tags["ray.submission_id"] == job

    unpacked = [list(session.glob("runtime_resources/working_dir_files/*/jobs")) for session in cluster.sessions()]
    assert [len(folders) for folders in unpacked] == [1, 1], "one node's code of the job is another's: it may vanish"

    listed = mome("jobs", "list", *at, "--token", secret, "--json", home=tmp_path)
    jobs = json.loads(listed.stdout.splitlines()[-1])["jobs"]
    assert [(row["job"], row["run"], row["status"]) for row in jobs] == [(job, "submitted", "SUCCEEDED")]
    status = mome("jobs", "status", job, *at, "--token", secret, "--json", home=tmp_path)
    assert json.loads(status.stdout)["progress"]["step"] == len(STAGES) * STEPS
    unknown = mome("jobs", "status", "nobody", *at, "--token", secret, home=tmp_path)
    assert unknown.returncode == 2
    assert "mome jobs list" in unknown.stderr


def test_stopped_job_is_resubmitted_under_a_new_id(cluster: Cluster, token_file: Path, tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "stopped", 300, "cluster.workers=2")
    reach = ["--address", cluster.dashboard, "--token", f"file:{token_file}", "--json"]
    first = mome("submit", *run.arguments, *reach, "--no-follow", home=tmp_path)
    job = json.loads(first.stdout.splitlines()[-1])["job"]
    stopped = mome("jobs", "stop", job, *reach, home=tmp_path)
    assert json.loads(stopped.stdout.splitlines()[-1]) == {"job": job, "status": "STOPPED"}
    again = mome("submit", *run.arguments, *reach, "--no-follow", home=tmp_path)
    assert json.loads(again.stdout.splitlines()[-1])["job"] == f"{job}-2"
    assert mome("jobs", "stop", f"{job}-2", *reach, home=tmp_path).returncode == 0
