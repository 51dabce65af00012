"""`mome shards regions` on Ray actors writes the same bytes for any number of actors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from tests.support.detectors import save_yolos
from tests.support.shards_command import facts_of, run_shards

pytestmark = pytest.mark.usefixtures("local_ray")


def test_one_worker_and_two_write_the_same_bytes(make_pairs, make_pair, tmp_path: Path) -> None:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"]}
    pairs, detector = make_pairs("pairs", [4, 3, 5], planted={(1, 2): bad}), save_yolos(tmp_path / "detector")
    one, two = (
        facts_of("regions", pairs, tmp_path / str(workers), "--detector", detector, "--workers", workers)
        for workers in (1, 2)
    )
    assert one["manifest"] == two["manifest"]
    assert one["bad_samples"] == two["bad_samples"] == 1


def test_folder_without_a_detector_is_rejected(make_pairs, tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    arguments = ("regions", make_pairs("pairs", [2]), tmp_path / "out", "--detector", tmp_path / "detector")
    assert "no detector that transformers can load" in str(run_shards(*arguments, fails=ConfigError).exception)
