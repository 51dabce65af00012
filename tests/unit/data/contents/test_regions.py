"""The regions member: round trip, selection, checks of untrusted content, and captions with regions in batches."""

import io
import json
import random
import zipfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents import regions
from pipeline.data.contents.members import REGIONS
from pipeline.data.contents.regions import RegionRecord, parse_regions, regions_of
from pipeline.data.quarantine import BadSample
from pipeline.objectives import check_objectives
from tests.support.data_stream import data_config, hash_of, take
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import write_indexed

HEIGHT, WIDTH = 60, 80
FEATURES, CLASSES, MOST = 8, 5, 8
OBJECTIVES = ("itm", "mlm", "moc", "mrfr")


def arrays_of(number: int, count: int | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of between 1 and 12 regions, different for every number."""
    draw, count = np.random.default_rng(number), count or 1 + number % 12
    corners = draw.uniform(0, 30, (count, 2))
    return {
        "features": draw.normal(size=(count, FEATURES)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + draw.uniform(1, 30, (count, 2))], axis=1).astype(np.float32),
        "image_size": np.array([HEIGHT, WIDTH]),
        "classes": np.arange(count) % CLASSES,
        "confidences": draw.permutation(count).astype(np.float32) / count,
    }


ARRAYS = arrays_of(0, 5)


def packed(compressed: bool = False, number: int | None = None, **changed: Any) -> bytes:
    """Return the member with some arrays changed, or removed where the value is None."""
    buffer, arrays = io.BytesIO(), (ARRAYS if number is None else arrays_of(number)) | changed
    (np.savez_compressed if compressed else np.savez)(buffer, **{n: a for n, a in arrays.items() if a is not None})
    return buffer.getvalue()


def test_regions_round_trip_are_relative_to_the_image_and_the_most_confident_are_kept() -> None:
    for compressed in (False, True):
        record = parse_regions(packed(compressed))
        assert record.to_bytes() == record.to_bytes()
        for read in (record, parse_regions(record.to_bytes())):
            assert read.image_size == (HEIGHT, WIDTH)
            for name in ("features", "boxes", "classes", "confidences"):
                assert np.array_equal(getattr(read, name), ARRAYS[name])
    features, boxes = ARRAYS["features"].astype(np.float16), ARRAYS["boxes"]
    record = parse_regions(packed(features=features, image_size=None, classes=None, confidences=None))
    assert (record.features.dtype, record.classes, record.confidences) == (np.float32, None, None)
    assert record.image_size == (int(np.ceil(boxes[:, 3].max())), int(np.ceil(boxes[:, 2].max())))
    record = RegionRecord(np.zeros((1, 2), np.float32), np.array([[8, 6, 40, 30]], np.float32), (60, 80))
    expected = [[8 / 80, 6 / 60, 40 / 80, 30 / 60, 32 * 24 / (80 * 60)]]
    np.testing.assert_allclose(record.locations(), expected, rtol=1e-6)
    (boxes := ARRAYS["boxes"].copy())[0] = [-0.4, 0, WIDTH + 0.7, HEIGHT]
    assert parse_regions(packed(boxes=boxes)).boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]
    ranked, ordered = packed(confidences=np.array([0.3, 0.9, 0.1, 0.9, 0.5], np.float32)), packed(confidences=None)
    for data, most, kept in (
        (ranked, 3, [1, 3, 4]),  # equal confidences keep their order
        (ranked, 5, [0, 1, 2, 3, 4]), (ranked, None, [0, 1, 2, 3, 4]), (ordered, 2, [0, 1]),
    ):  # fmt: skip
        best, record = regions_of({REGIONS: data}, most=most), parse_regions(data)
        assert best.image_size == record.image_size
        for name in ("features", "boxes", "classes"):
            assert np.array_equal(getattr(best, name), getattr(record, name)[kept])


def changed(name: str, where: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    (array := ARRAYS[name].copy())[where] = value
    return {name: array}


FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"features": None}, "no array 'features'; it has boxes, classes, confidences, image_size"),
    ({"boxes": None}, "no array 'boxes'"), ({"features": np.zeros((0, 8), np.float32)}, "no region"),
    ({"features": np.zeros(8, np.float32)}, r"features have shape \(8,\)"),
    ({"features": np.zeros((5, 0), np.float32)}, r"features have shape \(5, 0\)"),
    ({"features": np.zeros((5, 8))}, "features have dtype float64"),
    ({"features": np.zeros((5, 8), np.int32)}, "features has dtype int32"),
    ({"features": np.array([[None] * 8] * 5)}, "features has dtype object"),
    *(({"boxes": np.zeros(n, np.float32)}, rf"boxes have shape \({n[0]}, {n[1]}\); exp") for n in ((5, 5), (4, 4))),
    ({"boxes": np.array([["a"] * 4] * 5)}, "boxes has dtype <U1"),
    ({"classes": np.zeros(5, np.float32)}, "classes has dtype float32"),
    ({"classes": np.zeros(4, np.int64)}, r"classes have shape \(4,\)"),
    ({"classes": np.array([0, 1, 2, 3, -1])}, "classes from -1 to 3"),
    ({"classes": np.full(5, 2**64 - 1, np.uint64)}, "expected 0 to 2"),
    ({"confidences": np.zeros((5, 1), np.float32)}, r"confidences have shape \(5, 1\)"),
    ({"image_size": np.array([60])}, r"image_size have shape \(1,\)"),
    ({"image_size": np.array([60.0, 80.0])}, "image_size has dtype float64"),
    ({"image_size": np.array([0, 80])}, "an image of height 0 and width 80"),
    *((changed(name, where, number), f"{name} contain a number that is not finite") for name, where, number in (
        ("features", (2, 3), np.nan), ("boxes", (2, 3), np.inf), ("confidences", (0,), np.nan),
    )),
    (changed("boxes", (3, 2), WIDTH + 1.5), r"box 3 \(.*, 81\.5, .*\) is outside an image of 80 x 60"),
    (changed("boxes", (3, 1), -1.5), r"box 3 \(.*, -1\.5, .*\) is outside"),
    (changed("boxes", (1, 2), 0.0), r"box 1 \(.*\) ends before it begins"),
)  # fmt: skip


def rewritten(compression: int = zipfile.ZIP_STORED, **contents: bytes) -> bytes:
    """Return the npz with another compression, and with other bytes for some arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed())) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, contents.get(entry.filename.removesuffix(".npy"), old.read(entry)))
    return out.getvalue()


def test_every_fault_damaged_bombs_and_unusual_archives_are_bad_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zip's directory may declare 40 bytes for megabytes of content: at most 40 are unpacked."""
    wrong = packed(compressed=True, features=np.zeros((5, 200_000), np.float32))
    wrong = wrong.replace((128 + 5 * 200_000 * 4).to_bytes(4, "little"), (40).to_bytes(4, "little"))
    bomb = packed(compressed=True, features=np.zeros((5, 8000), np.float32))
    assert len(bomb) < 5000
    monkeypatch.setattr(regions, "MAX_BYTES", 100_000)
    cases = [(data, "cannot be read as an npz") for data in (b"", b"no zip", b"PK\x03\x04 cut", wrong)]
    cases += [(bomb, "features has 160128 bytes; expected at most 100000")]
    cases += [(rewritten(zipfile.ZIP_LZMA), "method that numpy does not use")]
    for shape in (b"(99999999999, 1024)", b"(-5, 8)", b"(-5, -8)", b"(2, 2)", b"()"):  # checked before allocation
        header = (b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b"}").ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(5 * 8 * 4)
        cases += [(rewritten(features=content), "features declares shape|cannot be read as an npz")]
    for data, reason in (*cases, *((packed(**change), reason) for change, reason in FAULTS)):
        with pytest.raises(BadSample, match=reason) as error:
            parse_regions(data)
        assert error.value.stage == "regions"


@pytest.mark.filterwarnings("ignore")
def test_mutated_regions_raise_only_bad_samples() -> None:
    rng = random.Random(1)
    for whole in (packed(), packed(compressed=True)) * fuzz_rounds(400):
        with suppress(BadSample):
            parse_regions(mutate(whole, rng))


def test_regions_that_are_missing_or_do_not_fit_the_model_name_the_remedy() -> None:
    whole, unnamed = {"npz": packed()}, {"npz": packed(classes=None)}
    assert len(regions_of(whole, 8, 5).features) == len(regions_of(unnamed, 8).features) == 5
    for sample, features, classes, reason in (
        ({"jpg": b"", "json": b""}, None, None, r"no regions \(npz; see `mome shards regions`\); it has jpg, json"),
        (whole, 2048, None, r"8 features per region, but model\.region_features is 2048"),
        (whole, 8, 4, r"class 4, but model\.region_classes is 4"),
        (unnamed, 8, 5, "no array 'classes', which the objective moc needs"),
    ):
        with pytest.raises(BadSample, match=reason):
            regions_of(sample, features, classes)


def members(number: int) -> dict[str, bytes]:
    captions = [f"picture {number} shows a thing in way {way}" for way in "abc"]
    return {"json": json.dumps({"captions": captions}).encode(), "npz": packed(number=number)}


@pytest.fixture
def shards(tmp_path: Path) -> str:
    numbers = range(9), range(9, 13), range(13, 23)
    return write_indexed(tmp_path, *({f"s{n:05d}": members(n) for n in shard} for shard in numbers))


def run_config(shards: str, objectives: Any = OBJECTIVES, bad_rate: float = 1.0, **model: int) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "max_regions": MOST}
    imagebert = {"kind": "imagebert", **sizes, "region_features": FEATURES, "region_classes": CLASSES} | model
    data, stage = {"max_bad_rate": bad_rate}, {"negatives": "random"}
    return data_config({"some": shards}, objectives, "regions", imagebert, data, stage)


def test_examples_contain_their_samples_regions(shards: str) -> None:
    best_of = [regions_of({REGIONS: packed(number=number)}, most=MOST) for number in range(23)]
    expected = {best.features.tobytes(): best for best in best_of}
    ids, masks, hidden, masked = dict[bytes, int](), defaultdict[bytes, set[bytes]](set), 0, 0
    for batch in take(run_config(shards), 40):
        assert (batch.image, int(batch.region_keep.sum(dim=1).max())) == (None, batch.region_keep.shape[1])
        for row, keep in enumerate(batch.region_keep):
            best = expected[key := batch.region_features[row][keep].numpy().tobytes()]
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
    config, masks_regions = run_config(shards, objectives), "mrfr" in objectives
    readers = ((1, 0), (2, 0), (3, 0), (1, 1))
    assert len({hash_of(config, range(2, 5), world, num_workers=workers) for world, workers in readers}) == 1
    (batch,) = take(config)
    is_filled = dict.fromkeys(("text", "region_features"), True) | {"masked_text": "mlm" in objectives}
    is_filled |= dict.fromkeys(("region_positions", "region_hidden"), masks_regions)
    is_filled["region_class"] = "moc" in objectives
    assert {name: getattr(batch, name) is not None for name in is_filled} == is_filled


def test_configs_that_do_not_fit_the_regions_name_the_key_to_change(shards: str) -> None:
    for model, reason in (
        ({"region_features": 2048}, r"8 features per region, but model\.region_features is 2048"),
        ({"region_classes": 2}, r"class \d, but model\.region_classes is 2"),
    ):
        with pytest.raises(DataError, match=reason):
            take(run_config(shards, bad_rate=0.01, **model), 20)
    with pytest.raises(ConfigError, match=r"regions are for a model of kind imagebert, and model\.kind is vlmo"):
        data_config({"some": "x"}, ("moc",), "regions")
    objectives = {name: {"every": 2 if name == "moc" else 1} for name in OBJECTIVES}
    with pytest.raises(ConfigError, match="mlm, moc, mrfr share one forward"):
        check_objectives(run_config(shards, objectives))
