"""A run's driver on a Ray cluster: jobs need the cluster's token, and a stopped driver saves and resumes."""

import json
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.ray_nodes import raylets
from tests.support.train_process import STAGES, TrainProcess, run_module, wait_until

STEPS = 6


def mome(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without any token except those in `environment`."""
    return run_module("jobs.cli", *arguments, HOME=str(home), COLUMNS="300", **environment)


def result_of(*arguments: str, home: Path, **environment: str) -> dict[str, Any]:
    done = mome(*arguments, "--json", home=home, **environment)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_jobs_on_two_nodes_require_the_token_and_are_resubmitted_under_a_new_id(tmp_path: Path) -> None:
    (token_file := tmp_path / "token").write_text(secret := secrets.token_hex(32), encoding="utf-8")
    with raylets([1, 1], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}, dashboard=True) as cluster:
        run = TrainProcess(tmp_path, "submitted", STEPS, "cluster.workers=2", "cluster.placement=spread")
        submit, at = ["submit", *run.arguments], ["--address", cluster.dashboard]
        reach = [*at, "--token", f"file:{token_file}"]
        reasons = {(): "asks for a token, and none is known here", ("--token", "env:X"): "does not accept the token"}
        for token, reason in reasons.items():
            refused = mome(*submit, *at, *token, home=tmp_path, X="guessed")
            assert (refused.returncode, reason in refused.stderr) == (1, True), refused.stderr

        job = result_of(*submit, *reach, "--no-follow", home=tmp_path)["job"]
        followed = result_of(*submit, *at, "--token", "env:TOKEN", home=tmp_path, TOKEN=secret)
        assert (followed["job"], followed["status"]) == (job, "SUCCEEDED")
        assert f"vision_language {STEPS}/{STEPS}" in followed["stderr"], "progress was not streamed"
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
        assert (unknown.returncode, "mome jobs list" in unknown.stderr) == (2, True), unknown.stderr

        arguments = TrainProcess(tmp_path, "stopped", 300, "cluster.workers=2").arguments
        for suffix in ("", "-2"):  # a stopped job is submitted again under a new id
            stopped = result_of("submit", *arguments, *reach, "--no-follow", home=tmp_path)["job"]
            job = job if suffix else stopped
            assert stopped == job + suffix
            assert result_of("jobs", "stop", stopped, *reach, home=tmp_path)["status"] == "STOPPED"


@pytest.mark.slow
def test_stopped_driver_saves_and_resumes_without_losing_a_step(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "run", 60, "checkpoint.every=1000").start()
    try:
        run.wait_for(lambda: run.step() >= 3, "the first steps")
        run.process.send_signal(signal.SIGTERM)
        assert run.status() == 75, run.log_text()
        (saved,) = run.saved_steps()
        assert f"stopped (SIGTERM): checkpoint at step {saved}; re-run the same command to resume" in run.log_text()
        assert run.step() == saved, "a step was made after the one that was saved"
        assert "***" not in run.log_text(), "a C++ stack"

        run.start()  # the second signal arrives while Ray starts
        time.sleep(15)
        run.process.send_signal(signal.SIGINT)
        assert run.status() == 130, run.log_text()
        wait_until(lambda: "stopped (SIGINT)" in run.log_text(), "the last word", 5)
        assert f"stopped (SIGINT): checkpoint at step {saved}; re-run" in run.log_text()
        assert "Traceback" not in run.log_text()
    finally:
        run.kill()


@pytest.mark.slow
def test_missing_gpus_are_awaited(tmp_path: Path) -> None:
    with raylets([1, 1]) as cluster:
        keys = [f"cluster.address={cluster.address}", "cluster.gpus_per_worker=1", "cluster.start_seconds=5"]
        run = TrainProcess(tmp_path, "there", 1, *keys, environment=cluster.environment).start()
        assert run.status() == 1
        assert "waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster" in run.log_text()
        assert "this cluster has 0" in run.log_text().splitlines()[-1]
