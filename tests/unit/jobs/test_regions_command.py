"""`mome shards regions` with its actor in this process: every sample is kept and its regions are replaced."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil
from typer.testing import CliRunner

from jobs.shards import app
from jobs.shards.regions import RegionActor, RegionShard
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import ObjectInfo, Storage

NUMBERS, CLASSES = 16, 5


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_actor(actor: RegionActor, shards: Mapping[str, ObjectInfo], _: object) -> Iterator[RegionShard]:
        return (actor.detect(name, source) for name, source in shards.items())

    monkeypatch.setattr(sys.modules[RegionActor.__module__], "_on_actors", one_actor)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=NUMBERS, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=12, num_labels=CLASSES,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(make_pairs, make_pair) -> str:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"]}
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): bad})


def run(*arguments: object) -> tuple[dict, str]:
    result = CliRunner().invoke(app, ["regions", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def samples(folder: object) -> dict[str, Sample]:
    return {sample.key: sample for sample in iter_samples(Storage(), str(folder))}


def test_every_sample_keeps_its_members_and_gets_regions(pairs: str, detector: Path, tmp_path: Path) -> None:
    report = tmp_path / "bad.jsonl"
    facts, said = run(pairs, tmp_path / "out", "--detector", detector, "--regions", 7, "--report", report)
    assert (facts["num_samples"], facts["shards"], facts["bad_samples"]) == (12, 3, 1)
    CliRunner().invoke(app, ["index", pairs])
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
        assert record.features.shape == (7, NUMBERS)
        assert record.image_size == (24, 24)
    assert "pairs00006" in said
    finding = json.loads(report.read_text())
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")


def test_interrupted_command_continues_with_missing_shards(pairs: str, detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole, _ = run(pairs, out, "--detector", detector)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00000.tar").unlink()  # its record was written before
    (out / "manifest.json").unlink()
    again, _ = run(pairs, out, "--detector", detector)
    assert again == whole  # the record of the bad sample is read from the earlier call
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]}
    assert changed == {"00000.tar"}


def test_replaced_source_shard_is_processed_again(
    pairs: str, detector: Path, tmp_path: Path, make_tar, make_pair
) -> None:
    out = tmp_path / "out"
    run(pairs, out, "--detector", detector)
    (Path(pairs) / "00002.tar").write_bytes(make_tar({"new": make_pair(99)}))
    facts, _ = run(pairs, out, "--detector", detector)
    assert facts["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_other_settings_are_rejected(pairs: str, detector: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path / "out", "--detector", detector)
    with pytest.raises(ConfigError, match="other --regions") as error:
        run(pairs, tmp_path / "out", "--detector", detector, "--regions", 3)
    assert error.value.exit_status == 2


def test_folder_with_other_shards_is_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    with pytest.raises(ConfigError, match="none of these shards with regions"):
        run(pairs, make_pairs("other", [2]), "--detector", detector)
    with pytest.raises(ConfigError, match="choose another folder than"):
        run(pairs, os.path.relpath(pairs), "--detector", detector)


def test_missing_detector_fails_before_any_work(pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        run(pairs, tmp_path / "out", "--detector", tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_truncated_shard_stops_the_command_by_name(pairs: str, detector: Path, tmp_path: Path) -> None:
    cut = Path(pairs) / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"00001\.tar: the shard is truncated"):
        run(pairs, tmp_path / "out", "--detector", detector)
    assert not (tmp_path / "out" / "00001.tar").exists()


def test_shards_without_images_are_rejected(make_pairs, detector: Path, tmp_path: Path) -> None:
    texts = make_pairs("texts", [2], planted={(0, 0): {"txt": b"one"}, (0, 1): {"txt": b"two"}})
    with pytest.raises(DataError, match="no sample has an image"):
        run(texts, tmp_path / "out", "--detector", detector)


def test_existing_regions_are_replaced(make_pairs, make_pair, detector: Path, tmp_path: Path) -> None:
    old = make_pairs("old", [1], planted={(0, 0): make_pair(1) | {"npz": b"old"}})
    run(old, tmp_path / "out", "--detector", detector)
    assert len(parse_regions(next(iter(samples(tmp_path / "out").values())).members["npz"])) == 12
