"""`mome jobs`: the jobs of a cluster, over its dashboard: list, status, logs, stop."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from jobs.console import echo, print_result
from jobs.dashboard import first_line, open_dashboard
from jobs.follow import follow as follow_job
from pipeline.config.errors import ConfigError, MomeError, RunFailed
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join

app = typer.Typer(no_args_is_help=True, help="Jobs submitted to a cluster: list, status, logs, stop.")

Address = Annotated[
    str,
    typer.Option(help="The cluster's dashboard, such as http://head:8265.", envvar="RAY_API_SERVER_ADDRESS"),
]
Token = Annotated[str | None, typer.Option(help="Where the cluster's token is: env:NAME or file:PATH.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
Job = Annotated[str, typer.Argument(help="The job's id, as `mome submit` and `mome jobs list` give it.")]

STOP_SECONDS = 60.0


@app.command("list")
def list_(address: Address = "", token: Token = None, as_json: AsJson = False) -> None:
    """Every job the cluster knows of, the newest first."""
    jobs = open_dashboard(address, token).list_jobs()
    jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
    told = [_told(job) for job in jobs if job.submission_id]
    if as_json:
        print_result({"jobs": told}, as_json)
        return
    for job in told:
        echo(f"{job['job']:<40}  {job['status']:<9}  {job['started'] or '-':<20}  {job['run'] or '-'}")


@app.command()
def status(job: Job, address: Address = "", token: Token = None, as_json: AsJson = False) -> None:
    """Where a job stands, with its run's progress where the run's folder can be read from here."""
    told = _told(_known(open_dashboard(address, token), job))
    if progress := _progress(told["checkpoint"]):
        told["progress"] = progress
    print_result(told, as_json)


@app.command()
def logs(
    job: Job,
    address: Address = "",
    token: Token = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a job has printed."""
    client = open_dashboard(address, token)
    _known(client, job)
    if follow:
        print_result({"job": job, "status": follow_job(client, job)}, as_json)
        return
    output = client.get_job_logs(job)
    if as_json:
        print_result({"job": job, "logs": output}, as_json)
    else:
        echo(output, newline=False)


@app.command()
def stop(job: Job, address: Address = "", token: Token = None, as_json: AsJson = False) -> None:
    """End a job. Its run keeps its last checkpoint: submitted again, it goes on from there."""
    client = open_dashboard(address, token)
    _known(client, job)
    client.stop_job(job)
    end = time.monotonic() + STOP_SECONDS
    while not (state := client.get_job_status(job)).is_terminal():
        if time.monotonic() > end:
            raise RunFailed(f"job {job}: still {state.value} {STOP_SECONDS:.0f} s after it was told to stop")
        time.sleep(0.5)
    print_result({"job": job, "status": state.value}, as_json)


def _known(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise ConfigError(f"job {job}: {first_line(error)} `mome jobs list` shows those the cluster knows") from error


def _told(job: Any) -> dict[str, Any]:
    metadata = job.metadata or {}
    return {
        "job": job.submission_id,
        "run": metadata.get("run"),
        "status": getattr(job.status, "value", job.status),
        "started": _moment(job.start_time),
        "ended": _moment(job.end_time),
        "message": job.message,
        "checkpoint": metadata.get("checkpoint"),
    }


def _moment(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else None


def _progress(folder: str | None) -> dict[str, Any] | None:
    """The run's own word on how far it is; None where its folder is out of reach."""
    from jobs.rank import PROGRESS_FILE

    if not folder:
        return None
    storage, url = Storage(StorageConfig(retry_timeout_seconds=5.0)), join(folder, PROGRESS_FILE)
    with suppress(MomeError, ValueError):
        if storage.exists(url):
            found: dict[str, Any] = json.loads(storage.read(url))
            return found
    return None
