"""A PostgreSQL server from Debian's package, in a temporary folder and on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.ranks import free_port

USER = "mlflow"


class Postgres:
    """`initdb` and then `postgres`, run as Debian's postgres user if the tests run as root."""

    def __init__(self) -> None:
        """Choose a folder and a port; skip the test if PostgreSQL is not installed."""
        self._programs = _programs()
        self._as: dict[str, object] = {"user": "postgres", "group": "postgres", "extra_groups": []}
        if os.geteuid() != 0:
            self._as = {}
        self.folder = Path(tempfile.mkdtemp(prefix="mome-postgres-"))  # pytest's folders are closed to other users
        if self._as:
            shutil.chown(self.folder, "postgres", "postgres")
        self.port = free_port()
        self.uri = f"postgresql+psycopg2://{USER}@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Postgres:
        data = str(self.folder / "data")
        # Test data reachable from this machine only, so neither a password nor durability is needed.
        self._run("initdb", "-D", data, "-U", USER, "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8")
        arguments = ["-D", data, "-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1", "-c", "fsync=off"]
        self._process = subprocess.Popen(
            [str(self._programs / "postgres"), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder, **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)
        return self

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(  # type: ignore[call-overload]
            [str(self._programs / program), *arguments],
            cwd=self.folder, capture_output=True, text=True, check=False, **self._as,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def _answers(self) -> bool:
        command = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False, cwd=self.folder).returncode == 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # fast shutdown: clients are cut off
            self._process.wait(60)
        shutil.rmtree(self.folder)


def _programs() -> Path:
    """Return the folder of the newest PostgreSQL's programs, which Debian does not add to PATH."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    return programs[-1].parent
