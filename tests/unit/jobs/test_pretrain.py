"""What the driver settles before ranks are placed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.pretrain import for_ranks
from pipeline.config.load import load_config
from pipeline.tracking.places import tracking_uri

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


@pytest.mark.parametrize("output", ["runs", "s3://bucket/runs"])
def test_ranks_in_another_folder_record_in_the_same_mlflow(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "rank").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    config = load_config(DEMO, [f"output={output}"])
    expected = tracking_uri(config)
    settled = for_ranks(config)
    monkeypatch.chdir(tmp_path / "rank")
    assert tracking_uri(settled) == expected


def test_a_database_named_relative_to_the_driver_is_the_ranks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DEMO, ["tracking.uri=sqlite:///mine.db"])
    assert for_ranks(config).tracking.uri == f"sqlite:///{tmp_path}/mine.db"
    assert for_ranks(for_ranks(config)).tracking.uri == f"sqlite:///{tmp_path}/mine.db"


def test_ranks_in_another_folder_read_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settled = for_ranks(load_config(DEMO, ["output=s3://bucket/runs"]))
    assert settled.sources["scenes"].shards == str(tmp_path / "runs/demo-data/scenes")
    assert settled.output == "s3://bucket/runs"
    assert for_ranks(settled) == settled
