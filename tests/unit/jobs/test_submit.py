"""Submitting to a Ray dashboard: only a trusted address is used, failures are one message, and job ids are stable."""

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.job_submission import JobStatus

from jobs import submit as module
from jobs.submit import dashboard_address, find_token, is_loopback, open_dashboard, submit
from pipeline.config.errors import ConfigError, MomeError, RunFailed
from pipeline.config.load import load_config
from pipeline.tracking import describe
from tests.support.http_server import give, serving

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"
TOKEN = "a-token"


def ray_dashboard(handler: BaseHTTPRequestHandler) -> None:
    """Answer as a Ray dashboard that requires the token; uploads of packages are answered with an empty body."""
    if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
        give("no token", 401)(handler)
    elif handler.path.startswith("/api/packages/"):
        give("", 404 if handler.command == "GET" else 200)(handler)
    elif handler.command == "POST":
        give({"job_id": "job", "submission_id": "job"})(handler)
    else:
        give({"ray_version": "2.60.0"} if handler.path == "/api/version" else [])(handler)


@pytest.fixture(autouse=True)
def own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def test_pages_are_addresses_and_invalid_or_unguarded_ones_are_rejected_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"http://[::1]:8265": "http://[::1]:8265", "https://HEAD.example.org/ray/": "https://head.example.org/ray"}
    for page in (
        "head:8265",
        "http://head:8265/",
        "http://head:8265/#/overview",
        "head:8265/#/jobs/mome?tab=logs",
    ):
        pages[page] = "http://head:8265"
    for address, expected in pages.items():
        assert dashboard_address(address) == dashboard_address(expected) == expected
    own = ["127.0.0.1", "localhost", "http://127.0.0.1:8265", "http://[::1]:8265"]
    others = ["10.0.0.1", "head", "http://head:8265", "http://127.0.0.1.evil.com:8265"]
    assert [address for address in own + others if is_loopback(address)] == own
    for address in (
        "", "http://[::1", "http://head:82x65", "http://head:99999999", "ray://head:10001", "file:///etc", "http://",
        "head 1:8265", "http://head:8265\\@elsewhere", "http://alice:secret@head:8265", "http://a:secret@head:82x65",
        "ray://alice:secret@head:10001", "http://alice:[secret@head", "alice:secret@", "http://a..b:8265", 64 * "a",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="--address") as error:
            open_dashboard(address)
        assert "secret" not in str(error.value)
    monkeypatch.setattr(module, "is_loopback", lambda address: False)
    with serving(give([])) as server:
        with pytest.raises(ConfigError, match="lets anyone run code"):
            open_dashboard(server.url)
        assert server.seen == [("GET", "/api/jobs/", None)], "more than the question was sent, or the token with it"


def test_local_address_precedes_variables_of_ray_and_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RAY_ADDRESS": ("auto", "ray://127.0.0.1:10001"), "RAY_API_SERVER_ADDRESS": ("127.0.0.1:6379",)}
    with serving(ray_dashboard) as another:
        for variable, values in (variables | {"http_proxy": (), "all_proxy": ()}).items():
            for value in (another.url, *values):
                with serving(ray_dashboard) as named, monkeypatch.context() as patch:
                    patch.setenv(variable, value)
                    client = open_dashboard(named.url)
                    assert (client.get_address(), client.list_jobs()) == (named.url, []), (variable, value)
                    assert named.seen[0] == ("GET", "/api/jobs/", None), "the token was sent before it was asked for"
                    assert {token for *_, token in named.seen[1:]} == {f"Bearer {TOKEN}"}
        assert another.seen == [], "something was sent to the other cluster"


def test_token_is_not_sent_to_a_redirect_target() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if redirected == "request of the client" and not handler.path.startswith("/api/jobs/job"):
            ray_dashboard(handler)
        elif redirected == "request with the token" and "Authorization" not in handler.headers:
            give("no token", 401)(handler)
        else:
            give("", status, Location=f"{target.url}{handler.path}")(handler)

    with serving(give("stolen")) as target, serving(answer) as server:
        cases = ("first request", "request with the token", "request of the client")
        for redirected, status in itertools.product(cases, (302, 308)):
            expected = f"answers with {status}" if "client" in redirected else f"redirects to {target.url}"
            with pytest.raises(MomeError, match=expected):
                open_dashboard(server.url).get_job_info("job")
        assert target.seen == []


def test_server_that_is_no_dashboard_is_detected_and_its_port_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x00\x00\x12\x04 this is not HTTP\r\n")  # the response of Ray's gRPC ports

    pages = (give("<html>"), give({"jobs": []}), give([1]), give("[" * 100_000), give("no", 404), give("oh", 500))
    for answer in (drop, *pages):
        with serving(answer) as server, pytest.raises(RunFailed, match="no Ray dashboard"):
            open_dashboard(server.url)
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=ConnectionRefusedError("refused")))
    for port, hint in ((6379, "cluster.address"), (10001, "ray://"), (8265, "tunnel")):
        with pytest.raises(RunFailed, match=rf"no Ray dashboard answers.*{hint}.*8265"):
            open_dashboard(f"127.0.0.1:{port}")


def test_silent_and_endless_responses_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(header: bytes, handler: BaseHTTPRequestHandler) -> None:
        """Send one byte every 20 ms until the client disconnects."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + header)
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b" ")
                time.sleep(0.02)

    def hang(handler: BaseHTTPRequestHandler) -> None:
        over.wait(20) if handler.path == "/api/jobs/job" else ray_dashboard(handler)

    monkeypatch.setattr(module, "LIST_SECONDS", 0.3)
    for header in (b"X-Slow: ", b"Content-Length: 1000000\r\n\r\n"):
        with serving(partial(drip, header)) as server, pytest.raises(RunFailed, match="no complete response"):
            open_dashboard(server.url)
    monkeypatch.setattr(module, "LIST_SECONDS", 60.0)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RunFailed, match="no Ray dashboard answers"):
        open_dashboard(f"http://127.0.0.1:{silent.getsockname()[1]}")
    over = threading.Event()
    with serving(hang) as server:
        with pytest.raises(RunFailed, match="gave no answer to /api/jobs/job"):
            open_dashboard(server.url).get_job_info("job")
        over.set()


def test_token_is_given_by_reference_fits_a_header_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="env:NAME or file:PATH"):
        find_token("the-token-itself")
    for token in ("two\nlines", "caf\xe9", "", "nul\0"):
        monkeypatch.setattr(module, "resolve_secret", lambda reference, token=token: token)
        with pytest.raises(ConfigError, match="expected a token") as error:
            find_token("env:SECRET")
        assert not token.strip() or token not in str(error.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user without a home
    assert find_token(None) is None


def test_job_has_its_code_a_stable_id_and_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def submitted(states: dict[str, str], *overrides: str) -> str:
        jobs = [SimpleNamespace(submission_id=name, status=status) for name, status in states.items()]
        monkeypatch.setattr(module, "open_dashboard", lambda *_: Mock(list_jobs=lambda: jobs))
        return submit(load_config(DEMO, overrides), "127.0.0.1:8265", False)["job"]

    (tmp_path / "run.yaml").write_text("name: run")
    with serving(ray_dashboard) as server:
        client = open_dashboard(server.url)
        assert client.submit_job(entrypoint="true", runtime_env={"working_dir": str(tmp_path)}) == "job"
        assert [method for method, *_ in server.seen[-3:]] == ["GET", "PUT", "POST"]
    base = submitted({"another": "FAILED"})
    assert base.startswith("mome-demo-")
    assert base != submitted({}, "stages.vision.steps=81")
    for states, suffix in (
        ({}, ""), ({"": "RUNNING"}, ""), ({"": "SUCCEEDED"}, ""), ({"": "FAILED"}, "-2"),
        ({"": "FAILED", "-2": "STOPPED"}, "-3"), ({"": "FAILED", "-2": "PENDING"}, "-2"),
    ):  # fmt: skip
        assert submitted({base + known: status for known, status in states.items()}) == base + suffix
    ended = "Job entrypoint command failed with exit code 1"
    info = SimpleNamespace(message=f"{ended}, last available logs (truncated):\nerror: no data")
    client = Mock(list_jobs=list, get_job_info=lambda job: info)
    monkeypatch.setattr(module, "open_dashboard", lambda *_: client)
    monkeypatch.setattr(module, "stream_logs", lambda *_: "FAILED")
    monkeypatch.setattr(describe, "code_tags", lambda: {describe.COMMIT: "c0ffee", describe.DIRTY: "true"})
    for python, expected in ((sys.executable, sys.executable), ("/no such/python", "python")):
        monkeypatch.setattr(sys, "executable", python)
        with pytest.raises(RunFailed, match=rf"ended as FAILED: {ended}$"):
            submit(load_config(DEMO), "127.0.0.1:8265", True)
        job = client.submit_job.call_args.kwargs
        program, _, arguments = job["entrypoint"].partition(" -m ")
        assert arguments == "jobs.cli train run.yaml --json"
        assert subprocess.check_output(["bash", "-c", f"echo {program}"], text=True).strip() == expected
        code = {"MOME_GIT_COMMIT": "c0ffee", "MOME_GIT_DIRTY": "true"}
        assert job["runtime_env"]["env_vars"] == code | {"MOME_SUBMISSION_ID": job["submission_id"]}
    with pytest.raises(RunFailed):
        submit(load_config(DEMO), "127.0.0.1:8265", True, "mine")
    assert client.submit_job.call_args.kwargs["submission_id"] == "mine"
    assert client.submit_job.call_count == 3


@pytest.mark.parametrize("silence", [0.0, 60.0])
def test_followed_output_is_shown_once(silence: float, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = list[str]()

    async def tail(job: str) -> AsyncIterator[str]:
        """Break, or receive nothing more, in the middle of the output of the first call."""
        calls.append(job)
        yield "one "
        if len(calls) == 1:
            await asyncio.sleep(silence)
            raise RuntimeError("the connection broke")
        yield "two\n"

    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    client = Mock(tail_job_logs=tail)
    client.get_job_status = lambda job: JobStatus.SUCCEEDED if len(calls) > 1 else JobStatus.RUNNING
    assert module.stream_logs(client, "job") == "SUCCEEDED"
    assert capsys.readouterr().err == "one two\n"
