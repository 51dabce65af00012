"""The regions member: round trip, selection, and checks of untrusted content."""

import io
import random
import zipfile
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from pipeline.data.contents import regions
from pipeline.data.contents.members import image_id_of
from pipeline.data.contents.regions import RegionRecord, parse_regions, regions_of
from pipeline.data.quarantine import BadSample
from tests.support.fuzz import fuzz_rounds, mutate

HEIGHT, WIDTH = 60, 80
_random = np.random.default_rng(0)
_corners = _random.uniform(0, 30, (5, 2))
ARRAYS: dict[str, np.ndarray] = {
    "features": _random.normal(size=(5, 8)).astype(np.float32),
    "boxes": np.concatenate([_corners, _corners + _random.uniform(1, 30, (5, 2))], axis=1).astype(np.float32),
    "image_size": np.array([HEIGHT, WIDTH]),
    "classes": np.arange(5),
    "confidences": np.linspace(0.2, 0.9, 5).astype(np.float32),
}


def packed(compressed: bool = False, **changed: Any) -> bytes:
    """Return the member with some arrays changed, or removed where the value is None."""
    buffer = io.BytesIO()
    arrays = {name: array for name, array in (ARRAYS | changed).items() if array is not None}
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def test_regions_round_trip_and_features_of_half_precision_and_boxes_suffice() -> None:
    for compressed in (False, True):
        record = parse_regions(packed(compressed))
        assert record.to_bytes() == record.to_bytes()
        for read in (record, parse_regions(record.to_bytes())):
            assert read.image_size == (HEIGHT, WIDTH)
            for name in ("features", "boxes", "classes", "confidences"):
                assert np.array_equal(getattr(read, name), ARRAYS[name])
    features, boxes = ARRAYS["features"].astype(np.float16), ARRAYS["boxes"]
    record = parse_regions(packed(features=features, image_size=None, classes=None, confidences=None))
    assert record.classes is record.confidences is None
    assert record.features.dtype == np.float32
    assert record.image_size == (int(np.ceil(boxes[:, 3].max())), int(np.ceil(boxes[:, 2].max())))


def test_location_is_relative_corners_and_area_of_boxes_clipped_to_the_image() -> None:
    record = RegionRecord(np.zeros((1, 2), np.float32), np.array([[8, 6, 40, 30]], np.float32), (60, 80))
    expected = [[8 / 80, 6 / 60, 40 / 80, 30 / 60, 32 * 24 / (80 * 60)]]
    np.testing.assert_allclose(record.locations(), expected, rtol=1e-6)
    boxes = ARRAYS["boxes"].copy()
    boxes[0] = [-0.4, 0, WIDTH + 0.7, HEIGHT]
    assert parse_regions(packed(boxes=boxes)).boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]


def test_most_confident_regions_are_kept() -> None:
    record = parse_regions(packed(confidences=np.array([0.3, 0.9, 0.1, 0.9, 0.5], np.float32)))
    best = record.most_confident(3)
    assert best.classes.tolist() == [1, 3, 4]  # equal confidences keep their order
    assert np.array_equal(best.features, record.features[[1, 3, 4]])
    assert np.array_equal(best.boxes, record.boxes[[1, 3, 4]])
    assert record.most_confident(5) is record
    assert parse_regions(packed(confidences=None)).most_confident(2).classes.tolist() == [0, 1]


def changed(name: str, where: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    array = ARRAYS[name].copy()
    array[where] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": None}, "no array 'features'; it has boxes, classes, confidences, image_size"),
        ({"boxes": None}, "no array 'boxes'"),
        ({"features": np.zeros((0, 8), np.float32)}, "no region"),
        ({"features": np.zeros(8, np.float32)}, r"features have shape \(8,\)"),
        ({"features": np.zeros((5, 0), np.float32)}, r"features have shape \(5, 0\)"),
        ({"features": np.zeros((5, 8))}, "features have dtype float64"),
        ({"features": np.zeros((5, 8), np.int32)}, "features has dtype int32"),
        ({"features": np.array([[None] * 8] * 5)}, "features has dtype object"),
        ({"boxes": np.zeros((5, 5), np.float32)}, r"boxes have shape \(5, 5\); expected \(5, 4\)"),
        ({"boxes": np.zeros((4, 4), np.float32)}, r"boxes have shape \(4, 4\); expected \(5, 4\)"),
        ({"boxes": np.array([["a"] * 4] * 5)}, "boxes has dtype <U1"),
        ({"classes": np.zeros(5, np.float32)}, "classes has dtype float32"),
        ({"classes": np.zeros(4, np.int64)}, r"classes have shape \(4,\)"),
        ({"classes": np.array([0, 1, 2, 3, -1])}, "classes from -1 to 3"),
        ({"classes": np.full(5, 2**64 - 1, np.uint64)}, "expected 0 to 2"),
        ({"confidences": np.zeros((5, 1), np.float32)}, r"confidences have shape \(5, 1\)"),
        ({"image_size": np.array([60])}, r"image_size have shape \(1,\)"),
        ({"image_size": np.array([60.0, 80.0])}, "image_size has dtype float64"),
        ({"image_size": np.array([0, 80])}, "an image of height 0 and width 80"),
        (changed("features", (2, 3), np.nan), "features contain a number that is not finite"),
        (changed("boxes", (2, 3), np.inf), "boxes contain a number that is not finite"),
        (changed("confidences", (0,), np.nan), "confidences contain a number that is not finite"),
        (changed("boxes", (3, 2), WIDTH + 1.5), r"box 3 \(.*, 81\.5, .*\) is outside an image of 80 x 60"),
        (changed("boxes", (3, 1), -1.5), r"box 3 \(.*, -1\.5, .*\) is outside"),
        (changed("boxes", (1, 2), 0.0), r"box 1 \(.*\) ends before it begins"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_fault_of_regions_is_reported(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as error:
        parse_regions(packed(**change))
    assert error.value.stage == "regions"


def rewritten(compression: int = zipfile.ZIP_STORED, **contents: bytes) -> bytes:
    """Return the npz with another compression, and with other bytes for some arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed())) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, contents.get(entry.filename.removesuffix(".npy"), old.read(entry)))
    return out.getvalue()


def test_damaged_bombs_and_unusual_archives_are_bad_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zip's directory may declare 40 bytes for megabytes of content: at most 40 are unpacked."""
    wrong = bytearray(packed(compressed=True, features=np.zeros((5, 200_000), np.float32)))
    size = (128 + 5 * 200_000 * 4).to_bytes(4, "little")
    while (at := wrong.find(size)) >= 0:
        wrong[at : at + 4] = (40).to_bytes(4, "little")
    bomb = packed(compressed=True, features=np.zeros((5, 8000), np.float32))
    assert len(bomb) < 5000
    monkeypatch.setattr(regions, "MAX_BYTES", 100_000)
    cases = {
        "cannot be read as an npz": [b"", b"no zip", b"PK\x03\x04 cut", bytes(wrong)],
        "features has 160128 bytes; expected at most 100000": [bomb],
        "method that numpy does not use": [rewritten(zipfile.ZIP_LZMA)],
    }
    for reason, members in cases.items():
        for data in members:
            with pytest.raises(BadSample, match=reason):
                parse_regions(data)
    for shape in (b"(99999999999, 1024)", b"(-5, 8)", b"(-5, -8)", b"(2, 2)", b"()"):  # checked before allocation
        header = (b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b"}").ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(5 * 8 * 4)
        with pytest.raises(BadSample, match=r"features declares shape|cannot be read as an npz"):
            parse_regions(rewritten(features=content))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_mutated_regions_raise_only_bad_samples(compressed: bool) -> None:
    whole, rng = packed(compressed), random.Random(1)
    for _ in range(fuzz_rounds(400)):
        with suppress(BadSample):
            parse_regions(mutate(whole, rng))


def test_regions_that_are_missing_or_do_not_fit_the_model_name_the_remedy() -> None:
    whole, unnamed = {"npz": packed()}, {"npz": packed(classes=None)}
    assert len(regions_of(whole, 8, 5).features) == len(regions_of(unnamed, 8).features) == 5
    for members, features, classes, reason in (
        ({"jpg": b"", "json": b""}, None, None, r"no regions \(npz; see `mome shards regions`\); it has jpg, json"),
        (whole, 2048, None, r"8 features per region, but model\.region_features is 2048"),
        (whole, 8, 4, r"class 4, but model\.region_classes is 4"),
        (unnamed, 8, 5, "no array 'classes', which the objective moc needs"),
    ):
        with pytest.raises(BadSample, match=reason):
            regions_of(members, features, classes)


def test_samples_without_image_are_identified_by_regions() -> None:
    one, other = packed(), packed(confidences=None)
    assert image_id_of({"npz": one}) == image_id_of({"npz": one, "txt": b"a caption"}) != image_id_of({"npz": other})
    named = {"json": b'{"image_id": 3}'}
    assert image_id_of(named | {"npz": one}) == image_id_of(named | {"npz": other})
    assert image_id_of({"npz": one, "jpg": b"j"}) == image_id_of({"npz": other, "jpg": b"j"})
