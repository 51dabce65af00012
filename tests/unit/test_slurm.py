"""The scripts of infra/ are valid bash, and the Slurm job retries failures, stops at a limit, and is requeued.

Slurm's commands are replaced by scripts that record their arguments; `srun` runs the test's substitute for torchrun.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.support.stores import Store

INFRA = Path(__file__).resolve().parents[2] / "infra"
Start = Callable[..., subprocess.Popen[str]]


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return start(srun="exit 1", **environment), which runs the job script as Slurm does on the first node."""
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")

    def begin(srun: str, **environment: str) -> subprocess.Popen[str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        write_program(tmp_path / "srun", f'printf "%s " srun "$@" >> {calls}; echo >> {calls}\n{srun}')
        write_program(tmp_path / "scancel", f'echo scancel "$@" >> {calls}; kill -USR1 $(cat {tmp_path}/ranks)')
        show = f'[ "$1" = show ] && {{ echo node7; echo node8; }} || echo scontrol "$@" >> {calls}'
        write_program(tmp_path / "scontrol", show)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
        base = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MOME_VENV": str(tmp_path / "venv")}
        command = ["bash", str(INFRA / "slurm.sbatch"), "configs/demo.yaml", "name=a run", "output=s3://bucket/runs"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**base, **slurm, **environment}, start_new_session=True, **pipes)

    return begin


def test_torchrun_starts_on_every_node_and_is_retried_unless_superseded(start: Start, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    job = start('printf "%s\\n" "${@: -3}" > ' + str(tmp_path / "last"), SLURM_GPUS_ON_NODE="8")
    assert job.wait(30) == 0
    (step,) = (tmp_path / "calls").read_text().splitlines()
    for expected in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint node7:29400", "-m pipeline.training"):
        assert expected in step
    last = (tmp_path / "last").read_text().splitlines()
    assert last == ["configs/demo.yaml", "name=a run", "output=s3://bucket/runs"]
    words = step.split()
    parsed = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert "SIGUSR1" in parsed.signals_to_handle  # passed on to the ranks
    assert parsed.shutdown_timeout < 120  # of --signal=B:USR1@120
    assert parsed.max_restarts == 0  # ranks that saved and ended must not be restarted
    job = start(f"[ $(wc -l < {tmp_path}/calls) = 3 ]")  # the third attempt succeeds
    assert job.wait(30) == 0
    steps = (tmp_path / "calls").read_text().splitlines()
    assert len(steps) == 3
    assert len({step.split("--rdzv-id ")[1].split()[0] for step in steps}) == 3  # each attempt has its own rendezvous
    job = start("exit 7", MOME_MAX_FAILURES="1")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 7
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert "failed 2 times, the last with status 7" in output
    # Retries share a claim; another start of the same job has its own.
    write_program(tmp_path / "python", f'printf "%s " "$MOME_CLAIM" "$@" > {tmp_path}/owner\nexit 76')
    for restart in ("0", "3"):
        job = start("exit 1", SLURM_RESTART_COUNT=restart)
        output, _ = job.communicate(timeout=30)
        assert job.returncode == 76, output
        assert (tmp_path / "calls").read_text().count("srun") == 1
        claim = f"slurm--17-{restart} -m pipeline.training.ownership configs/demo.yaml name=a"
        assert (tmp_path / "owner").read_text().startswith(claim)


@pytest.mark.parametrize("sent", ["USR1", "TERM"])
def test_preemption_is_passed_to_the_ranks_and_requeues_the_job(sent: str, start: Start, tmp_path: Path) -> None:
    saves = f"trap 'echo saved >> {tmp_path}/calls; exit 1' USR1"
    job, deadline = start(f"{saves}; echo $$ > {tmp_path}/ranks; while :; do sleep 0.1; done"), time.monotonic() + 30
    while not (tmp_path / "ranks").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(job.pid, getattr(signal, f"SIG{sent}"))  # to the script alone, as --signal=B: does
    output, _ = job.communicate(timeout=30)
    calls = (tmp_path / "calls").read_text().splitlines()[1:]
    assert calls == [f"scancel --signal={sent} 17", "saved", "scontrol requeue 17"], output
    assert job.returncode == 0


def test_scripts_are_valid_bash_and_explain_what_is_missing_or_taken(moto_store: Store, tmp_path: Path) -> None:
    command = ["bash", str(INFRA / "local_s3.sh"), port := moto_store.endpoint.rpartition(":")[2], "not-made"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "not installed" in done.stderr:
        pytest.skip("this checkout has no .venv")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} is taken" in done.stderr
    assert "is served" not in done.stderr
    keys = {"aws_access_key_id": moto_store.key, "aws_secret_access_key": moto_store.secret}
    client = boto3.client("s3", "us-east-1", endpoint_url=moto_store.endpoint, **keys)
    assert "not-made" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
    for path in [*INFRA.glob("*.sh"), *INFRA.glob("*.sbatch")]:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert os.access(path, os.X_OK), path
    (tmp_path / "infra").mkdir()
    script = shutil.copy(INFRA / "local_s3.sh", tmp_path / "infra" / "local_s3.sh")
    for path, message in (
        (script, "Run 'make .venv/installed' in the checkout first"),
        (INFRA / "slurm.sbatch", "usage: sbatch"),
    ):
        done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
