"""Planted bad data is found exactly, by `mome shards check` before training and by the loader in it (contract C7)."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.shards import app
from pipeline.config.errors import DataError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups
from tests.support.bad_shards import BAD, BREAKS, KINDS, Expected, Planted, good, plant, webdataset_table, write_tar

BATCH = 10


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
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"s{n}", good(n)) for n in range(10 * shard, 10 * shard + 10)])
    index_shards(Storage(), str(tmp_path))
    return tmp_path


def check(folder: object, *options: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["check", str(folder), "--json", "--workers", "1", *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def run_config(folder: object, samples: int) -> RunConfig:
    objectives = {"itc": {}, "mlm": {}, "mim": {}}
    stage = {"name": "pairs", "sources": {"pairs": 1.0}, "objectives": objectives}
    return validate(
        {
            "name": "planted",
            "model": {
                "width": 32,
                "layers": 3,
                "heads": 2,
                "vision_language_layers": 1,
                "image_size": 16,
                "patch_size": 4,
            },
            "sources": {"pairs": {"shards": str(folder)}},
            "data": {"streams": 5, "shuffle_window": 2, "max_bad_rate": 1.0},
            "stages": [stage | {"steps": samples // BATCH, "global_batch_size": BATCH, "max_text_length": 12}],
        },
        "planted",
    )


def read_epoch(folder: object, samples: int) -> list[dict]:
    """Read one epoch through the loader and return the quarantined samples."""
    config = run_config(folder, samples)
    tokenizer = Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(60) for way in "abc"], 200)
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, rank=0, world_size=1
    ) as loader:
        batches = list(islice(loader.batches(0), samples // BATCH))
        assert sum(len(batch) for batch in batches) == samples
        assert loader.counts()["samples/pairs"] == samples
        records = loader.quarantined()
        assert loader.counts()["bad/pairs"] == len(records)
    return records


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


def test_loader_quarantines_exactly_the_planted_samples(planted: Planted):
    records = read_epoch(planted.folder, planted.samples)
    assert Counter(map(as_expected, records)) == Counter(planted.expected)
    bad = {sample.key for kind in BAD for sample in planted.bad[kind]}
    assert not bad & {record["replaced_by"] for record in records}


def test_check_and_loader_give_equal_reasons(planted: Planted, tmp_path: Path):
    check(planted.folder, "--report", tmp_path / "bad.jsonl")
    checked = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    trained = read_epoch(planted.folder, planted.samples)
    assert {(as_expected(r), r["reason"]) for r in checked} == {(as_expected(r), r["reason"]) for r in trained}


def test_reports_of_one_and_two_processes_are_equal(planted: Planted, tmp_path: Path):
    reports = []
    for workers in (1, 2):
        status, _ = check(planted.folder, "--report", tmp_path / "bad.jsonl", "--workers", workers)
        assert status == 3
        reports.append((tmp_path / "bad.jsonl").read_text())
    assert reports[0] == reports[1]


def test_tars_without_a_manifest_are_checked(planted: Planted, tmp_path: Path):
    for path in Path(planted.folder).glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
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
    assert check(three_shards) == (
        0,
        {
            "url": str(three_shards),
            "shards": 3,
            "num_samples": 30,
            "bad_samples": 0,
            "kinds": {},
            "broken_shards": {},
            "report": None,
        },
    )


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
        (tmp_path / path.name).write_bytes(path.read_bytes())
    BREAKS["zero bytes"](tmp_path / "00000.tar")
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--workers", "1", "--report", str(tmp_path / "found")])
    assert result.exit_code == 1
    assert "00000.tar: the shard is truncated" in result.stdout
    assert "image: corrupt JPEG" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines if line["stage"] == "shard"] == [("00000.tar", "")]
    remaining = [expected for expected in planted.expected if expected.shard != "00000.tar"]
    assert len(lines) == 1 + len(remaining)


def test_webdataset_reader_skips_much_of_it_silently(tmp_path: Path):
    table = webdataset_table(tmp_path)
    silent = {kind for kind, (raising, _) in table.items() if raising.startswith("silent")}
    assert silent >= {"cut inside a header", "cut before a member", "cut before the zero blocks", "missing caption"}
    assert silent >= {"corrupt JPEG", "empty caption", "duplicate key apart", "replaced by one of its size"}
    assert "k2 without its json" in table["cut inside a header"][0]
    assert "the code ran" in table["pickle that runs code"][0]
