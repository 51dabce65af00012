"""Jobs over Ray's HTTP API on two nodes that require a token run with it and are rejected without it."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.ray_nodes import raylets
from tests.support.train_process import ROOT, STAGES, TrainProcess

STEPS = 6


def mome(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without any token except those in `environment`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**known, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "300", **environment}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def result_of(*arguments: str, home: Path, **environment: str) -> dict[str, Any]:
    done = mome(*arguments, "--json", home=home, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_jobs_on_two_nodes_require_the_token_and_are_resubmitted_under_a_new_id(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(secrets.token_hex(32), encoding="utf-8")
    with raylets([1, 1], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}, dashboard=True) as cluster:
        run = TrainProcess(tmp_path, "submitted", STEPS, "cluster.workers=2", "cluster.placement=spread")
        submit, at = ["submit", *run.arguments], ["--address", cluster.dashboard]
        reach = [*at, "--token", f"file:{token_file}"]
        for token, reason in (
            ([], "asks for a token, and none is known here"),
            (["--token", "env:WRONG"], "does not accept the token"),
        ):
            refused = mome(*submit, *at, *token, home=tmp_path, WRONG="guessed")
            assert refused.returncode == 1
            assert reason in refused.stderr

        job = result_of(*submit, *reach, "--no-follow", home=tmp_path)["job"]
        token = token_file.read_text(encoding="utf-8")
        followed = mome(*submit, *at, "--token", "env:TOKEN", "--json", home=tmp_path, TOKEN=token)
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
        copies = [len(folders) for folders in unpacked if folders]  # none in the session of a start that was repeated
        assert copies == [1, 1], "one node's code of the job is another's: it may vanish"

        jobs = result_of("jobs", "list", *reach, home=tmp_path)["jobs"]
        assert [(row["job"], row["run"], row["status"]) for row in jobs] == [(job, "submitted", "SUCCEEDED")]
        assert result_of("jobs", "status", job, *reach, home=tmp_path)["progress"]["step"] == len(STAGES) * STEPS
        unknown = mome("jobs", "status", "nobody", *reach, home=tmp_path)
        assert unknown.returncode == 2
        assert "mome jobs list" in unknown.stderr

        arguments = TrainProcess(tmp_path, "stopped", 300, "cluster.workers=2").arguments
        job = result_of("submit", *arguments, *reach, "--no-follow", home=tmp_path)["job"]
        for stopped in (job, f"{job}-2"):  # a stopped job is submitted again under a new id
            assert result_of("jobs", "stop", stopped, *reach, home=tmp_path) == {"job": stopped, "status": "STOPPED"}
            if stopped == job:
                again = result_of("submit", *arguments, *reach, "--no-follow", home=tmp_path)
                assert again["job"] == f"{job}-2"
