"""Captions with regions through the loader: batch content, independence of the reader, faults."""

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.regions import RegionRecord
from pipeline.data.shards.check import check_shards
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import check_objectives
from tests.support.data_stream import data_config, hash_of, open_loader, take

NUMBERS, CLASSES, MOST = 6, 5, 8
OBJECTIVES = ("itm", "mlm", "moc", "mrfr")


def record(number: int, **changed: Any) -> RegionRecord:
    """Return between 1 and 12 regions, different for every number."""
    random, count = np.random.default_rng(number), 1 + number % 12
    corners = random.uniform(0, 30, (count, 2))
    arrays: dict[str, Any] = {
        "features": random.normal(size=(count, NUMBERS)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + random.uniform(1, 30, (count, 2))], axis=1).astype(np.float32),
        "image_size": (60, 80),
        "classes": random.integers(0, CLASSES, count),
        "confidences": random.permutation(count).astype(np.float32) / count,
    }
    return RegionRecord(**(arrays | changed))


def members(number: int, **changed: Any) -> dict[str, bytes]:
    captions = [f"picture {number} shows a thing in way {way}" for way in "abc"]
    return {"json": json.dumps({"captions": captions}).encode(), "npz": record(number, **changed).to_bytes()}


@pytest.fixture
def shards(tmp_path: Path, make_tar) -> str:
    for shard, numbers in enumerate([range(9), range(9, 13), range(13, 23)]):
        (tmp_path / f"{shard:05d}.tar").write_bytes(make_tar({f"s{n:05d}": members(n) for n in numbers}))
    index_shards(Storage(), str(tmp_path))
    return str(tmp_path)


def run_config(shards: str, objectives: Any = OBJECTIVES, bad_rate: float = 1.0, **model: int) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "max_regions": MOST}
    imagebert = {"kind": "imagebert", **sizes, "region_features": NUMBERS, "region_classes": CLASSES} | model
    data, stage = {"max_bad_rate": bad_rate}, {"negatives": "random"}
    return data_config({"some": shards}, objectives, "regions", imagebert, data, stage)


def test_examples_contain_their_samples_regions(shards: str) -> None:
    best_of = [record(number).most_confident(MOST) for number in range(23)]
    expected = {best.features.tobytes(): best for best in best_of}
    ids, masks, hidden, masked = dict[bytes, int](), defaultdict[bytes, set[bytes]](set), 0, 0
    for batch in take(run_config(shards), 40):
        assert batch.image is None
        assert int(batch.region_keep.sum(dim=1).max()) == batch.region_keep.shape[1]
        for row, keep in enumerate(batch.region_keep):
            key = batch.region_features[row][keep].numpy().tobytes()
            best = expected[key]
            np.testing.assert_array_equal(batch.region_location[row][keep], best.locations())
            np.testing.assert_array_equal(batch.region_class[row][keep], best.classes)
            for name in ("region_features", "region_location", "region_class", "region_hidden"):
                assert not getattr(batch, name)[row][~keep].any()
            positions = batch.region_positions[row][batch.region_positions[row] >= 0]
            assert len(positions.unique()) == max(1, round(0.15 * len(best.features)))
            assert keep[positions].all()
            assert batch.region_hidden[row].sum() == batch.region_hidden[row][positions].sum()
            hidden, masked = hidden + int(batch.region_hidden[row].sum()), masked + len(positions)
            masks[key].add(positions.numpy().tobytes())
            assert ids.setdefault(key, int(batch.image_id[row])) == int(batch.image_id[row])
    assert abs(hidden / masked - 0.9) < 3 * (0.09 / masked) ** 0.5  # 10 % of the masked regions keep their features
    assert len(set(ids.values())) == len(ids) > 10
    assert max(len(drawn) for drawn in masks.values()) > 1  # they change from epoch to epoch


@pytest.mark.parametrize("objectives", [OBJECTIVES, ("mlm",), ("mrfr",)])
def test_batches_depend_on_the_objectives_and_not_on_the_reader(shards: str, objectives: tuple[str, ...]) -> None:
    config = run_config(shards, objectives)
    readers = ((1, 0), (2, 0), (3, 0), (1, 1))
    assert len({hash_of(config, range(2, 5), world, num_workers=workers) for world, workers in readers}) == 1
    (batch,) = take(config)
    names = ("text", "region_features", "masked_text", "region_positions", "region_hidden", "region_class")
    masks_regions = "mrfr" in objectives
    is_filled = (True, True, "mlm" in objectives, masks_regions, masks_regions, "moc" in objectives)
    assert {name: getattr(batch, name) is not None for name in names} == dict(zip(names, is_filled, strict=True))


def test_bad_regions_are_replaced_and_reported(tmp_path: Path, make_tar) -> None:
    """The shard check finds the samples that training replaces, with the same reasons."""
    bad = {
        "no_npz": {"json": members(0)["json"]},
        "no_zip": {"json": members(0)["json"], "npz": b"no zip"},
        "outside": members(0, boxes=np.array([[0, 0, 90, 10]], np.float32)),
        "nothing": members(0, features=np.zeros((0, NUMBERS), np.float32)),
    }
    samples: dict[str, dict[str, bytes]] = {}
    for number, key in enumerate(bad):
        samples |= {f"s{n:05d}": members(n) for n in range(9 * number, 9 * number + 9)} | {key: bad[key]}
    (tmp_path / "00000.tar").write_bytes(make_tar(samples))
    index_shards(Storage(), str(tmp_path))
    (report,) = check_shards(Storage(), str(tmp_path), "regions", 10**6, workers=1)
    assert {finding.key for finding in report.bad} == set(bad)
    with open_loader(run_config(str(tmp_path))) as loader:
        list(islice(loader.batches(0), 4))
        reported = {(entry["key"], entry["reason"]) for entry in loader.quarantined()}
    assert reported == {(finding.key, finding.reason) for finding in report.bad}


def test_configs_that_do_not_fit_the_regions_name_the_key_to_change(shards: str) -> None:
    for model, reason in (
        ({"region_features": 2048}, r"6 features per region, but model\.region_features is 2048"),
        ({"region_classes": 2}, r"class \d, but model\.region_classes is 2"),
    ):
        with pytest.raises(DataError, match=reason):
            take(run_config(shards, bad_rate=0.01, **model), 20)
    with pytest.raises(ConfigError, match=r"regions are for a model of kind imagebert, and model\.kind is vlmo"):
        data_config({"some": "x"}, ("moc",), "regions")
    objectives = {name: {"every": 2 if name == "moc" else 1} for name in OBJECTIVES}
    with pytest.raises(ConfigError, match="mlm, moc, mrfr share one forward"):
        check_objectives(run_config(shards, objectives))
