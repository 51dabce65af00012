"""A run may start with a working tracking server; every other address is rejected in one message."""

import contextlib
import json
import os
import random
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config.errors import TrackingError
from pipeline.tracking import mlflow_server
from pipeline.tracking.mlflow_server import connect, find_fault
from tests.support.fuzz import fuzz_rounds, mutate

HEALTH, API = "/health", "/api/2.0/mlflow/experiments/get-by-name"
MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})
PAGE, FOUND = "<html>a page for everything</html>", json.dumps({"experiment": {"experiment_id": "0"}})
SERVERS = [
    *({HEALTH: answer} for answer in ((200, "OK"), (401, ""), (403, ""))), {HEALTH: (200, PAGE), API: (200, FOUND)},
    *({API: answer} for answer in ((200, FOUND), (404, MISSING), (401, ""))),
]  # fmt: skip
OTHERS = [
    *({API: answer} for answer in ((404, '{"detail": "Not Found"}'), (200, "[" * 100_000))),
    {HEALTH: (200, PAGE), API: (200, PAGE)}, {HEALTH: (500, "broken")}, {},
]  # fmt: skip


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], object], tls: Path | None = None) -> Iterator[int]:
    """Let `answer` serve all connections to a port, which is yielded."""

    def serve() -> None:
        while listener.fileno() >= 0:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                connection = stack.enter_context(listener.accept()[0])
                if tls is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(tls)
                    connection = stack.enter_context(context.wrap_socket(connection, server_side=True))
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        (thread := threading.Thread(target=serve, daemon=True)).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def http(answers: dict[str, tuple[int, str]]) -> Callable[[socket.socket], None]:
    """Return an HTTP server of these paths, which answers 404 for all others."""

    def answer(connection: socket.socket) -> None:
        path = connection.recv(65536).split()[1].decode().partition("?")[0]
        status, body = answers.get(path, (404, "<html>no</html>"))
        connection.sendall(f"HTTP/1.1 {status} -\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode())

    return answer


def test_only_tracking_servers_that_answer_in_http_and_in_time_are_accepted(monkeypatch):
    for answers in SERVERS + OTHERS:
        with listening(http(answers)) as port:
            for address in (f"localhost:{port}", f"localhost:{port}/", f"me:hunter2@localhost:{port}"):
                fault = find_fault(f"http://{address}")
                assert fault is None if answers in SERVERS else "is it an MLflow server?" in (fault or ""), answers

    monkeypatch.setattr(mlflow_server, "ANSWER_SECONDS", 1.0)
    replies = (b"220 ready\r\n", b"\x15\x03\x01\x00\x02\x02F", b"", b"HTTP/9\r\n\r\n")
    for scheme, reply in [*(("http", reply) for reply in replies), ("https", b"SSH-2.0-x\r\n")]:
        with listening(lambda connection, reply=reply: (connection.sendall(reply), connection.recv(65536))) as port:
            assert "does not answer" in (find_fault(f"{scheme}://127.0.0.1:{port}") or ""), reply
    monkeypatch.setattr(mlflow_server, "ANSWER_SECONDS", 0.2)
    for begins in (b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b""):
        over = threading.Event()

        def drip(connection: socket.socket, begins=begins, over=over) -> None:
            connection.sendall(begins)
            while not over.wait(0.05):
                connection.sendall(b"O")

        with listening(drip) as port:
            assert "no complete response" in (find_fault(f"http://127.0.0.1:{port}") or ""), begins
            over.set()


MALFORMED = [
    "http://[::1", "http://server:50o0", "http://server:99999", "http://", "http:///x", "://x", "", "x", "http://a b",
    "http://[zz]", "http://" + "a" * 300, "http://ä\udcff", "http://server:-1", "postgresql://[::1/x", "ftp://server",
    "postgresql://db:50o0/x", "postgresql://db/x?host=/socket&port=abc", "file:///mlruns", "mlruns", "http://a\nb",
    "http://\0", "postgresql://u:p@s@127.0.0.1:1/x", "http://u:a/b@127.0.0.1:1", "http://u:a#b@127.0.0.1:1",
]  # fmt: skip
HOSTED = [  # addresses that only the client resolves
    "databricks", "databricks-uc", "databricks://profile", "databricks-uc://profile", "uc:http://x",
    "azureml://eastus.api.azureml.ms/mlflow/v1.0/subscriptions/1", "postgresql:///mlflow",
    "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/mine", "mssql+pyodbc://a-data-source",
    "mssql+pyodbc:///?odbc_connect=x", "postgresql://a,b/x?target_session_attrs=any",
    "postgresql://u@/db?host=a,b&port=5432,5433",
]  # fmt: skip
MUTATED = [
    "http://me:pass@server:5000/base?x=1#f", "postgresql+psycopg2://me:pass@db:5432/mlflow?host=/tmp",
    "mysql://[::1]:3306/x?unix_socket=/a", "sqlite:////tmp/mlflow.db",
]  # fmt: skip


def test_malformed_addresses_are_rejected_and_hosted_ones_accepted(monkeypatch):
    assert [uri for uri in [*MALFORMED, *HOSTED] if find_fault(uri) is None] == HOSTED
    with pytest.raises(TrackingError, match=r"tracking.uri http\+nothing://server: MLflow's client cannot use it"):
        connect("http+nothing://me:hunter2@server")
    monkeypatch.setattr("socket.create_connection", Mock(side_effect=OSError("no network in this test")))
    rng = random.Random(5)
    for _ in range(fuzz_rounds(500)):  # raises nothing
        find_fault(mutate(rng.choice(MUTATED).encode(), rng).decode(errors="surrogateescape"))


def test_each_database_is_contacted_at_its_port_or_socket_as_its_driver_does(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        for password in ("a:b", "a#b", "a/b+c", "a?b", "a%40b"):
            assert find_fault(f"postgresql://mlflow:{password}@127.0.0.1:{port}/mlflow") is None
            fault = find_fault(f"postgresql://mlflow:{password}@127.0.0.1:1/mlflow") or ""
            assert ("does not answer at 127.0.0.1:1" in fault, password in fault) == (True, False)
    uri = f"postgresql:///mlflow?host={tmp_path}"
    assert ".s.PGSQL.5432" in (find_fault(uri) or "")
    with socket.socket(socket.AF_UNIX) as database:
        database.bind(str(tmp_path / ".s.PGSQL.5432"))
        database.listen()
        assert find_fault(uri) is None
    monkeypatch.setattr("socket.create_connection", connections := Mock())
    uris = ("postgresql://127.0.0.1/x", "mysql+pymysql://127.0.0.1/x", "mssql+pyodbc://127.0.0.1/x?driver=ODBC")
    uris += ("postgresql:///x?host=127.0.0.1&port=5433", "postgresql://[::1]:7/x")
    assert [find_fault(uri) for uri in uris] == [None] * 5
    assert [call.args[0][1] for call in connections.call_args_list] == [5432, 3306, 1433, 5433, 7]


def test_the_clients_tls_variables_are_used(tmp_path, monkeypatch):
    certificate, public = tmp_path / "server.pem", tmp_path / "cert.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", certificate]
    options += ["-addext", "subjectAltName=DNS:localhost", "-out", public]
    subprocess.run(["openssl", "req", *options], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + public.read_text())
    with listening(http({HEALTH: (200, "OK")}), certificate) as port:
        address = f"https://localhost:{port}"
        assert "CERTIFICATE_VERIFY_FAILED" in (find_fault(address) or "")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(public))
        assert find_fault(address) is None
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "absent.pem"))
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in (find_fault(address) or "")
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        assert find_fault(address) is None


def test_sqlite_paths_that_mlflow_can_create_or_open_are_accepted(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.db").write_text("no database, but some text", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for fault, paths in {
        "in memory": ("", ":memory:", "file::memory:?cache=shared"), "is not a file": ("/", "{}/pipe"),
        "not an SQLite database": ("{}/text.db", "{}/text.db?timeout=20"),
        "cannot be used": ("{}/loop", "{}/" + "a" * 300, "{}/a\0b"), "not a writable folder": ("{}/text.db/mlflow.db",),
    }.items():  # fmt: skip
        for path in paths:
            assert fault in (find_fault("sqlite:///" + path.replace("{}", str(tmp_path))) or ""), path
    with contextlib.closing(sqlite3.connect(tmp_path / "made.db", isolation_level=None)) as database:
        database.execute("create table t (x)")
    (tmp_path / "empty.db").touch()
    for name in ("made.db", "made.db?timeout=20", "empty.db", "absent.db", "new/folder/absent.db"):
        assert find_fault(f"sqlite:///{tmp_path}/{name}") is None
