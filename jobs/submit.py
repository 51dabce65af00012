"""`mome submit`: the same run as a Ray job. The job's driver is `mome train` on the cluster's head.

The checkout's code and the resolved config travel in the job's working folder; the packages must be installed on the
cluster (see `infra/`). Secrets never travel: the config names them, the cluster's nodes hold them.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from jobs.console import console
from jobs.pretrain import for_ranks
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import validate
from pipeline.config.paths import local_paths
from pipeline.config.schema import RunConfig
from pipeline.tracking.tracker import tracking_uri

ROOT = Path(__file__).parent.parent
SHIPPED = ("pipeline", "jobs", "configs")
POLL_SECONDS = 2.0
START_SECONDS = 60.0
TOKEN_FILE = Path("~/.ray/auth_token")


def submit(config: RunConfig, address: str, follow: bool, submission_id: str | None) -> dict[str, Any]:
    """Submit, and with `follow` stream the job's output until it ends.

    Raises ConfigError for a config the cluster could not run, RunFailed when the cluster does not answer or the job
    fails.
    """
    if not address:
        raise ConfigError("--address: give the cluster's dashboard, such as http://head:8265")
    use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    config = for_cluster(config, is_loopback(address))
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise RunFailed(
            f"--address {address}: no Ray dashboard answers there ({_first_line(error)}). Start a head with "
            "`ray start --head`, or open a tunnel to the cluster's port 8265."
        ) from error
    except AuthenticationError as error:
        raise RunFailed(
            f"--address {address}: the cluster asks for a token ({_first_line(error)}). Put its token into "
            "~/.ray/auth_token, or name the file in RAY_AUTH_TOKEN_PATH."
        ) from error
    job = _send(client, config, submission_id)
    console.print(f"submitted as {job}; `ray job logs --address {address} {job}` shows its output", highlight=False)
    status = _follow(client, job) if follow else "SUBMITTED"
    if status not in ("SUCCEEDED", "SUBMITTED"):
        info = client.get_job_info(job)
        raise RunFailed(f"job {job} ended as {status}: {info.message or 'see its output above'}")
    return {"job": job, "status": status, "checkpoint": config.folder}


def use_token() -> None:
    """Send the cluster's token where this machine has one. Ray reads the mode once, when it is first imported."""
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if named or TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_loopback(address: str) -> bool:
    host = urlparse(address if "://" in address else f"http://{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def for_cluster(config: RunConfig, same_machine: bool) -> RunConfig:
    """The config as the cluster must read it: paths relative to this folder mean nothing there.

    On this machine's own head they become absolute; for another cluster they are refused by name.
    """
    relative = {path: value for path, value in local_paths(config).items() if not Path(value).is_absolute()}
    if relative and not same_machine:
        told = "\n".join(f"{path}: {value}" for path, value in relative.items())
        raise ConfigError(
            f"the cluster cannot see folders of this machine:\n{told}\n"
            "Give URLs such as s3://bucket/folder, or the absolute paths of a shared file system."
        )
    uri = tracking_uri(config)
    if not same_machine and uri.startswith("sqlite:"):
        raise ConfigError(f"tracking.uri: {uri} is a file of this machine; give the URL of an MLflow server")
    values = for_ranks(config).model_dump(mode="json", exclude_unset=True)
    values["cluster"] = {**values.get("cluster", {}), "address": "auto"}
    return validate(values, "the config as submitted")


def _send(client: Any, config: RunConfig, submission_id: str | None) -> str:
    """Submit the code and the config; an id that the cluster knows already is that job."""
    if submission_id is not None and any(job.submission_id == submission_id for job in client.list_jobs()):
        return submission_id
    with tempfile.TemporaryDirectory() as folder:
        for name in SHIPPED:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        values = config.model_dump(mode="json", exclude_unset=True)
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        python = sys.executable if _is_local(client) else "python"
        job = {
            "entrypoint": f"{python} -m jobs.cli train run.yaml --json",
            "runtime_env": {"working_dir": folder},
            "submission_id": submission_id,
            "metadata": {"run": config.name},
        }
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return client.submit_job(**job)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise RunFailed(f"the cluster did not take the job: {_first_line(error)}") from error
                time.sleep(POLL_SECONDS)  # a head that has just started has no agent yet


def _is_local(client: Any) -> bool:
    return is_loopback(client.get_address())


def _follow(client: Any, job: str) -> str:
    """Stream what the job prints; returns how it ended."""
    shown = 0
    while True:
        status = client.get_job_status(job)
        output = client.get_job_logs(job)
        if len(output) > shown:
            sys.stderr.write(output[shown:])
            sys.stderr.flush()
            shown = len(output)
        if status.is_terminal():
            return status.value
        time.sleep(POLL_SECONDS)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
