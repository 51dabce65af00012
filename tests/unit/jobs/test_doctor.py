"""`mome doctor`: each check fails when it must and names a remedy; nothing optional makes a check fail."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from email.utils import formatdate
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jobs import doctor
from jobs.cli import app
from jobs.doctor import Diagnosis, diagnose
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import ensure_indexed
from pipeline.data.storage import Storage
from tests.support.http_server import give, serving
from tests.support.ranks import free_ports
from tests.support.ray_nodes import raylets

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
PATIENCE = 300.0  # includes starting Ray on a busy machine
MLFLOW = {"/health": "OK", "/version": version("mlflow")}


@pytest.fixture(autouse=True)
def no_cluster_or_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


def start(stack: ExitStack, pages: dict[str, str], ahead: float = 0.0) -> str:
    """Start an HTTP server of these pages, whose clock is some seconds ahead; return its URL."""

    def answer(handler: Any) -> None:
        date = formatdate(time.time() + ahead, usegmt=True)
        give(pages.get(handler.path, ""), 200 if handler.path in pages else 404, Date=date)(handler)

    return stack.enter_context(serving(answer)).url


def demo(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(DEMO, [f"output={tmp_path}/runs", *overrides])


def detail_of(status: str, check: Callable[..., str], *arguments: Any) -> str:
    """Return the description of a check that ends with `status`, with a remedy if it failed."""
    result = diagnose("check", check, *arguments)
    assert (result.status, bool(result.remedy)) == (status, status == "failed"), result
    return result.detail


passes, fails, skips = (partial(detail_of, status) for status in ("passed", "failed", "skipped"))


def test_packages_are_compared_with_required_and_tested_versions(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    same = f"torch=={torch.__version__.split('+')[0]}.0"  # builds are equal
    for requirement, tested, outcome, expected in (
        ("numpy>=99.1", "", fails, "is older than 99.1"), ("no-such>=1", "", fails, "no-such is missing"),
        ("numpy>=2.0", "numpy==2.0.1", passes, "(tested: 2.0.1)"), ("torch>=2.8", same, passes, "all as tested"),
    ):  # fmt: skip
        constraints.write_text(f"# tested\n{tested}\n")
        assert expected in outcome(doctor.packages, ["pydantic>=2.10", requirement], constraints)
    (count,) = re.findall(r"(\d+) packages", passes(doctor.packages))  # of the package's metadata
    assert int(count) > 15


def test_full_disks_low_limits_and_public_addresses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "free" in passes(doctor.disk, tmp_path / "runs" / "demo", 1)
    assert "free" in fails(doctor.disk, tmp_path / "runs" / "demo", 2**60)
    assert "is not a writable folder" in fails(doctor.disk, tmp_path / "file" / "runs")
    (tmp_path / "adapters" / "mlx5_0").mkdir(parents=True)
    limits = {resource.RLIMIT_NOFILE: (10**6, 10**6), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert "no InfiniBand" in passes(doctor.limits, tmp_path / "none")
    assert "mlx5_0" in fails(doctor.limits, tmp_path / "adapters")  # which needs locked memory
    limits[resource.RLIMIT_NOFILE] = (1024, 10**6)
    assert "1024 files may be open" in fails(doctor.limits, tmp_path / "none")
    for address in ("10.1.2.3", "127.0.0.1", "fe80::1", *(public := ("8.8.8.8", "2001:4860:4860::8888"))):
        monkeypatch.setenv("MASTER_ADDR", address)
        assert ("WARNING, a public address" in passes(doctor.rendezvous)) == (address in public)
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    skips(doctor.rendezvous)


def test_shared_memory_must_hold_the_batches_and_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is missing" in fails(doctor.shared_memory, None, 0, tmp_path / "shm")
    processes = demo(tmp_path, "data.loader.num_workers=2", "data.loader.prefetch_batches=3")
    batch = 64 * 3 * 48 * 48  # the examples of the largest stage as uint8 images
    both = doctor.NCCL_BYTES + 4 * batch // 2
    cases = ((demo(tmp_path), 0, 0), (processes, 0, 4 * batch), (processes, 1, both), (None, 8, doctor.NCCL_BYTES))
    for config, accelerators, needed in cases:
        for free, outcome in ((needed, passes), (needed - 1, fails)):
            monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            assert "needed" in outcome(doctor.shared_memory, config, accelerators, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")
def test_an_accelerator_must_be_usable_or_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, h100 = tmp_path / "nvidia-smi", "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program.write_text(f"#!/bin/sh\necho '{h100}'\n")
    program.chmod(0o755)
    assert f"the driver sees 1 ({h100}); torch" in fails(doctor.accelerator, None)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    gpus = "cluster.gpus_per_worker=1"
    for config in (None, demo(tmp_path), demo(tmp_path, gpus, "cluster.address=head:6379")):
        skips(doctor.accelerator, config)
    assert "cluster.gpus_per_worker" in fails(doctor.accelerator, demo(tmp_path, gpus))


def test_ranks_must_communicate_and_operators_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips(doctor.collective, "NCCL")  # there is no accelerator
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert re.search("could not sum a tensor.*nosuch0", fails(doctor.collective, "gloo"))
    with pytest.raises(RuntimeError, match="did not finish in time and was killed"):
        doctor.run_probes(["collective"], 0.1, [{"RANK": "0", "WORLD_SIZE": "2"}])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    assert "cannot be written" in fails(doctor.operators)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler)" in fails(doctor.operators)


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_only_a_usable_output_passes_and_stays_empty(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(s3.config)
    passes(doctor.output, demo(tmp_path), Storage())
    passes(doctor.output, demo(tmp_path, f"output={s3.url('runs')}"), store)
    assert list((tmp_path / "runs").iterdir()) == store.list(s3.url("runs")) == []
    assert "no-such-bucket" in fails(doctor.output, demo(tmp_path, "output=s3://no-such-bucket/runs"), store)
    (tmp_path / "file").write_text("a file")
    assert str(tmp_path) in fails(doctor.output, demo(tmp_path, f"output={tmp_path}/file"), Storage())
    monkeypatch.setattr(Storage, "list", lambda *_: [])
    assert "does not list" in fails(doctor.output, demo(tmp_path / "listed"), Storage())


def test_sources_need_a_manifest_or_tars_and_all_their_shards(tmp_path: Path, make_pairs: Callable[..., str]) -> None:
    def source(url: object, key: str = "pictures") -> tuple[Callable[..., str], RunConfig, Storage, str]:
        return doctor.source, demo(tmp_path, f"sources.{key}.shards={url}"), Storage(), str(url)

    folder, unseen = make_pairs("pairs", [3, 2]), f"{tmp_path}/unseen"
    fails(*source(tmp_path))  # a folder without tars
    assert str(tmp_path / "absent") in fails(*source(tmp_path / "absent"))
    assert "braces" in fails(*source(f"{tmp_path}/{{0..1}}/a.tar"))
    assert "2 tars, not indexed yet" in passes(*source(folder))
    ensure_indexed(Storage(), folder)
    assert passes(*source(folder)) == f"{folder}: 5 samples in 2 shards"
    (Path(folder) / "00000.tar").unlink()
    assert "00000.tar" in fails(*source(folder))
    assert passes(*source(unseen, "unseen")) == f"{unseen}: generated when the run starts"


def test_store_that_does_not_answer_is_one_failure_within_80_columns(tmp_path: Path) -> None:
    store, keys = f"storage.endpoint_url=http://127.0.0.1:{free_ports(1)[0]}", ("storage.key", "storage.secret")
    config = load_config("vlmo_base", [store, *(f"{key}=env:HOME" for key in keys), f"sources.coco.shards={tmp_path}"])
    failed, local = doctor.sources(config, Storage(config.storage).within(0.1))
    assert local.detail.startswith(f"coco: {tmp_path}")
    names, _, fault = failed.detail.partition(": ")
    assert set(names.split(", ")) == config.sources.keys() - {"coco"}
    assert "manifest.json: reading failed: the store did not answer" in fault
    text = doctor.summary(
        [failed, Diagnosis("gloo", "passed", "2 ranks"), Diagnosis("clock", "skipped", "no server")], 80
    )
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert f"{failed.detail} → {failed.remedy}" in words
    assert words.endswith("not ready: 1 check failed: source; 1 check passed, 1 skipped")


def test_mlflow_must_have_the_clients_version_and_clocks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(uri: str, *overrides: str) -> RunConfig:
        return demo(tmp_path, f"tracking.uri={uri}", "tracking.required=false", *overrides)

    def clock(store: str, uri: str = "sqlite:///x.db") -> tuple[Callable[..., str], RunConfig]:
        return doctor.clock, config(uri, f"storage.endpoint_url={store}")

    silent = f"http://127.0.0.1:{free_ports(1)[0]}"
    with ExitStack() as stack:
        old, late = start(stack, {"/health": "OK", "/version": "2.9.1"}), start(stack, {}, ahead=3600)
        skips(doctor.mlflow, None)
        assert "is writable" in passes(doctor.mlflow, demo(tmp_path)), "SQLite"
        assert "answers" in passes(doctor.mlflow, config(start(stack, MLFLOW)))
        assert "has version 2.9.1" in fails(doctor.mlflow, config(old))
        assert "does not answer" in fails(doctor.mlflow, config(silent))
        skips(doctor.clock, None)
        skips(*clock(silent))
        passes(*clock(start(stack, {"/": ""}), silent))
        assert "behind" in fails(*clock(silent, late))  # the first server that responds counts
        assert "ahead of" in fails(*clock(start(stack, {}, ahead=-3600)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", late)
        assert "behind" in fails(doctor.clock, None)


def test_a_configured_cluster_is_compared_with_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips(doctor.ray_cluster, demo(tmp_path))
    closed = f"cluster.address=127.0.0.1:{free_ports(1)[0]}"
    assert "no Ray cluster answers" in fails(doctor.ray_cluster, demo(tmp_path, closed))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(doctor, "CLUSTER_SECONDS", PATIENCE)
    with raylets([3]) as cluster:
        config = demo(tmp_path, f"cluster.address={cluster.address}", "cluster.cpus_per_worker=2")
        detail = passes(doctor.ray_cluster, config)
    assert re.search(r"1 node\(s\) with 3 CPU, 0 GPU.*the run needs 4 CPU", detail)


def test_a_token_is_private_and_needed_for_a_remote_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users may enter it, unlike pytest's temporary folders
        home, token = Path(folder), Path(folder) / ".ray" / "auth_token"
        token.parent.mkdir(mode=0o755)
        monkeypatch.setenv("HOME", folder)
        assert "not on this machine" in fails(doctor.ray_token, demo(tmp_path, "cluster.address=head:6379"))
        for address in ("127.0.0.1:6379", "auto"):
            skips(doctor.ray_token, demo(tmp_path, f"cluster.address={address}"))
        token.write_text("a token")
        # Nobody else can enter a home folder of mode 700.
        private = {(0o755, 0o644): False, (0o755, 0o640): False, (0o700, 0o640): True, (0o755, 0o600): True}
        for modes, is_private in private.items():
            for path, mode in zip((home, token), modes, strict=True):
                path.chmod(mode)
            remedy = diagnose("Ray token", doctor.ray_token, None).remedy
            assert remedy == ("" if is_private else f"chmod 600 {token}")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
        assert "is not a file" in fails(doctor.ray_token, None)
        (home / "token").write_text("\n")
        assert "is empty" in fails(doctor.ray_token, None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    passes(doctor.ray_token, None)


def test_the_command_runs_and_its_status_reflects_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = [Diagnosis("gloo", "passed", "2 ranks"), Diagnosis("NCCL", "skipped", "none")]
    monkeypatch.setattr(doctor, "run_checks", lambda config: iter(results))
    for status in (0, 1):
        outcome = CliRunner().invoke(app, ["doctor"])
        assert outcome.exit_code == status
        verdict = ("ready to train: 1 check passed, 1 skipped", "not ready: 1 check failed: disk; 1 check passed, 1")
        assert outcome.output.splitlines()[-1].startswith(verdict[status])
        assert all(result.detail in outcome.output and result.remedy in outcome.output for result in results)
        results.append(Diagnosis("disk", "failed", "full", "free some"))
    assert "--config" in str(CliRunner().invoke(app, ["doctor", "name=other"]).exception), "overrides need a config"
    with ExitStack() as stack:
        overrides = [f"output={tmp_path}/runs", f"tracking.uri={start(stack, MLFLOW)}"]
        command = [sys.executable, "-m", "jobs.cli", "doctor", "--json", "--config", str(DEMO), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    statuses = {check["name"]: check["status"] for check in result["checks"]}
    works_here = {"packages", "gloo", "DeepSpeed operators", "output", "MLflow", "clock"}
    assert {statuses[name] for name in works_here} == {"passed"}, result
    other = {"accelerator", "NCCL", "limits", "output disk", "rendezvous"}
    assert other <= statuses.keys()
    details = [check["detail"] for check in result["checks"] if check["name"] == "source"]
    assert [detail.partition(":")[0] for detail in details] == ["scenes, pictures, sentences", "unseen"]
    assert result["passed"] == ("failed" not in statuses.values())
    assert done.returncode == (0 if result["passed"] else 1)
