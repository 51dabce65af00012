"""`mome evaluate` and `mome embed` give the same results on Ray ranks as in one process."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from jobs.embed import embed
from jobs.evaluate import evaluate_checkpoint
from tests.support.finished_run import untrained_weights


@pytest.mark.slow
def test_ranks_on_ray_equal_one_process(tmp_path: Path) -> None:
    config, url = untrained_weights(tmp_path)
    report = tmp_path / "report.html"
    alone = evaluate_checkpoint(url, track=False, report=report)
    page = report.read_bytes()
    assert evaluate_checkpoint(url, track=False, report=report, workers=2) == alone
    assert alone is not None
    assert (alone["pairs"], alone["trained_on"]) == (22, ["vision", "pairs"])
    assert report.read_bytes().count(b"<img") == page.count(b"<img")
    shards = config.sources["scenes"].shards
    one, two = (embed(shards, url, str(tmp_path / f"{workers}"), workers) for workers in (None, 2))
    assert one is not None
    assert two == {**one, "out": str(tmp_path / "2")}
    files = sorted(file.name for file in (tmp_path / "None").glob("*.parquet"))
    assert files
    for name in files:
        assert parquet.read_table(tmp_path / "None" / name) == parquet.read_table(tmp_path / "2" / name)
