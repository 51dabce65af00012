"""A recorded run and its report."""

from __future__ import annotations

from pathlib import Path

import botocore.session
import pytest

from pipeline.data.storage import Storage, join
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.reports.run_report import RunReport, collect_report
from pipeline.tracking.committed import CommittedJournal
from pipeline.tracking.journal import Journal
from tests.support.bad_shards import Planted
from tests.support.recorded_run import plant_pairs, record_run


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_pairs(tmp_path_factory.mktemp("planted") / "pairs")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, planted: Planted) -> Path:
    """Record a run, and another that differs in three config keys; return their folder."""
    folder = tmp_path_factory.mktemp("runs")
    record_run(folder, planted)
    record_run(folder, planted, "other", "seed=5", "stages.pairs.global_batch_size=16", "model.width=64")
    return folder


@pytest.fixture(scope="session")
def run(runs: Path) -> RunFolder:
    return open_run(str(runs / "recorded"))


@pytest.fixture(scope="session")
def report(run: RunFolder) -> RunReport:
    return collect_report(run, price=2.5)


@pytest.fixture
def s3_run(request: pytest.FixtureRequest, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copy the recorded run to an object store, with a committed journal that this machine lacks; return its URL."""
    store = request.getfixturevalue("moto_store")
    for name, value in (store.environment | {"MOME_CACHE": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    client = botocore.session.get_session().create_client("s3", endpoint_url=store.endpoint)
    client.create_bucket(Bucket="recorded-run")
    storage, url = Storage(), "s3://recorded-run/recorded"
    for path in Path(run.folder).rglob("*"):
        if path.is_file() and "journal" not in path.parts:
            storage.write(join(url, str(path.relative_to(run.folder))), path.read_bytes())
    CommittedJournal(storage, f"{url}/journal").commit(Journal(Path(run.folder) / "journal"))
    return url
