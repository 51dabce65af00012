"""An MLflow server that tests can kill and start again with its data, and a PostgreSQL server for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.ranks import free_ports

ADMIN, PASSWORD = "admin", "a long password of the test's"


class Server:
    """An `mlflow server` process with its data in `folder` or at these URLs, killed at the end of a `with` block.

    `more` is of the environment; with `login`, it uses MLflow's basic auth with `ADMIN` and `PASSWORD`.
    """

    def __init__(
        self, folder: Path, backend: str = "", artifacts: str = "", more: Mapping[str, str] = {}, login: bool = False
    ):
        (port,) = free_ports(1)
        self.folder, self.uri = folder, f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, **more, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", backend or f"sqlite:///{folder}/server.db",
            "--artifacts-destination", artifacts or str(folder / "files"),
        ]  # fmt: skip
        if login:
            (settings := folder / "auth.ini").write_text(
                "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
                f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN}\nadmin_password = {PASSWORD}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            self._environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": PASSWORD}
            self._command += ["--app-name", "basic-auth"]

    def __enter__(self) -> Server:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True, cwd=self.folder
            )
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError((self.folder / "server.log").read_text())

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # only the process group started by this object
            self._process.wait()
            self._process = None

    start, kill = __enter__, __exit__


class Postgres:
    """A `postgres` in a temporary folder, which root's tests run as Debian's user; skips the test without Debian's."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
        if not programs:
            pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
        self._folder = Path(tempfile.mkdtemp(prefix="mome-postgres-"))  # pytest's folders are closed to other users
        options: dict[str, object] = {"cwd": self._folder}
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
            options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        port, binaries, data = str(*free_ports(1)), programs[-1].parent, str(self._folder / "data")
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        # Test data reachable from this machine only, so neither a password nor durability is needed.
        command = ["-D", data, "-U", "mlflow", "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8"]
        subprocess.run([str(binaries / "initdb"), *command], stdout=subprocess.DEVNULL, check=True, **options)  # type: ignore[call-overload]
        command = ["-D", data, "-p", port, "-k", str(self._folder), "-h", "127.0.0.1", "-c", "fsync=off"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([str(binaries / "postgres"), *command], **quiet, **options)  # type: ignore[call-overload]
        deadline = time.monotonic() + 120
        is_ready = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", port]
        while subprocess.run(is_ready, check=False, cwd=self._folder).returncode != 0:
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)  # fast shutdown: clients are cut off
        self._process.wait(60)
        shutil.rmtree(self._folder)
