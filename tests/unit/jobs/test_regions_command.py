"""`mome shards regions` with its actor in this process: every sample is kept and its regions are replaced."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from jobs.shards.regions import RegionActor, RegionShard
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import ObjectInfo, Storage
from tests.support.detectors import FEATURES, save_yolos
from tests.support.shards_command import facts_of, run_shards


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_actor(actor: RegionActor, shards: Mapping[str, ObjectInfo], _: object) -> Iterator[RegionShard]:
        return (actor.detect(name, source) for name, source in shards.items())

    monkeypatch.setattr(sys.modules[RegionActor.__module__], "_on_actors", one_actor)


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
    report = tmp_path / "bad.jsonl"
    result = run_shards(
        "regions", pairs, tmp_path / "out", "--detector", detector, "--regions", 7, "--report", report, "--json"
    )
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["url"] == str(tmp_path / "out")
    assert (facts["num_samples"], facts["shards"], facts["bad_samples"]) == (12, 3, 1)
    run_shards("index", pairs)
    before, after = samples(pairs), samples(tmp_path / "out")
    assert list(before) == list(after)
    for key, sample in before.items():
        regions = after[key].members.pop("npz", None)
        assert after[key].members == sample.members
        assert after[key].image_id == sample.image_id
        if key == "pairs00006":
            assert regions is None
            continue
        record = parse_regions(regions)
        assert record.features.shape == (7, FEATURES)
        assert record.image_size == (24, 24)
    assert "pairs00006" in result.stderr
    finding = json.loads(report.read_text())
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")


def test_interrupted_command_continues_with_missing_shards(pairs: str, detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = regions(pairs, out, "--detector", detector)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00000.tar").unlink()  # its record was written before
    (out / "manifest.json").unlink()
    again = regions(pairs, out, "--detector", detector)
    assert again == whole  # the record of the bad sample is read from the earlier call
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]}
    assert changed == {"00000.tar"}


def test_replaced_source_shard_is_processed_again(
    pairs: str, detector: Path, tmp_path: Path, make_tar, make_pair
) -> None:
    out = tmp_path / "out"
    regions(pairs, out, "--detector", detector)
    (Path(pairs) / "00002.tar").write_bytes(make_tar({"new": make_pair(99)}))
    facts = regions(pairs, out, "--detector", detector)
    assert facts["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_unusable_arguments_are_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out = tmp_path / "out"
    missing = run_shards("regions", pairs, out, "--detector", tmp_path / "none", fails=ConfigError)
    assert "nothing is downloaded" in str(missing.exception)
    assert not out.exists()
    regions(pairs, out, "--detector", detector)
    for url, target, options, reason in (
        (pairs, out, ("--regions", 3), "other --regions"),
        (pairs, make_pairs("other", [2]), (), "none of these shards with regions"),
        (pairs, os.path.relpath(pairs), (), "choose another folder than"),
    ):
        result = run_shards("regions", url, target, "--detector", detector, *options, fails=ConfigError)
        assert reason in str(result.exception)


def test_truncated_shard_stops_the_command_by_name(pairs: str, detector: Path, tmp_path: Path) -> None:
    os.truncate(Path(pairs) / "00001.tar", 2000)
    result = run_shards("regions", pairs, tmp_path / "out", "--detector", detector, fails=DataError)
    assert "00001.tar: the shard is truncated" in str(result.exception)
    assert not (tmp_path / "out" / "00001.tar").exists()


def test_old_regions_are_replaced_or_removed(make_pairs, make_pair, detector: Path, tmp_path: Path) -> None:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"], "npz": b"old"}
    old = make_pairs("old", [2], planted={(0, 0): make_pair(1) | {"npz": b"old"}, (0, 1): bad})
    regions(old, tmp_path / "out", "--detector", detector)
    intact, damaged = samples(tmp_path / "out").values()
    assert parse_regions(intact.members["npz"]).features.shape[1] == FEATURES
    assert "npz" not in damaged.members


def test_shards_without_images_are_rejected(make_pairs, detector: Path, tmp_path: Path) -> None:
    texts = make_pairs("texts", [1], planted={(0, 0): {"txt": b"one"}})
    result = run_shards("regions", texts, tmp_path / "out", "--detector", detector, fails=DataError)
    assert "no sample has an image that the detector could read" in str(result.exception)
