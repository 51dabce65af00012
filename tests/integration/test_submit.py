"""Jobs over Ray's HTTP API on two nodes that require a token run with it and are rejected without it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.dashboard import find_token, is_loopback, open_dashboard
from pipeline.config.errors import ConfigError, RunFailed
from tests.support.ray_nodes import Cluster, raylets
from tests.support.train_process import ROOT, STAGES, TrainProcess

STEPS = 6


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
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env={**known, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "300", **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_job_on_two_nodes_requires_the_token(cluster: Cluster, token_file: Path, tmp_path: Path) -> None:
    keys = ["cluster.workers=2", "cluster.placement=spread"]
    run = TrainProcess(tmp_path, "submitted", STEPS, *keys)
    at = ["--address", cluster.dashboard]
    secret = f"file:{token_file}"

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
    experiments = [each.experiment_id for each in client.search_experiments()]
    (parent,) = client.search_runs(experiments, filter_string="tags.`mome.role` = 'run'")
    assert parent.data.tags["ray.submission_id"] == job

    unpacked = [list(each.glob("runtime_resources/working_dir_files/*/jobs")) for each in cluster.sessions()]
    assert [len(found) for found in unpacked] == [1, 1], "one node's code of the job is another's: it may vanish"

    listed = mome("jobs", "list", *at, "--token", secret, "--json", home=tmp_path)
    jobs = json.loads(listed.stdout.splitlines()[-1])["jobs"]
    assert [(each["job"], each["run"], each["status"]) for each in jobs] == [(job, "submitted", "SUCCEEDED")]
    told = mome("jobs", "status", job, *at, "--token", secret, "--json", home=tmp_path)
    assert json.loads(told.stdout)["progress"]["step"] == len(STAGES) * STEPS
    unknown = mome("jobs", "status", "nobody", *at, "--token", secret, home=tmp_path)
    assert unknown.returncode == 2
    assert "mome jobs list" in unknown.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
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


class _Open(BaseHTTPRequestHandler):
    """Dashboard that requires no token and records its requests."""

    seen: list[tuple[str, str, str | None]] = []  # noqa: RUF012 - shared by the requests of a test

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def open_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    monkeypatch.setattr(_Open, "seen", [])
    with HTTPServer(("0.0.0.0", 0), _Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def own_address() -> str | None:
    """Return an address of this machine that is not loopback, or None."""

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends no packet, but selects the source address
        except OSError:
            return None
        return str(probe.getsockname()[0])


def test_dashboard_without_authentication_is_rejected_first(
    open_server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = own_address()
    if address is None or is_loopback(address):
        pytest.skip("this machine has no address but loopback")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    with pytest.raises(ConfigError, match="lets anyone run code") as error:
        open_dashboard(f"http://{address}:{open_server.server_port}")
    assert error.value.exit_status == 2
    assert _Open.seen == [("GET", "/api/jobs/", None)], "more than the question was sent, or the token with it"


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "http://127.0.0.1:8265", "http://[::1]:8265"])
def test_loopback_addresses_are_recognised(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1", "head", "http://head:8265", "http://127.0.0.1.evil.com:8265"])
def test_other_addresses_are_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_token_must_be_given_by_reference() -> None:
    with pytest.raises(ConfigError, match="env:NAME or file:PATH"):
        find_token("the-token-itself")


def test_unreachable_dashboard_is_one_message() -> None:
    with pytest.raises(RunFailed, match="no Ray dashboard answers"):
        open_dashboard("http://127.0.0.1:9")
