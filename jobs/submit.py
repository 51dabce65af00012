"""`mome submit` and `mome jobs`: a run as a Ray job, whose driver is `mome train` on the cluster's head.

The checkout's code and the resolved config travel in the job's working folder; packages and secrets are the cluster's
own (see `infra/`). A job's id follows from the run's name and config, so that a run is never two jobs at once.

A Ray dashboard without authentication runs anyone's code, so it is used on this machine alone. The token of one with
authentication is named, never given: by `--token env:NAME` or `file:PATH`, or by Ray's own variables and file.
"""

import asyncio
import hashlib
import http.client
import ipaddress
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml

from jobs.cluster import TOKEN_FILE, for_ranks
from jobs.console import notify
from pipeline.config.background import within
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import RECIPES, local_paths, resolve_secret
from pipeline.config.redaction import printable
from pipeline.config.schema import RunConfig
from pipeline.tracking import describe
from pipeline.tracking.locations import configured_uri

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 2.0
START_SECONDS = 60.0  # for a head that has just started to take a job
ANSWER_SECONDS = 20.0  # that the dashboard may be silent in an answer
LIST_SECONDS = 60.0  # that the list of jobs may take
UNREACHABLE_SECONDS = 120.0  # how long the dashboard may be unreachable while logs are followed
SILENT_SECONDS = 60.0  # without output, after which the status is requested: a dead connection is silent too
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # with these Ray's client replaces the address it was given
EXPECTED = "expected the cluster's dashboard, such as http://head:8265"
OTHER_PORTS = {6379: "where Ray's nodes and `cluster.address` connect", 10001: "the port of ray:// clients"}
REFERENCES = "--token file:PATH or --token env:NAME, or RAY_AUTH_TOKEN_PATH"
GIVE_TOKEN = f"Name the cluster's token: {REFERENCES}, or put it into ~/.ray/auth_token."


def submit(
    config: RunConfig, address: str, follow: bool, submission_id: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Submit the run unless its job is active or succeeded; `follow` its output. Raises ConfigError, RunFailed."""
    address = dashboard_address(address)
    if not is_loopback(address):
        relative = {path: value for path, value in local_paths(config).items() if not Path(value).is_absolute()}
        if listing := "\n".join(f"{'.'.join(map(str, path))}: {value}" for path, value in relative.items()):
            remedy = "Give URLs such as s3://bucket/folder, or the absolute paths of a shared file system."
            raise ConfigError(f"the cluster cannot see folders of this machine:\n{listing}\n{remedy}")
        if (uri := configured_uri(config)).startswith("sqlite:"):
            raise ConfigError(f"tracking.uri: {uri} is a file of this machine; give the URL of an MLflow server")
    config, client = for_ranks(config, address="auto"), open_dashboard(address, token)
    states = {known.submission_id: getattr(known.status, "value", known.status) for known in client.list_jobs()}
    base = f"mome-{config.name}-{hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:10]}"
    attempts = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    job = submission_id or next(name for name in attempts if states.get(name) not in ("FAILED", "STOPPED"))
    if job not in states:
        _send(client, job, config)
    reach = ["--address", address, *(["--token", token] if token else [])]
    notify(f"submitted as {job}; `{shlex.join(['mome', 'jobs', 'logs', job, *reach])}` shows its output")
    try:
        status = stream_logs(client, job) if follow else "SUBMITTED"
    except KeyboardInterrupt:
        stop = shlex.join(["mome", "jobs", "stop", job, *reach])
        raise RunFailed(f"stopped following; job {job} is still running: `{stop}` ends it") from None
    if status not in ("SUCCEEDED", "SUBMITTED"):
        # Ray's message repeats the end of the output, which is shown already.
        reason = (client.get_job_info(job).message or "").partition(", last available logs")[0]
        raise RunFailed(f"job {job} ended as {status}: {reason or 'see above'}")
    return {"job": job, "status": status, "checkpoint": config.folder}


def _send(client: Any, job: str, config: RunConfig) -> None:
    """Send the job with this installation's code. Raises RunFailed when the cluster does not take it."""
    # A loopback address may be the end of a tunnel, to a head without this interpreter.
    python, deadline = f'"$(command -v {shlex.quote(sys.executable)} || echo python)"', time.monotonic() + START_SECONDS
    tags = describe.code_tags() | {"ray.submission_id": job}
    environment = {describe.PROPAGATED_TAGS[tag]: value for tag, value in tags.items()}
    with tempfile.TemporaryDirectory() as folder:
        for shipped in (ROOT / "pipeline", ROOT / "jobs", RECIPES):
            shutil.copytree(shipped, Path(folder) / shipped.name, ignore=shutil.ignore_patterns("__pycache__"))
        values = config.model_dump(mode="json", exclude_unset=True)
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        while True:
            try:
                client.submit_job(
                    entrypoint=f"{python} -m jobs.cli train run.yaml --json",
                    runtime_env={"working_dir": folder, "env_vars": environment},
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


def open_job(job: str, address: str, token: str | None) -> tuple[Any, dict[str, Any]]:
    """Return the dashboard's client and the description of a job. Raises ConfigError for an unknown job."""
    client = open_dashboard(address, token)
    try:
        return client, describe_job(client.get_job_info(job))
    except RuntimeError as error:
        raise ConfigError(f"job {job}: {first_line(error)} `mome jobs list` lists the cluster's jobs") from error


def describe_job(job: Any) -> dict[str, Any]:
    """Return Ray's details of a job as `mome jobs` prints them."""
    metadata, status = job.metadata or {}, getattr(job.status, "value", job.status)
    details = {"job": job.submission_id, "run": metadata.get("run"), "status": status}
    for name, at in (("started", job.start_time), ("ended", job.end_time)):  # milliseconds
        details[name] = datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if at else None
    return details | {"message": job.message, "checkpoint": metadata.get("checkpoint")}


def stream_logs(client: Any, job: str) -> str:
    """Stream a job's output to standard error, each character once; return its last status, or raise RunFailed."""
    num_shown, last_reached = 0, time.monotonic()

    async def show_new() -> None:
        """Print new output until the job or the connection ends, or none came for `SILENT_SECONDS`."""
        nonlocal num_shown
        num_received, chunks = 0, client.tail_job_logs(job)
        with suppress(StopAsyncIteration, TimeoutError):
            while True:
                chunk = await asyncio.wait_for(anext(chunks), SILENT_SECONDS)
                print(printable(chunk[max(0, num_shown - num_received) :]), end="", file=sys.stderr, flush=True)
                num_received += len(chunk)
                num_shown = max(num_shown, num_received)

    while True:
        try:
            asyncio.run(show_new())
            status = client.get_job_status(job)
        except Exception as error:  # HTTP and websocket libraries raise many types when a head goes away
            if time.monotonic() - last_reached > UNREACHABLE_SECONDS:
                silence = f"the cluster has not answered for {UNREACHABLE_SECONDS:.0f} s ({first_line(error)})"
                remedy = "If its head is lost, submit again to the new one: the run resumes."
                raise RunFailed(f"job {job}: {silence}. {remedy}") from error
        else:
            last_reached = time.monotonic()
            if status.is_terminal():
                asyncio.run(show_new())
                return str(status.value)
        time.sleep(POLL_SECONDS)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_dashboard(address: str, token: str | None = None) -> Any:
    """Return Ray's JobSubmissionClient of the dashboard at `address`; `token` is a reference.

    Nothing is sent before it is known that the cluster asks everyone for a token, or is on this machine. Raises
    ConfigError for an address that must not be used, RunFailed when it does not answer or does not let us in.
    """
    address = dashboard_address(address)
    secret = find_token(token)
    guarded = _is_guarded(address, None)
    if not guarded and not is_loopback(address):
        guard = "Start the cluster with RAY_AUTH_MODE=token and a token on every node"
        remedy = f"{guard}, or open a tunnel to it and give this machine's end of it."
        raise ConfigError(f"--address {address}: refused, because it lets anyone run code there. {remedy}")
    if guarded and secret is None:
        raise RunFailed(f"--address {address}: the cluster asks for a token, and none is known here. {GIVE_TOKEN}")
    if guarded and _is_guarded(address, secret):
        raise RunFailed(f"--address {address}: the cluster does not accept the token. {GIVE_TOKEN}")
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            address = self.get_address()
            options |= {"timeout": ANSWER_SECONDS, "allow_redirects": False}
            if is_loopback(address):
                options["proxies"] = {"http": "", "https": ""}
            try:
                response = super()._do_request(method, endpoint, **options)
                if response.status_code == 200 and response.content:  # packages are answered with nothing
                    response.json()
            except AuthenticationError as error:
                raise RunFailed(f"--address {address}: the cluster does not accept the token. {GIVE_TOKEN}") from error
            except (requests.RequestException, ValueError) as error:
                reason = f"the dashboard gave no answer to {endpoint} ({first_line(error)})"
                raise RunFailed(f"--address {address}: {reason}") from error
            if 300 <= response.status_code < 400:
                self._raise_error(response)
            return response

        def _raise_error(self, r: Any) -> NoReturn:
            lines = [line.strip() for line in r.text.splitlines() if line.strip()]  # of a traceback, often
            detail = f": {lines[-1]}" if lines else ""
            raise DashboardError(f"--address {self.get_address()}: the dashboard answers with {r.status_code}{detail}")

    overriding = {name: os.environ.pop(name) for name in OVERRIDING if name in os.environ}
    try:
        client = Client(address, headers={"Authorization": f"Bearer {secret}"} if guarded else None)
    except (ConnectionError, RuntimeError) as error:
        raise RunFailed(f"--address {address}: the dashboard takes no jobs ({first_line(error)})") from error
    finally:
        os.environ.update(overriding)
    if client.get_address() != address:
        raise RunFailed(f"--address {address}: Ray's client would use {client.get_address()} instead; nothing was sent")
    return client


def dashboard_address(address: str) -> str:
    """Return `scheme://host:port` of a dashboard's address or page in a browser. Raises ConfigError."""
    if not address:
        raise ConfigError("--address: give the cluster's dashboard, such as http://head:8265")
    if "@" in address.partition("#")[0]:
        raise ConfigError(f"--address: has a user name or a password before the host. {GIVE_TOKEN}")
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise ConfigError(f"--address {address}: is not an address ({error}); {EXPECTED}") from error
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:%-]+", host):
        hint = " (ray:// is for clients of another kind)" if parts.scheme == "ray" else ""
        raise ConfigError(f"--address {address}: {EXPECTED}{hint}")
    server = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}"
    return server + (f":{port}" if port is not None else "") + parts.path.rstrip("/")


def find_token(reference: str | None) -> str | None:
    """Return the token behind `env:NAME` or `file:PATH`, else Ray's or None. Raises ConfigError, which hides it."""
    if reference is not None:
        if not reference.startswith(("env:", "file:")):
            raise ConfigError("--token: is a secret and must be a reference: env:NAME or file:PATH")
        origin, token = f"--token {reference}", resolve_secret(reference)
    elif (token := os.environ.get("RAY_AUTH_TOKEN")) is not None:
        origin = "RAY_AUTH_TOKEN"
    elif (path := os.environ.get("RAY_AUTH_TOKEN_PATH")) is not None:
        origin, token = f"RAY_AUTH_TOKEN_PATH {path}", resolve_secret(f"file:{path}")
    elif os.path.lexists(path := os.path.expanduser(TOKEN_FILE)):
        origin, token = TOKEN_FILE, resolve_secret(f"file:{path}")
    else:
        return None
    token = (token or "").strip()
    if not re.fullmatch(r"[\x20-\x7e]+", token):
        raise ConfigError(f"{origin}: expected a token, one line of printable ASCII characters")
    return token


def is_loopback(address: str) -> bool:
    """Return whether an address, with or without a scheme, is a loopback address of this machine."""
    host = urlsplit(address if "://" in address else f"http://{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class DashboardError(RunFailed, RuntimeError):
    """Error of the dashboard; also a RuntimeError, as Ray's client raises it."""


def _is_guarded(address: str, secret: str | None) -> bool:
    """Return whether the dashboard refuses to list jobs with this token, or without one. Raises RunFailed."""
    port = urlsplit(address).port or 0
    hint = "Start a head with `ray start --head`, or open a tunnel to the cluster's port 8265."
    if port in OTHER_PORTS:
        hint = f"Port {port} is {OTHER_PORTS[port]}; the dashboard's port is 8265. {hint}"
    headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
    request = urllib.request.Request(f"{address}/api/jobs/", headers=headers)
    # A redirect is an error, because the token must not go there; a proxy would use its own loopback.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler({} if is_loopback(address) else None))
    for name in ("HTTPHandler", "HTTPSHandler", "HTTPErrorProcessor", "HTTPDefaultErrorHandler"):
        opener.add_handler(getattr(urllib.request, name)())
    try:
        answer = within(LIST_SECONDS, lambda: opener.open(request, timeout=ANSWER_SECONDS).read(2**28), "list")
        jobs = json.loads(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return True
        where = error.headers.get("Location", "") if 300 <= error.code < 400 else ""
        reason = f"redirects to {where}" if where else f"answers with {error.code}"
        raise RunFailed(f"--address {address}: no Ray dashboard (it {reason}). {hint}") from error
    except (OSError, http.client.HTTPException) as error:
        raise RunFailed(f"--address {address}: no Ray dashboard answers there ({first_line(error)}). {hint}") from error
    except (ValueError, RecursionError):
        jobs = None  # a web page
    if not (isinstance(jobs, list) and all(isinstance(job, dict) and "status" in job for job in jobs)):
        raise RunFailed(f"--address {address}: a web server answers there that is no Ray dashboard. {hint}")
    return False
