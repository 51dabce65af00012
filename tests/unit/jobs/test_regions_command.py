"""`mome shards regions` with its actor in this process: every sample is kept and its regions are replaced."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from jobs.shards.regions import RegionActor
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import Storage
from tests.support.detectors import FEATURES, save_yolos
from tests.support.shards_command import facts_of, run_shards


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules[RegionActor.__module__],
        "_on_actors",
        lambda actor, shards, _: (actor.detect(name, source) for name, source in shards.items()),
    )


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_yolos(tmp_path_factory.mktemp("detector"))


@pytest.fixture
def pairs(make_pairs, make_pair) -> str:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"]}
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): bad})


def regions(*arguments: object) -> dict:
    return facts_of("regions", *arguments)


def samples(folder: object) -> dict[str, Sample]:
    return {sample.key: sample for sample in iter_samples(Storage(), str(folder))}


def test_every_sample_keeps_its_members_and_gets_regions(pairs: str, detector: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "bad.jsonl"
    options = ("--detector", detector, "--regions", 7, "--report", report, "--json")
    result = run_shards("regions", pairs, out, *options)
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["url"], facts["num_samples"], facts["shards"], facts["bad_samples"]) == (str(out), 12, 3, 1)
    assert "pairs00006" in result.stderr
    finding = json.loads(report.read_text())
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")
    run_shards("index", pairs)
    before, after = samples(pairs), samples(out)
    assert list(before) == list(after)
    for key, sample in before.items():
        regions = after[key].members.pop("npz", None)
        assert after[key].members == sample.members
        assert after[key].image_id == sample.image_id
        assert (regions is None) == (key == "pairs00006")
        if regions is not None:
            record = parse_regions(regions)
            assert (record.features.shape, record.image_size) == ((7, FEATURES), (24, 24))


def test_only_missing_and_replaced_shards_are_processed(
    pairs: str, detector: Path, tmp_path: Path, make_tar, make_pair
) -> None:
    out = tmp_path / "out"
    whole = regions(pairs, out, "--detector", detector)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00000.tar").unlink()  # its record was written before
    (out / "manifest.json").unlink()
    again = regions(pairs, out, "--detector", detector)
    assert again == whole  # the record of the bad sample is read from the earlier call
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]}
    assert changed == {"00000.tar"}
    (Path(pairs) / "00002.tar").write_bytes(make_tar({"new": make_pair(99)}))
    assert regions(pairs, out, "--detector", detector)["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_unusable_arguments_and_shards_are_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out = tmp_path / "out"
    missing = run_shards("regions", pairs, out, "--detector", tmp_path / "none", fails=ConfigError)
    assert "nothing is downloaded" in str(missing.exception)
    assert not out.exists()
    regions(pairs, out, "--detector", detector)
    texts = make_pairs("texts", [1], planted={(0, 0): {"txt": b"one"}})
    cut = make_pairs("cut", [4, 3])
    os.truncate(Path(cut) / "00001.tar", 2000)
    for url, target, options, kind, reason in (
        (pairs, out, ("--regions", 3), ConfigError, "other --regions"),
        (pairs, make_pairs("other", [2]), (), ConfigError, "none of these shards with regions"),
        (pairs, os.path.relpath(pairs), (), ConfigError, "choose another folder than"),
        (texts, tmp_path / "out2", (), DataError, "no sample has an image that the detector could read"),
        (cut, tmp_path / "out3", (), DataError, "00001.tar: the shard is truncated"),
    ):
        result = run_shards("regions", url, target, "--detector", detector, *options, fails=kind)
        assert reason in str(result.exception)
    assert not (tmp_path / "out3" / "00001.tar").exists()


def test_old_regions_are_replaced_or_removed(make_pairs, make_pair, detector: Path, tmp_path: Path) -> None:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"], "npz": b"old"}
    old = make_pairs("old", [2], planted={(0, 0): make_pair(1) | {"npz": b"old"}, (0, 1): bad})
    regions(old, tmp_path / "out", "--detector", detector)
    intact, damaged = samples(tmp_path / "out").values()
    assert parse_regions(intact.members["npz"]).features.shape[1] == FEATURES
    assert "npz" not in damaged.members
