"""Object stores with an S3 API that run on this machine, one test's bucket in them, and a small file system."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig

SWIFT = Path(__file__).resolve().parents[2] / "infra" / "swift.sh"
CANNOT_RUN_HERE = 3  # exit status of swift.sh when Swift is not installed or the file system does not support it


@dataclass(frozen=True)
class Store:
    """URL and credentials of a running store."""

    endpoint: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"} | keys


@dataclass(frozen=True)
class S3:
    """An empty bucket that belongs to one test."""

    endpoint: str
    bucket: str
    config: StorageConfig
    environment: dict[str, str]

    def url(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


@contextmanager
def moto() -> Iterator[Store]:
    """Run moto's S3 server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Store(f"http://{host}:{port}", "test-key", "test-secret")
    server.stop()


@contextmanager
def swift(folder: Path) -> Iterator[Store]:
    """Run OpenStack Swift's daemons below `folder`. They wait on this process's pipe, so they end with it."""
    command, pipe = ["bash", str(SWIFT), "run", str(folder)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        settings = dict(word.split("=", 1) for word in process.stdout.readline().split()[1:])
        if not settings:
            reason = process.stderr.read().strip()
            if process.wait() == CANNOT_RUN_HERE:
                pytest.skip(reason)
            pytest.fail(f"Swift is installed and did not start: {reason}")
        yield Store(settings["AWS_ENDPOINT_URL"], settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"])
        process.terminate()
        assert process.wait(30) == 0
    shutil.rmtree(folder)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a file system of 8 MiB; yield None where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "mome-test", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def fill_disk(file: Path) -> None:
    """Append to a file until its file system is full."""
    with suppress(OSError), file.open("ab", buffering=0) as stream:
        while True:
            stream.write(bytes(2**12))
