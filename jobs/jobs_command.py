"""`mome jobs`: list the jobs of a cluster, show their status and logs, and stop them, through the Ray dashboard."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from jobs.console import echo, print_result
from jobs.options import Address, JsonOption, Token
from pipeline.config.errors import ConfigError, MomeError, RunFailed

app = typer.Typer(no_args_is_help=True, help="List jobs submitted to a cluster, show their status and logs, stop them.")

Job = Annotated[str, typer.Argument(help="Id of the job, as printed by `mome submit` and `mome jobs list`.")]

STOP_SECONDS = 60.0


@app.command("list")
def list_(address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """List all jobs of the cluster, newest first."""
    from jobs.dashboard import open_dashboard

    jobs = open_dashboard(address, token).list_jobs()
    jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
    rows = [_describe(job) for job in jobs if job.submission_id]
    lines = [f"{row['job']:<40}  {row['status']:<9}  {row['started'] or '-':<20}  {row['run'] or '-'}" for row in rows]
    if as_json or lines:
        print_result({"jobs": rows}, as_json, "\n".join(lines))


@app.command()
def status(job: Job, address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """Show the status of a job, and the progress of its run if the run's folder is readable from here."""
    info = _describe(_open(job, address, token)[1])
    if folder := info["checkpoint"]:
        from jobs.distributed import PROGRESS_FILE
        from pipeline.config.schema import StorageConfig
        from pipeline.data.storage import Storage, join

        storage, url = Storage(StorageConfig(retry_timeout_seconds=5.0)), join(folder, PROGRESS_FILE)
        with suppress(MomeError, ValueError):
            if storage.exists(url):
                info["progress"] = json.loads(storage.read(url))
    print_result(info, as_json)


@app.command()
def logs(
    job: Job,
    address: Address = "",
    token: Token = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stream the output until the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the output of a job."""
    from jobs.dashboard import stream_logs

    client, _ = _open(job, address, token)
    if follow:
        print_result({"job": job, "status": stream_logs(client, job)}, as_json)
        return
    output = client.get_job_logs(job)
    if as_json:
        print_result({"job": job, "logs": output}, as_json)
    else:
        echo(output, newline=False)


@app.command()
def stop(job: Job, address: Address = "", token: Token = None, as_json: JsonOption = False) -> None:
    """Stop a job. Its run keeps its last checkpoint and resumes from it when submitted again."""
    client, _ = _open(job, address, token)
    client.stop_job(job)
    end = time.monotonic() + STOP_SECONDS
    while not (state := client.get_job_status(job)).is_terminal():
        if time.monotonic() > end:
            raise RunFailed(f"job {job}: still {state.value} {STOP_SECONDS:.0f} s after the request to stop")
        time.sleep(0.5)
    print_result({"job": job, "status": state.value}, as_json)


def _open(job: str, address: str, token: str | None) -> tuple[Any, Any]:
    """Return the dashboard's client and its information on the job. Raises ConfigError for an unknown job."""
    from jobs.dashboard import first_line, open_dashboard

    client = open_dashboard(address, token)
    try:
        return client, client.get_job_info(job)
    except RuntimeError as error:
        raise ConfigError(f"job {job}: {first_line(error)} `mome jobs list` lists the cluster's jobs") from error


def _describe(job: Any) -> dict[str, Any]:
    metadata = job.metadata or {}
    started, ended = (
        datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else None
        for milliseconds in (job.start_time, job.end_time)
    )
    return {
        "job": job.submission_id,
        "run": metadata.get("run"),
        "status": getattr(job.status, "value", job.status),
        "started": started,
        "ended": ended,
        "message": job.message,
        "checkpoint": metadata.get("checkpoint"),
    }
