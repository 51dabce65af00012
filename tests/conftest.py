"""Fixtures that several packages' tests share: real data beside the repository, an S3 store, small sources of pairs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.config.schema import StorageConfig

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"
SWIFT = Path(__file__).resolve().parents[1] / "infra" / "swift.sh"
CANNOT_RUN_HERE = 3  # its exit status when Swift is not installed, or the file system does not serve


@pytest.fixture
def shared() -> Path:
    """The folder of real data and reference tensors beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: it holds real data that is not part of the repository")
    return SHARED.resolve()


@dataclass(frozen=True)
class Store:
    """A running object store with an S3 API: its URL and credentials."""

    endpoint: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """The usual environment variables that reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@dataclass(frozen=True)
class S3:
    """One empty bucket of the test's own in a running store."""

    endpoint: str
    bucket: str
    config: StorageConfig
    environment: dict[str, str]

    def url(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


@pytest.fixture(scope="session")
def moto_store() -> Iterator[Store]:
    """moto's S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Store(f"http://{host}:{port}", "test-key", "test-secret")
    server.stop()


@pytest.fixture(scope="session")
def swift_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """OpenStack Swift's daemons, which end with this process however it ends: they wait on its pipe."""
    folder = tmp_path_factory.mktemp("swift")
    command = ["bash", str(SWIFT), "run", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        told = dict(word.split("=", 1) for word in process.stdout.readline().split()[1:])
        if not told:
            reason = process.stderr.read().strip()
            if process.wait() == CANNOT_RUN_HERE:
                pytest.skip(reason)
            pytest.fail(f"Swift is installed and did not start: {reason}")
        yield Store(told["AWS_ENDPOINT_URL"], told["AWS_ACCESS_KEY_ID"], told["AWS_SECRET_ACCESS_KEY"])
        process.terminate()
        assert process.wait(30) == 0
    shutil.rmtree(folder)


@pytest.fixture(params=["moto", "swift"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A bucket in each store, reached through `config`; processes that the test starts inherit the credentials.

    A test that one store serves as well as two asks for it: `@pytest.mark.parametrize("s3", ["moto"], indirect=True)`.
    """
    import botocore.session

    store: Store = request.getfixturevalue(f"{request.param}_store")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOME_TEST_KEY", store.key)
    monkeypatch.setenv("MOME_TEST_SECRET", store.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=store.endpoint,
        region_name="us-east-1",
        aws_access_key_id=store.key,
        aws_secret_access_key=store.secret,
    )
    client.create_bucket(Bucket=bucket)
    config = StorageConfig(
        endpoint_url=store.endpoint,
        key="env:MOME_TEST_KEY",
        secret="env:MOME_TEST_SECRET",
        deadline_seconds=20.0,
    )
    return S3(store.endpoint, bucket, config, store.environment)


Members = dict[str, bytes]


def picture(number: int, size: int = 24) -> bytes:
    """A JPEG that no other number gives."""
    random = np.random.default_rng(number)
    pixels = np.repeat(np.repeat(random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8), 4, 0), 4, 1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")


def pair(number: int) -> Members:
    """A good pair: a picture and three captions."""
    captions = [f"picture {number} shows a thing in way {way}" for way in "abc"]
    return {"jpg": picture(number), "json": json.dumps({"captions": captions}).encode()}


def tar_bytes(samples: dict[str, Members]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def make_tar() -> Callable[[dict[str, Members]], bytes]:
    """Samples (key -> members) as the bytes of one tar."""
    return tar_bytes


@pytest.fixture
def make_pair() -> Callable[[int], Members]:
    """The members of the good pair of a number."""
    return pair


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., str]:
    """make_pairs(name, sizes, planted={(shard, sample): members}) -> folder of tars of pairs, not yet indexed."""

    def make(name: str, sizes: list[int], planted: dict[tuple[int, int], Members] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            samples = {}
            for sample in range(size):
                samples[f"{name}{number:05d}"] = (planted or {}).get((shard, sample)) or pair(number)
                number += 1
            (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(samples))
        return str(folder)

    return make
