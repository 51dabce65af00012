"""infra/swift.sh: a started store serves, and stopping it leaves nothing running."""

import os
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

SWIFT = Path(__file__).resolve().parents[2] / "infra" / "swift.sh"


def swift(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(SWIFT), *map(str, arguments)]
    return subprocess.run(command, env=environment or None, capture_output=True, text=True, timeout=120)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line contains the folder."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]


def test_stopped_store_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    started = swift("start", folder)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    try:
        settings = dict(word.split("=", 1) for word in started.stdout.split()[1:])
        assert set(settings) == {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        address = (urlsplit(settings["AWS_ENDPOINT_URL"]).hostname, urlsplit(settings["AWS_ENDPOINT_URL"]).port)
        socket.create_connection(address).close()
        assert len(processes_of(folder)) == 5
        again = swift("start", folder)
        assert (again.returncode, "a store runs in" in again.stderr) == (1, True)
        assert len(processes_of(folder)) == 5
    finally:
        assert swift("stop", folder).returncode == 0
    assert processes_of(folder) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert list(folder.glob("*.pid")) == []


def test_message_without_swift_names_the_installation(tmp_path: Path) -> None:
    refused = swift("start", tmp_path / "store", PATH="/nonexistent", HOME=os.environ.get("HOME", "/"))
    assert refused.returncode == 3
    assert "Swift is not installed; as root: infra/swift.sh install" in refused.stderr
    assert not (tmp_path / "store").exists()
