"""An MLflow server that tests can kill and start again with its data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.support.ranks import free_port

ADMIN, PASSWORD = "admin", "a long password of the test's"


class Server:
    """An `mlflow server` process."""

    def __init__(
        self,
        folder: Path,
        backend: str | None = None,
        artifacts: str | None = None,
        environment: Mapping[str, str] | None = None,
        login: bool = False,
    ):
        """Choose a port. `backend`: database URL (default: SQLite in `folder`); `artifacts`: default, below `folder`.

        `login`: use MLflow's basic auth with `ADMIN` and `PASSWORD`.
        """
        self.port = free_port()
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "server.db"
        self.process: subprocess.Popen[bytes] | None = None
        self._backend = backend or f"sqlite:///{self.database}"
        self._artifacts = artifacts or str(folder / "files")
        self._environment = {**os.environ, **(environment or {}), "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        self._login = login
        if login:
            self._environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(_auth_config(folder))}
            self._environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of the test's"}

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self._backend, "--artifacts-destination", self._artifacts,
        ]  # fmt: skip
        if self._login:
            command += ["--app-name", "basic-auth"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True, cwd=self.folder
            )
        self._wait()

    def _wait(self) -> None:
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                if self.process is None or self.process.poll() is not None:
                    break
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # only the process group started by this object
            self.process.wait()
            self.process = None


def _auth_config(folder: Path) -> Path:
    path = folder / "auth.ini"
    path.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return path
