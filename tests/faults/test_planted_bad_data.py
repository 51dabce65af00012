"""Planted bad data is found exactly, by `mome shards check` before training and by the loader in it (contract C7)."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.shards import app
from pipeline.config.errors import DataError
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.bad_shards import BAD, BREAKS, KINDS, Expected, Planted, plant, read_epoch, write_tar
from tests.support.pairs import pair


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Return 120 indexed pairs in five shards, 36 of them bad in 19 ways."""
    planted_pairs = plant(tmp_path_factory.mktemp("planted") / "pairs")
    index_shards(Storage(), planted_pairs.folder)
    return planted_pairs


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    """Return thirty good, indexed pairs; tests break the middle shard."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"s{n}", pair(n)) for n in range(10 * shard, 10 * shard + 10)])
    index_shards(Storage(), str(tmp_path))
    return tmp_path


def check(folder: object, *options: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["check", str(folder), "--json", "--workers", "1", *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def as_expected(record: dict) -> Expected:
    return Expected(record["shard"], record["key"], record["offset"], record["stage"])


def test_planted_set_contains_every_kind(planted: Planted):
    assert {kind: len(found) for kind, found in planted.bad.items()} == {k: 1 + n % 3 for n, k in enumerate(KINDS)}
    assert len(planted.expected) == sum(map(len, planted.bad.values()))
    assert len(KINDS) >= 12


def test_check_finds_exactly_the_planted_samples(planted: Planted, tmp_path: Path):
    status, summary = check(planted.folder, "--report", tmp_path / "deep" / "bad.jsonl")
    assert status == 3
    assert (summary["num_samples"], summary["shards"]) == (planted.samples, 5)
    assert summary["broken_shards"] == {}
    records = [json.loads(line) for line in (tmp_path / "deep" / "bad.jsonl").read_text().splitlines()]
    assert Counter(map(as_expected, records)) == Counter(planted.expected)
    assert summary["bad_samples"] == len(records) == sum(summary["kinds"].values())
    assert all(record["reason"] for record in records)


def test_loader_quarantines_exactly_the_planted_samples(planted: Planted, tmp_path: Path):
    check(planted.folder, "--report", tmp_path / "bad.jsonl")
    checked = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    records = read_epoch(planted.folder, planted.samples, streams=5)
    assert Counter(map(as_expected, records)) == Counter(planted.expected)
    assert {(as_expected(r), r["reason"]) for r in checked} == {(as_expected(r), r["reason"]) for r in records}
    bad = {sample.key for kind in BAD for sample in planted.bad[kind]}
    assert not bad & {record["replaced_by"] for record in records}


def test_reports_of_one_and_two_processes_are_equal(planted: Planted, tmp_path: Path):
    for workers in (1, 2):
        assert check(planted.folder, "--report", tmp_path / f"{workers}.jsonl", "--workers", workers)[0] == 3
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


def test_tars_without_a_manifest_are_checked(planted: Planted, tmp_path: Path):
    for path in Path(planted.folder).glob("*.tar"):
        shutil.copy(path, tmp_path)
    status, summary = check(tmp_path)
    assert (status, summary["bad_samples"]) == (3, len(planted.expected))
    assert not list(tmp_path.glob("*.npz"))


def test_members_that_are_not_read_are_not_bad(planted: Planted):
    by_use = {
        source_type: check(planted.folder, "--type", source_type)[1]["bad_samples"]
        for source_type in ("images", "text")
    }
    always = sum(len(planted.bad[kind]) for kind in KINDS[-4:])  # executable members, duplicate keys
    stages = Counter(kind for kind, found in planted.bad.items() for _ in found if kind not in KINDS[-4:])
    pictures = ("corrupt JPEG", "truncated JPEG", "not an image", "empty picture", "PNG bomb", "missing picture")
    assert by_use["images"] == always + sum(stages[kind] for kind in pictures)
    assert by_use["text"] == always + sum(count for kind, count in stages.items() if kind not in pictures)


def test_clean_source_exits_with_0(three_shards: Path):
    counts = {"shards": 3, "num_samples": 30, "bad_samples": 0, "kinds": {}, "broken_shards": {}, "report": None}
    assert check(three_shards) == (0, {"url": str(three_shards)} | counts)


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_shard_is_named_and_stops_training(three_shards: Path, kind: str):
    BREAKS[kind](three_shards / "00001.tar")
    status, summary = check(three_shards)
    assert status == 1
    assert list(summary["broken_shards"]) == ["00001.tar"]
    assert summary["bad_samples"] == 0
    with pytest.raises(DataError, match=r"00001\.tar"):
        read_epoch(three_shards, 30)


def test_index_of_another_tar_makes_a_shard_broken(three_shards: Path):
    (three_shards / "00001.tar.index.npz").write_bytes((three_shards / "00002.tar.index.npz").read_bytes())
    status, summary = check(three_shards)
    assert (status, list(summary["broken_shards"])) == (1, ["00001.tar"])
    assert "belongs to another version" in summary["broken_shards"]["00001.tar"]


def test_broken_shards_decide_the_exit_status(planted: Planted, tmp_path: Path):
    for path in Path(planted.folder).glob("*.tar"):
        shutil.copy(path, tmp_path)
    BREAKS["zero bytes"](tmp_path / "00000.tar")
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--workers", "1", "--report", str(tmp_path / "found")])
    assert result.exit_code == 1
    assert "00000.tar: the shard is truncated" in result.stdout
    assert "image: corrupt JPEG" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines if line["stage"] == "shard"] == [("00000.tar", "")]
    remaining = [expected for expected in planted.expected if expected.shard != "00000.tar"]
    assert len(lines) == 1 + len(remaining)
