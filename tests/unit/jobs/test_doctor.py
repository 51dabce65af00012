"""`mome doctor`: each check fails when it must and names a remedy; nothing optional makes a check fail."""

from __future__ import annotations

import http.server
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jobs import doctor
from jobs.cli import app
from jobs.doctor import machine, services
from jobs.doctor.machine import Diagnosis, failed, passed, skipped
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import ensure_indexed
from pipeline.data.storage import Storage
from tests.support.http_server import give, serving
from tests.support.ray_nodes import free_ports, raylets

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
NO_ADDRESS = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "AWS_ENDPOINT_URL")
Serve = Callable[..., str]
PATIENCE = 300.0  # includes starting Ray on a busy machine


@pytest.fixture(autouse=True)
def no_cluster_or_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_ADDRESS:
        monkeypatch.delenv(name, raising=False)


def demo(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(DEMO, [f"output={tmp_path}/runs", *overrides])


def failing(result: Diagnosis, *expected: str) -> bool:
    """Return True if the check failed with all of `expected` in its detail and has a remedy."""
    return result.status == "failed" and all(text in result.detail for text in expected) and bool(result.remedy)


# ---- the machine


TORCH = torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("requirement", "tested", "status", "expected"),
    [
        ("numpy>=99.1", "", "failed", "is older than 99.1"),
        ("no-such-package>=1", "", "failed", "no-such-package is missing"),
        ("numpy>=2.0", "numpy==2.0.1", "passed", "(tested: 2.0.1)"),
        ("torch>=2.8", f"torch=={TORCH}.0", "passed", "all as tested"),  # builds are equal
    ],
)
def test_packages_are_compared_with_required_and_tested_versions(
    requirement: str, tested: str, status: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "constraints.txt").write_text(f"# tested\n{tested}\n")
    result = machine.packages(["pydantic>=2.10", requirement], tmp_path / "constraints.txt")
    assert (result.status, bool(result.remedy)) == (status, status == "failed")
    assert expected in result.detail


def test_requirements_come_from_the_package_metadata() -> None:
    result = machine.packages()
    assert result.status == "passed"
    assert int(re.search(r"(\d+) packages", result.detail)[1]) > 15  # type: ignore[index]


def test_full_and_impossible_folders_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert machine.disk("output disk", tmp_path / "runs" / "demo", needed=1).status == "passed"
    assert failing(machine.disk("output disk", tmp_path / "runs" / "demo", needed=2**60), "free")
    assert failing(machine.disk("output disk", tmp_path / "file" / "runs"), "is not a writable folder")
    assert machine.shared_memory(0, tmp_path).status == "passed"
    assert failing(machine.shared_memory(2**60, tmp_path), "needed")
    assert failing(machine.shared_memory(0, tmp_path / "shm"), "is missing")


def test_shared_memory_covers_loader_processes_and_nccl(tmp_path: Path) -> None:
    threads = demo(tmp_path)
    processes = demo(tmp_path, "data.loader.num_workers=2", "data.loader.prefetch_batches=3")
    batch = 64 * 3 * 48 * 48  # the examples of the largest stage as uint8 images
    assert machine.shared_memory_of(threads, accelerators=0) == 0
    assert machine.shared_memory_of(processes, accelerators=0) == 4 * batch
    assert machine.shared_memory_of(processes, accelerators=1) == machine.NCCL_BYTES + 4 * batch // 2
    assert machine.shared_memory_of(None, accelerators=8) == machine.NCCL_BYTES


@pytest.mark.parametrize(
    ("address", "warned"),
    [("10.1.2.3", False), ("127.0.0.1", False), ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("fe80::1", False)],
)
def test_a_public_rendezvous_address_is_warned_about(monkeypatch, address: str, warned: bool) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    result = machine.rendezvous()
    assert (result.status, "WARNING, a public address" in result.detail) == ("passed", warned)
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert machine.rendezvous().status == "skipped"


@contextmanager
def limited(limit: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (min(most, soft) if soft > 0 else most, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def test_low_process_limits_fail(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_NOFILE, 1024):
        assert failing(machine.open_files(), "1024 may be open")
    with limited(resource.RLIMIT_MEMLOCK, 65536):
        assert machine.locked_memory(tmp_path / "none").status == "skipped", "only InfiniBand needs it"
        (tmp_path / "mlx5_0").mkdir()
        assert failing(machine.locked_memory(tmp_path), "mlx5_0")


# ---- accelerators and collectives

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces nvidia-smi by a script."""

    def replace(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return replace


@needs_no_cuda
def test_an_accelerator_unusable_by_torch_fails(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15'")
    assert machine.driver() == ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"]
    assert failing(machine.accelerator(None, machine.driver()), "H100", "torch")


def test_a_failing_driver_sees_no_accelerator(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'\nexit 9")
    assert machine.driver() == []


@needs_no_cuda
def test_no_accelerator_fails_only_if_a_local_run_needs_one(tmp_path: Path) -> None:
    gpus = "cluster.gpus_per_worker=1"
    assert machine.accelerator(None, []).status == "skipped"
    assert machine.accelerator(demo(tmp_path), []).status == "skipped"
    assert machine.accelerator(demo(tmp_path, gpus, "cluster.address=head:6379"), []).status == "skipped"
    assert failing(machine.accelerator(demo(tmp_path, gpus), []), "cluster.gpus_per_worker")


def test_ranks_that_cannot_communicate_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.collective("NCCL").status == "skipped", "there is no accelerator"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert failing(machine.collective("gloo"), "could not sum a tensor", "nosuch0")


def test_a_hanging_check_is_killed_and_fails() -> None:
    process = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert machine.finish_probe(process, 0.1) == ("it did not finish in time and was killed", 1)
    assert process.poll() is not None


def test_operators_need_a_writable_folder_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    assert failing(machine.operators(), "cannot be written")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert failing(machine.operators(), "no C++ compiler (no-such-compiler)")


# ---- services


def output(config: RunConfig) -> Diagnosis:
    return services.output(config, services.impatient_storage(config))


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_a_usable_output_passes_and_stays_empty(s3: Any, tmp_path: Path) -> None:
    bucket = demo(tmp_path).model_copy(update={"output": s3.url("runs"), "storage": s3.config})
    assert output(demo(tmp_path)).status == output(bucket).status == "passed"
    assert list((tmp_path / "runs").iterdir()) == Storage(s3.config).list(s3.url("runs")) == []
    assert failing(output(bucket.model_copy(update={"output": "s3://no-such-bucket/runs"})), "no-such-bucket")


class Forgetful(Storage):
    """Storage that accepts writes and lists nothing."""

    def list(self, url: str) -> list[str]:
        return []


def test_an_unwritable_or_inconsistent_output_fails(tmp_path: Path) -> None:
    assert failing(services.output(demo(tmp_path / "listed"), Forgetful()), "does not list")
    (tmp_path / "runs").write_text("a file")
    assert failing(output(demo(tmp_path)), str(tmp_path))


def source(tmp_path: Path, url: str) -> Diagnosis:
    config = demo(tmp_path, f"sources.pictures.shards={url}")
    return {result.name: result for result in services.sources(config, Storage())}["source pictures"]


def test_sources_need_a_manifest_or_tars_and_all_their_shards(tmp_path: Path, make_pairs: Callable[..., str]) -> None:
    folder = make_pairs("pairs", [3, 2])
    (tmp_path / "bare").mkdir()
    assert failing(source(tmp_path, str(tmp_path / "bare")))
    assert failing(source(tmp_path, str(tmp_path / "absent")), str(tmp_path / "absent"))
    assert failing(source(tmp_path, f"{tmp_path}/{{0..1}}/a.tar"), "braces")
    assert "2 tars, not indexed yet" in source(tmp_path, folder).detail
    ensure_indexed(Storage(), folder)
    assert source(tmp_path, folder) == passed("source pictures", f"{folder}: 5 samples in 2 shards")
    (Path(folder) / "00000.tar").unlink()
    assert failing(source(tmp_path, folder), "00000.tar")


def test_a_generated_source_may_be_missing(tmp_path: Path) -> None:
    config = load_config(DEMO, [f"sources.scenes.shards={tmp_path}/scenes", f"sources.unseen.shards={tmp_path}/unseen"])
    results = {result.name: result for result in services.sources(config, Storage())}
    assert results["source unseen"] == passed("source unseen", f"{tmp_path}/unseen: generated when the run starts")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function `serve({"/path": "body"}, date=…)` that starts an HTTP server and returns its URL."""
    with ExitStack() as stack:

        def start(pages: dict[str, str], date: float | None = None) -> str:
            def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
                stamp = formatdate(time.time() if date is None else date, usegmt=True)
                give(pages.get(handler.path, ""), 200 if handler.path in pages else 404, Date=stamp)(handler)

            return stack.enter_context(serving(answer)).url

        yield start


def closed_port() -> int:
    (port,) = free_ports(1)
    return port


def test_mlflow_must_respond_with_the_clients_major_version(tmp_path: Path, serve: Serve) -> None:
    def mlflow(uri: str) -> Diagnosis:
        return services.mlflow(demo(tmp_path, f"tracking.uri={uri}", "tracking.required=false"))

    assert services.mlflow(None).status == "skipped"
    assert services.mlflow(demo(tmp_path)).status == "passed", "SQLite"
    assert mlflow(serve({"/health": "OK", "/version": version("mlflow")})).status == "passed"
    assert failing(mlflow(serve({"/health": "OK", "/version": "2.9.1"})), "has version 2.9.1")
    assert failing(mlflow(f"http://127.0.0.1:{closed_port()}"), "does not answer")


def test_the_clock_is_compared_with_the_first_server_that_responds(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = f"http://127.0.0.1:{closed_port()}"
    assert services.clock([]).status == "skipped"
    assert services.clock([serve({"/": ""})]).status == "passed"
    assert failing(services.clock([silent, serve({}, date=time.time() + 3600)]), "behind")
    assert failing(services.clock([silent, serve({}, date=time.time() - 3600)]), "ahead of")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:7070")
    assert services.servers(demo(tmp_path)) == ["http://store:7070"]


def test_a_cluster_is_checked_only_if_it_is_configured(tmp_path: Path) -> None:
    assert services.ray_cluster(demo(tmp_path)).status == "skipped"
    config = demo(tmp_path, f"cluster.address=127.0.0.1:{closed_port()}")
    assert failing(services.ray_cluster(config), "no Ray cluster answers")


def test_cluster_resources_are_compared_with_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(services, "CLUSTER_SECONDS", PATIENCE)
    with raylets([3]) as cluster:
        config = demo(tmp_path, f"cluster.address={cluster.address}", "cluster.cpus_per_worker=2")
        result = services.ray_cluster(config)
    assert result.status == "passed", result
    assert "1 node(s) with 3 CPU, 0 GPU" in result.detail
    assert "the run needs 4 CPU" in result.detail


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a home folder that other users may enter, unlike pytest's temporary folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / ".ray").mkdir(mode=0o755)
        monkeypatch.setenv("HOME", folder)
        yield Path(folder)


@pytest.mark.parametrize(("mode", "status"), [(0o644, "failed"), (0o640, "failed"), (0o600, "passed")])
def test_a_token_readable_by_others_fails(mode: int, status: str, home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.write_text("a token")
    token.chmod(mode)
    result = services.ray_token(None)
    assert result.status == status
    assert result.remedy == ("" if status == "passed" else f"chmod 600 {token}")
    home.chmod(0o700)
    assert services.ray_token(None).status == "passed", "nobody else can enter the home folder"


@pytest.mark.parametrize(
    ("address", "status"), [("head:6379", "failed"), ("127.0.0.1:6379", "skipped"), ("auto", "skipped")]
)
def test_a_remote_cluster_needs_a_token(address: str, status: str, home: Path, tmp_path: Path) -> None:
    assert services.ray_token(demo(tmp_path, f"cluster.address={address}")).status == status


def test_a_missing_or_empty_token_file_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    assert failing(services.ray_token(None), "is not a file")
    (home / "token").write_text("\n")
    assert failing(services.ray_token(None), "is empty")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    assert services.ray_token(None).status == "passed"


# ---- the command


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([passed("gloo", "2 ranks"), skipped("NCCL", "none")], 0),
        ([passed("gloo", "2 ranks"), failed("disk", "full", "free some")], 1),
    ],
)
def test_the_exit_status_reflects_failed_checks(
    results: list[Diagnosis], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda config: iter(results))
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == status
    assert all(result.detail in outcome.output and result.remedy in outcome.output for result in results)


def test_overrides_need_a_config() -> None:
    assert "--config" in str(CliRunner().invoke(app, ["doctor", "name=other"]).exception)


def test_the_command_runs_on_this_machine(tmp_path: Path, serve: Serve) -> None:
    server = serve({"/health": "OK", "/version": version("mlflow")})
    command = [sys.executable, "-m", "jobs.cli", "doctor", "--json", "--config", str(DEMO)]
    overrides = [f"output={tmp_path}/runs", f"tracking.uri={server}"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    statuses = {check["name"]: check["status"] for check in result["checks"]}
    works_here = {"packages", "gloo", "DeepSpeed operators", "output", "MLflow", "clock"}
    assert {name for name in works_here if statuses[name] == "passed"} == works_here, result
    assert result["passed"] == ("failed" not in statuses.values())
    assert done.returncode == (0 if result["passed"] else 1)
