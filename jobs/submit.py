"""`mome submit`: the same run as a Ray job. The job's driver is `mome train` on the cluster's head.

The checkout's code and the resolved config travel in the job's working folder; the packages must be installed on the
cluster (see `infra/`). Secrets never travel: the config names them, the cluster's nodes hold them. Submitting is
idempotent: a job's id follows from the run's name and config, so that the same run is never two jobs at once.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster import for_ranks
from jobs.configs import configs_folder
from jobs.console import notify
from jobs.dashboard import dashboard_address, first_line, is_loopback, open_dashboard, stream_logs
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import local_paths, validate
from pipeline.config.schema import RunConfig
from pipeline.tracking.describe import job_environment
from pipeline.tracking.locations import configured_uri

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 2.0
START_SECONDS = 60.0


def submit(
    config: RunConfig, address: str, follow: bool, submission_id: str | None, token: str | None = None
) -> dict[str, Any]:
    """Submit the run, and with `follow` stream the job's output until it ends; `token` names the cluster's token.

    Raises ConfigError for a config the cluster could not run or an address that must not be used, RunFailed when the
    cluster does not answer or the job fails.
    """
    address = dashboard_address(address)
    config = for_cluster(config, is_loopback(address))
    client = open_dashboard(address, token)
    states = {known.submission_id: getattr(known.status, "value", known.status) for known in client.list_jobs()}
    job = submission_id or job_id(config, states)
    if job not in states:
        _send(client, job, config)
    token_option = f" --token {token}" if token else ""
    notify(f"submitted as {job}; `mome jobs logs {job} --address {address}{token_option}` shows its output")
    status = "SUBMITTED"
    if follow:
        try:
            status = stream_logs(client, job)
        except KeyboardInterrupt:
            raise RunFailed(f"stopped following; job {job} is still running: `mome jobs stop {job}` ends it") from None
    if status not in ("SUCCEEDED", "SUBMITTED"):
        info = client.get_job_info(job)
        raise RunFailed(f"job {job} ended as {status}: {info.message or 'see its output above'}")
    return {"job": job, "status": status, "checkpoint": config.folder}


def _send(client: Any, job: str, config: RunConfig) -> None:
    """Send the job with this installation's code. Raises RunFailed when the cluster does not take it."""
    with tempfile.TemporaryDirectory() as folder:
        for shipped in (ROOT / "pipeline", ROOT / "jobs", configs_folder()):
            shutil.copytree(shipped, Path(folder) / shipped.name, ignore=shutil.ignore_patterns("__pycache__"))
        values = config.model_dump(mode="json", exclude_unset=True)
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.submit_job(
                    entrypoint=f"{interpreter()} -m jobs.cli train run.yaml --json",
                    runtime_env={"working_dir": folder, "env_vars": job_environment(job)},
                    submission_id=job,
                    metadata={"run": config.name, "checkpoint": config.folder},
                )
                return
            except RuntimeError as error:
                if "already exists" in str(error):  # someone submitted the same run in this moment
                    return
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise RunFailed(f"the cluster did not take the job: {first_line(error)}") from error
                time.sleep(POLL_SECONDS)  # a head that has just started has no agent yet


def job_id(config: RunConfig, states: Mapping[str, str]) -> str:
    """Return the job of this run and config that is active or succeeded, else the id of its next attempt.

    `states` holds the status of every job of the cluster by id. Attempts are numbered: base, base-2, base-3, …
    """
    base = f"mome-{config.name}-{hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:10]}"
    name, attempt = base, 1
    while states.get(name) in ("FAILED", "STOPPED"):
        attempt += 1
        name = f"{base}-{attempt}"
    return name


def for_cluster(config: RunConfig, same_machine: bool) -> RunConfig:
    """Return the config as the cluster reads it, where paths relative to this folder are not valid.

    For a head on this machine they become absolute; for another cluster they are an error that names them.
    """
    relative = {path: value for path, value in local_paths(config).items() if not Path(value).is_absolute()}
    if relative and not same_machine:
        listing = "\n".join(f"{'.'.join(map(str, path))}: {value}" for path, value in relative.items())
        raise ConfigError(
            f"the cluster cannot see folders of this machine:\n{listing}\n"
            "Give URLs such as s3://bucket/folder, or the absolute paths of a shared file system."
        )
    uri = configured_uri(config)
    if not same_machine and uri.startswith("sqlite:"):
        raise ConfigError(f"tracking.uri: {uri} is a file of this machine; give the URL of an MLflow server")
    values = for_ranks(config).model_dump(mode="json", exclude_unset=True)
    values["cluster"] = {**values.get("cluster", {}), "address": "auto"}
    return validate(values, "the config as submitted")


def interpreter() -> str:
    """Return shell code for the job's Python: this interpreter if the head has it, otherwise `python`.

    A loopback address does not imply this machine: it may be the end of a tunnel.
    """
    return f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'
