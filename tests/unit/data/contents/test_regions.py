"""The regions member: round trip, checks of untrusted content, and masking."""

from __future__ import annotations

import io
import random
import zipfile
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from pipeline.data.contents import regions
from pipeline.data.contents.members import image_id_of
from pipeline.data.contents.regions import (
    RegionRecord,
    check_fit,
    mask_regions,
    masked_at_most,
    parse_regions,
    regions_of,
)
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom
from tests.support.fuzz import fuzz_rounds, mutate

HEIGHT, WIDTH = 60, 80


def arrays(count: int = 5, numbers: int = 8) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 30, (count, 2))
    return {
        "features": generator.normal(size=(count, numbers)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + generator.uniform(1, 30, (count, 2))], axis=1).astype(np.float32),
        "image_size": np.array([HEIGHT, WIDTH]),
        "classes": np.arange(count),
        "confidences": np.linspace(0.2, 0.9, count).astype(np.float32),
    }


def packed(compressed: bool = False, **changed: Any) -> bytes:
    """Return the member with some arrays changed, or removed where the value is None."""
    given = {name: array for name, array in (arrays() | changed).items() if array is not None}
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **given)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_regions_round_trip(compressed: bool) -> None:
    record, given = parse_regions(packed(compressed)), arrays()
    assert record.to_bytes() == record.to_bytes()
    for read in (record, parse_regions(record.to_bytes())):
        assert read.image_size == (HEIGHT, WIDTH)
        for name in ("features", "boxes", "classes", "confidences"):
            assert np.array_equal(getattr(read, name), given[name])


def test_features_and_boxes_suffice() -> None:
    found = parse_regions(packed(image_size=None, classes=None, confidences=None))
    assert found.classes is found.confidences is None
    boxes = arrays()["boxes"]
    assert found.image_size == (int(np.ceil(boxes[:, 3].max())), int(np.ceil(boxes[:, 2].max())))


def test_half_precision_features_are_read_as_float32() -> None:
    found = parse_regions(packed(features=arrays()["features"].astype(np.float16)))
    assert found.features.dtype == np.float32


def test_location_is_relative_corners_and_area() -> None:
    record = RegionRecord(np.zeros((1, 2), np.float32), np.array([[8, 6, 40, 30]], np.float32), (60, 80))
    expected = [[8 / 80, 6 / 60, 40 / 80, 30 / 60, 32 * 24 / (80 * 60)]]
    np.testing.assert_allclose(record.locations(), expected, rtol=1e-6)


def test_most_confident_regions_are_kept() -> None:
    record = parse_regions(packed(confidences=np.array([0.3, 0.9, 0.1, 0.9, 0.5], np.float32)))
    best = record.most_confident(3)
    assert best.classes.tolist() == [1, 3, 4]  # equal confidences keep their order
    assert np.array_equal(best.features, record.features[[1, 3, 4]])
    assert np.array_equal(best.boxes, record.boxes[[1, 3, 4]])
    assert record.most_confident(5) is record
    assert parse_regions(packed(confidences=None)).most_confident(2).classes.tolist() == [0, 1]


def test_boxes_slightly_outside_are_clipped() -> None:
    boxes = arrays()["boxes"]
    boxes[0] = [-0.4, 0, WIDTH + 0.7, HEIGHT]
    assert parse_regions(packed(boxes=boxes)).boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]


def changed(name: str, where: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    array = arrays()[name]
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


def test_sample_without_regions_names_the_command_for_them() -> None:
    with pytest.raises(BadSample, match=r"no regions \(npz; see `mome shards regions`\); it has jpg, json"):
        regions_of({"jpg": b"", "json": b""})


@pytest.mark.parametrize("data", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_non_npz_bytes_are_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSample, match="cannot be read as an npz"):
        parse_regions(data)


def test_npz_bombs_are_rejected_before_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "MAX_BYTES", 100_000)
    bomb = packed(compressed=True, features=np.zeros((5, 8000), np.float32))
    assert len(bomb) < 5000
    with pytest.raises(BadSample, match="features has 160128 bytes; expected at most 100000"):
        parse_regions(bomb)


def rewritten(compression: int = zipfile.ZIP_STORED, **contents: bytes) -> bytes:
    """Return the npz with another compression, and with other bytes for some arrays."""
    buffer, out = io.BytesIO(packed()), io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, contents.get(entry.filename.removesuffix(".npy"), old.read(entry)))
    return out.getvalue()


@pytest.mark.parametrize("shape", [b"(99999999999, 1024)", b"(-5, 8)", b"(-5, -8)", b"(2, 2)", b"()"])
def test_npz_headers_are_checked_before_allocation(shape: bytes) -> None:
    header = (b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b"}").ljust(117) + b"\n"
    wrong = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(5 * 8 * 4)
    with pytest.raises(BadSample, match=r"features declares shape|cannot be read as an npz"):
        parse_regions(rewritten(features=wrong))


def test_wrong_sizes_in_the_zip_are_detected() -> None:
    """The zip's directory declares 40 bytes for megabytes of content: at most 40 are unpacked."""
    data = bytearray(packed(compressed=True, features=np.zeros((5, 200_000), np.float32)))
    size = (128 + 5 * 200_000 * 4).to_bytes(4, "little")
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = (40).to_bytes(4, "little")
    with pytest.raises(BadSample):
        parse_regions(bytes(data))


def test_unusual_zip_compression_is_rejected() -> None:
    with pytest.raises(BadSample, match="method that numpy does not use"):
        parse_regions(rewritten(zipfile.ZIP_LZMA))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_mutated_regions_raise_only_bad_samples(compressed: bool) -> None:
    whole, rng = packed(compressed), random.Random(1)
    for _ in range(fuzz_rounds(400)):
        with suppress(BadSample):
            parse_regions(mutate(whole, rng))


@pytest.mark.parametrize(
    ("features", "classes", "reason"),
    [
        (2048, None, r"8 features per region, but model\.region_features is 2048"),
        (8, 4, r"class 4, but model\.region_classes is 4"),
        (8, 5, "no array 'classes', which the objective moc needs"),
    ],
)
def test_regions_that_do_not_fit_the_model_name_the_key(features: int, classes: int | None, reason: str) -> None:
    record, unnamed = parse_regions(packed()), parse_regions(packed(classes=None))
    check_fit(record, 8, 5)
    check_fit(unnamed, 8, None)
    with pytest.raises(BadSample, match=reason):
        check_fit(unnamed if classes == 5 else record, features, classes)


def test_region_masking_has_the_configured_fractions() -> None:
    zeroed = total = 0
    for seed in range(300):
        positions, is_zeroed = mask_regions(40, 0.15, CounterRandom(seed))
        assert len(positions) == 6 == masked_at_most(40, 0.15)
        assert (np.diff(positions) > 0).all()
        assert 0 <= positions[0] <= positions[-1] < 40
        zeroed, total = zeroed + int(is_zeroed.sum()), total + len(is_zeroed)
    assert abs(zeroed / total - 0.9) < 3 * (0.09 / total) ** 0.5
    assert len(mask_regions(1, 0.15, CounterRandom(0))[0]) == 1
    assert masked_at_most(3, 0.15) == 1


def test_region_masks_depend_on_the_counter_alone() -> None:
    one, other = (mask_regions(20, 0.15, CounterRandom(7)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_samples_without_image_are_identified_by_regions() -> None:
    one, other = packed(), packed(confidences=None)
    assert image_id_of({"npz": one}) == image_id_of({"npz": one, "txt": b"a caption"}) != image_id_of({"npz": other})
    named = {"json": b'{"image_id": 3}'}
    assert image_id_of(named | {"npz": one}) == image_id_of(named | {"npz": other})
    assert image_id_of({"npz": one, "jpg": b"j"}) == image_id_of({"npz": other, "jpg": b"j"})
