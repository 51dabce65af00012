"""A run may start with a working tracking server; every other address is rejected in one message."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.config.errors import TrackingError
from pipeline.tracking import mlflow_server
from pipeline.tracking.mlflow_server import find_fault
from tests.support.fuzz import fuzz_rounds, mutate

HEALTH, API = "/health", "/api/2.0/mlflow/experiments/get-by-name"
MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})
FOUND = json.dumps({"experiment": {"experiment_id": "0"}})


@contextlib.contextmanager
def serving(answers: dict[str, tuple[int, str]], tls: Path | None = None) -> Iterator[str]:
    """Serve these paths over HTTP, and 404 for all others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.split("?")[0], (404, "<html>no</html>"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            http.socket = context.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"{'https' if tls else 'http'}://localhost:{http.server_port}"
        finally:
            http.shutdown()


@pytest.mark.parametrize(
    "answers",
    [
        {HEALTH: (200, "OK")},
        {API: (200, FOUND)},
        {API: (404, MISSING)},
        {HEALTH: (200, "<html>a page for everything</html>"), API: (200, FOUND)},
        {HEALTH: (401, "")},
        {HEALTH: (403, "")},
        {API: (401, "")},
    ],
    ids=["health", "api", "api without the experiment", "page and api", "login", "forbidden", "login of the api"],
)
def test_working_servers_are_accepted(answers: dict[str, tuple[int, str]]) -> None:
    with serving(answers) as address:
        assert find_fault(address) is None
        assert find_fault(address + "/") is None
        assert find_fault(address.replace("://", "://me:hunter2@")) is None


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {HEALTH: (200, "<html>a page for everything</html>"), API: (200, "<html></html>")},
        {API: (404, '{"detail": "Not Found"}')},
        {API: (200, "[" * 100_000)},
        {HEALTH: (500, "broken")},
    ],
    ids=["none", "page for everything", "another API", "deep", "broken"],
)
def test_other_http_servers_are_rejected(answers: dict[str, tuple[int, str]]) -> None:
    with serving(answers) as address:
        assert "is it an MLflow server?" in (find_fault(address) or "")


@pytest.mark.parametrize(
    "said", [b"220 ready\r\n", b"\x15\x03\x01\x00\x02\x02F", b"SSH-2.0-x\r\n", b"", b"HTTP/9\r\n\r\n"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_port_without_http_is_rejected(said: bytes, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(said)
                    connection.recv(65536)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        fault = find_fault(f"{scheme}://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()

    assert "does not answer" in (fault or "")


@pytest.mark.parametrize(
    "uri",
    [
        "http://[::1", "http://server:50o0", "http://server:99999", "http://", "http:///x", "://x", "", "x",
        "http://a b",
        "http://[zz]", "http://" + "a" * 300, "http://ä\udcff", "http://server:-1", "postgresql://[::1/x", "ftp://server",
        "postgresql://db:50o0/x", "postgresql://db/x?host=/socket&port=abc", "file:///mlruns", "mlruns", "http://a\nb",
        "http://\0", "postgresql://u:p@s@127.0.0.1:1/x", "http://u:a/b@127.0.0.1:1", "http://u:a#b@127.0.0.1:1",
    ],
)  # fmt: skip
def test_malformed_addresses_are_rejected(uri: str) -> None:
    assert find_fault(uri)


@pytest.mark.parametrize("password", ["a:b", "a#b", "a/b+c", "a?b", "a%40b"])
def test_database_passwords_are_parsed_like_the_driver_does(password: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        assert find_fault(f"postgresql://mlflow:{password}@127.0.0.1:{port}/mlflow") is None
        fault = find_fault(f"postgresql://mlflow:{password}@127.0.0.1:1/mlflow")
    assert "does not answer at 127.0.0.1:1" in (fault or "")
    assert password not in (fault or "")


@pytest.mark.parametrize(
    "uri",
    [
        "databricks", "databricks-uc", "databricks://profile", "databricks-uc://profile", "uc:http://x",
        "azureml://eastus.api.azureml.ms/mlflow/v1.0/subscriptions/1", "postgresql:///mlflow",
        "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/mine", "mssql+pyodbc://a-data-source",
        "mssql+pyodbc:///?odbc_connect=x", "postgresql://a,b/x?target_session_attrs=any",
    ],
)  # fmt: skip
def test_addresses_that_only_the_client_resolves_are_accepted(uri: str) -> None:
    assert find_fault(uri) is None


@pytest.mark.parametrize(
    ("uri", "port"),
    [
        ("postgresql://127.0.0.1/x", 5432),
        ("mysql+pymysql://127.0.0.1/x", 3306),
        ("mssql+pyodbc://127.0.0.1/x?driver=ODBC", 1433),
        ("postgresql:///x?host=127.0.0.1&port=5433", 5433),
        ("postgresql://[::1]:7/x", 7),
    ],
)
def test_each_database_is_contacted_at_its_port(uri: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        ports.append(address[1])
        return socket.socket()

    monkeypatch.setattr("socket.create_connection", connect)

    assert find_fault(uri) is None
    assert ports == [port]


def test_a_database_is_contacted_at_its_unix_socket(tmp_path: Path) -> None:
    uri = f"postgresql:///mlflow?host={tmp_path}"
    assert ".s.PGSQL.5432" in (find_fault(uri) or "")
    with socket.socket(socket.AF_UNIX) as database:
        database.bind(str(tmp_path / ".s.PGSQL.5432"))
        database.listen()
        assert find_fault(uri) is None


def test_the_clients_tls_variables_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "server.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", certificate, "-out", tmp_path / "cert.pem",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_text(certificate.read_text() + (tmp_path / "cert.pem").read_text())
    with serving({HEALTH: (200, "OK")}, tls=certificate) as address:
        assert "CERTIFICATE_VERIFY_FAILED" in (find_fault(address) or "")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "cert.pem"))
        assert find_fault(address) is None
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "absent.pem"))
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in (find_fault(address) or "")
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        assert find_fault(address) is None


def test_mutated_addresses_raise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.create_connection", unreachable)
    rng = random.Random(5)
    uris = [
        "http://me:pass@server:5000/base?x=1#f", "postgresql+psycopg2://me:pass@db:5432/mlflow?host=/tmp",
        "mysql://[::1]:3306/x?unix_socket=/a", "sqlite:////tmp/mlflow.db",
    ]  # fmt: skip
    for _ in range(fuzz_rounds(500)):
        find_fault(mutate(rng.choice(uris).encode(), rng).decode(errors="surrogateescape"))


def test_unusable_addresses_of_the_client_are_reported() -> None:
    from pipeline.tracking.mlflow_server import connect

    with pytest.raises(TrackingError, match=r"tracking.uri http\+nothing://server: MLflow's client cannot use it"):
        connect("http+nothing://me:hunter2@server")


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "in memory"),
        (":memory:", "in memory"),
        ("file::memory:?cache=shared", "in memory"),
        ("/", "is not a file"),
        ("{}", "is not a file"),
        ("{}/pipe", "is not a file"),
        ("{}/text.db", "not an SQLite database"),
        ("{}/text.db?timeout=20", "not an SQLite database"),
        ("{}/loop", "cannot be used"),
        ("{}/" + "a" * 300, "cannot be used"),
        ("{}/a\0b", "cannot be used"),
        ("/dev/null", "is not a file"),
    ],
)
def test_impossible_sqlite_paths_are_rejected(tmp_path: Path, path: str, fault: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.db").write_text("no database, but some text", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert fault in (find_fault("sqlite:///" + path.replace("{}", str(tmp_path))) or "")


def test_existing_and_new_sqlite_files_are_accepted(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "made.db")) as database:
        database.execute("create table t (x)")
        database.commit()
    (tmp_path / "empty.db").touch()
    for name in ("made.db", "made.db?timeout=20", "empty.db", "absent.db", "new/folder/absent.db"):
        assert find_fault(f"sqlite:///{tmp_path}/{name}") is None


@pytest.mark.parametrize(
    "begins", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b""]
)
def test_slowly_sending_server_times_out(monkeypatch: pytest.MonkeyPatch, begins: bytes) -> None:
    monkeypatch.setattr(mlflow_server, "ANSWER_SECONDS", 0.2)
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(begins)
            while not over.wait(0.05):
                connection.sendall(b"O")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        assert "no complete response" in (find_fault(f"http://127.0.0.1:{listener.getsockname()[1]}") or "")
        over.set()
        thread.join()
