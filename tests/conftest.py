"""Fixtures that several packages' tests share: real data beside the repository, an S3 store, small sources of pairs."""

from __future__ import annotations

import io
import json
import os
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


@pytest.fixture
def shared() -> Path:
    """The folder of real data and reference tensors beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: it holds real data that is not part of the repository")
    return SHARED.resolve()


@dataclass(frozen=True)
class S3:
    """A running S3 store with one empty bucket of the test's own."""

    endpoint: str
    bucket: str
    config: StorageConfig

    def url(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """moto's S3 server, reached through `config`; processes that the test starts inherit the credentials."""
    import botocore.session

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOME_TEST_KEY", "test-key")
    monkeypatch.setenv("MOME_TEST_SECRET", "test-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="test-key",
        aws_secret_access_key="test-secret",
    )
    client.create_bucket(Bucket=bucket)
    config = StorageConfig(
        endpoint_url=s3_endpoint,
        key="env:MOME_TEST_KEY",
        secret="env:MOME_TEST_SECRET",
        attempts=3,
        deadline_seconds=20.0,
    )
    return S3(s3_endpoint, bucket, config)


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
