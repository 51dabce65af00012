"""Planted bad data is found exactly, by `mome shards check` before training and by the loader in it (contract C7)."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.errors import DataError
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.bad_shards import BAD, BREAKS, KINDS, Expected, Planted, plant, read_epoch, write_tar
from tests.support.pairs import pair
from tests.support.shards_command import facts_of, run_shards


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Return 120 indexed pairs in five shards, 36 of them bad in 19 ways."""
    index_shards(Storage(), (planted := plant(tmp_path_factory.mktemp("planted") / "pairs")).folder)
    return planted


def check(folder: object, *options: object, status: int = 0) -> dict:
    return facts_of("check", folder, "--workers", 1, *options, status=status)


def as_expected(record: dict) -> Expected:
    return Expected(record["shard"], record["key"], record["offset"], record["stage"])


def test_check_and_loader_find_exactly_the_planted_samples(planted: Planted, tmp_path: Path) -> None:
    assert {kind: len(bad) for kind, bad in planted.bad.items()} == {kind: 1 + n % 3 for n, kind in enumerate(KINDS)}
    assert len(planted.expected) == sum(map(len, planted.bad.values()))
    reports = [tmp_path / "deep" / f"{workers}.jsonl" for workers in (1, 2)]
    for workers, report in enumerate(reports, 1):
        summary = check(planted.folder, "--report", report, "--workers", workers, status=3)
        assert (summary["num_samples"], summary["shards"], summary["broken_shards"]) == (planted.samples, 5, {})
    assert reports[0].read_text() == reports[1].read_text()
    checked = [json.loads(line) for line in reports[0].read_text().splitlines()]
    assert summary["bad_samples"] == len(checked) == sum(summary["kinds"].values())
    assert all(record["reason"] for record in checked)
    records = read_epoch(planted.folder, planted.samples, streams=5)
    for found in (checked, records):
        assert Counter(map(as_expected, found)) == Counter(planted.expected)
    assert {(as_expected(r), r["reason"]) for r in checked} == {(as_expected(r), r["reason"]) for r in records}
    bad = {sample.key for kind in BAD for sample in planted.bad[kind]}
    assert not bad & {record["replaced_by"] for record in records}
    # Members that are not read are not bad.
    images, text = (check(planted.folder, "--type", name, status=3)["bad_samples"] for name in ("images", "text"))
    always = sum(len(planted.bad[kind]) for kind in KINDS[-4:])  # executable members, duplicate keys
    counts = {kind: len(planted.bad[kind]) for kind in KINDS[:-4]}
    pictures = ("corrupt JPEG", "truncated JPEG", "not an image", "empty picture", "PNG bomb", "missing picture")
    assert images == always + sum(counts[kind] for kind in pictures)
    assert text == always + sum(count for kind, count in counts.items() if kind not in pictures)


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_shard_is_named_and_stops_training(tmp_path: Path, kind: str) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"s{n}", pair(n)) for n in range(10 * shard, 10 * shard + 10)])
    index_shards(Storage(), str(tmp_path))
    counts = {"shards": 3, "num_samples": 30, "bad_samples": 0, "kinds": {}, "broken_shards": {}, "report": None}
    assert check(tmp_path) == {"url": str(tmp_path)} | counts
    BREAKS[kind](tmp_path / "00001.tar")
    summary = check(tmp_path, status=1)
    assert list(summary["broken_shards"]) == ["00001.tar"]
    assert ("belongs to another version" in summary["broken_shards"]["00001.tar"]) == (kind == "index of another tar")
    assert summary["bad_samples"] == 0
    with pytest.raises(DataError, match=r"00001\.tar"):
        read_epoch(tmp_path, 30)


def test_tars_without_a_manifest_are_checked_and_broken_ones_decide_the_status(planted, tmp_path: Path) -> None:
    for path in Path(planted.folder).glob("*.tar"):
        shutil.copy(path, tmp_path)
    assert check(tmp_path, status=3)["bad_samples"] == len(planted.expected)
    assert not list(tmp_path.glob("*.npz"))
    BREAKS["zero bytes"](tmp_path / "00000.tar")
    result = run_shards("check", tmp_path, "--workers", 1, "--report", tmp_path / "found", status=1)
    assert "00000.tar: the shard is truncated" in result.stdout
    assert "image: corrupt JPEG" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines if line["stage"] == "shard"] == [("00000.tar", "")]
    assert len(lines) == 1 + sum(expected.shard != "00000.tar" for expected in planted.expected)
