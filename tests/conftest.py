"""Fixtures shared by the tests of several packages: real data, S3 stores, small sources of pairs."""

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import redaction
from pipeline.config.schema import StorageConfig
from tests.support.pairs import Members, pair, tar_bytes
from tests.support.stores import S3, Store, moto, swift

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per process; set before any test starts processes

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long modules first, so that the short unit tests fill both test processes until the end."""
    order = ["faults", "integration", "golden", "unit"]
    has_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in has_slow, order.index(item.path.relative_to(TESTS).parts[0])))


@pytest.fixture(scope="module", autouse=True)
def _no_ray_left_behind() -> Iterator[None]:
    """Disconnect from a Ray that a module's tests started: a run of the next module would join it unnoticed."""
    yield
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(autouse=True)
def _secrets_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets that a test registers: in the messages of a later test they may be ordinary words."""
    monkeypatch.setattr(redaction, "_known", set(redaction._known))


@pytest.fixture(scope="module")
def collectives() -> Iterator[Any]:
    """Collectives of a single rank."""
    from pipeline.training.collectives import Collectives

    alone = Collectives()
    yield alone
    alone.close()


@pytest.fixture(scope="module")
def local_ray(_no_ray_left_behind: None) -> None:
    """Start a Ray of two CPUs on this machine, which ends with the module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def shared() -> Path:
    """Return the folder `shared` next to the repository, with real data and reference tensors."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: it holds real data that is not part of the repository")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def moto_store() -> Iterator[Store]:
    with moto() as store:
        yield store


@pytest.fixture(scope="session")
def swift_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with swift(tmp_path_factory.mktemp("swift")) as store:
        yield store


@pytest.fixture(params=["moto", "swift"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3:
    """Create a bucket in each store. Processes that the test starts inherit the credentials of `config`.

    A test for which one store is enough selects it: `@pytest.mark.parametrize("s3", ["moto"], indirect=True)`.
    """
    import botocore.session

    store: Store = request.getfixturevalue(f"{request.param}_store")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    secrets = {"MOME_TEST_KEY": store.key, "MOME_TEST_SECRET": store.secret, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    keys, url = {"aws_access_key_id": store.key, "aws_secret_access_key": store.secret}, store.endpoint
    client = botocore.session.get_session().create_client("s3", "us-east-1", endpoint_url=url, **keys)
    client.create_bucket(Bucket=(bucket := f"test-{uuid.uuid4().hex[:12]}"))
    key, secret = "env:MOME_TEST_KEY", "env:MOME_TEST_SECRET"
    config = StorageConfig(endpoint_url=url, key=key, secret=secret, retry_timeout_seconds=20.0)
    return S3(url, bucket, config, store.environment)


@pytest.fixture
def make_tar() -> Callable[[dict[str, Members]], bytes]:
    return tar_bytes


@pytest.fixture
def make_pair() -> Callable[[int], Members]:
    return pair


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., str]:
    """Return make_pairs(name, sizes, planted={(shard, sample): members}), which writes a folder of unindexed tars."""

    def make(name: str, sizes: list[int], planted: dict[tuple[int, int], Members] | None = None) -> str:
        (folder := tmp_path / name).mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            samples = {}
            for sample in range(size):
                samples[f"{name}{number:05d}"] = (planted or {}).get((shard, sample)) or pair(number)
                number += 1
            (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(samples))
        return str(folder)

    return make
