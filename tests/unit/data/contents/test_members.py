"""The members of a sample: captions, images and identifiers are found, and unsafe samples are rejected."""

from __future__ import annotations

import pytest

from pipeline.data.contents.members import captions_of, check_members, image_bytes, image_id_of
from pipeline.data.quarantine import BadSample


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"json": b'{"captions": ["one", " two "]}'}, ["one", "two"]),
        ({"json": b'{"captions": ["one"]}', "txt": b"other"}, ["one"]),
        ({"json": b'{"caption": "one", "url": "x"}', "txt": b"one"}, ["one"]),  # img2dataset
        ({"json": b'{"caption": null, "url": "x"}', "txt": b"one\n"}, ["one"]),
        ({"txt": "Straße".encode()}, ["Straße"]),
    ],
)
def test_captions_are_found_in_every_layout(members: dict[str, bytes], captions: list[str]):
    assert captions_of(members) == captions


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b""}, "no caption"),
        ({"json": b"{}"}, "no caption"),
        ({"txt": b"  \n"}, "caption 1 of 1 is empty"),
        ({"json": b'{"captions": ["one", ""]}'}, "caption 2 of 2 is empty"),
        ({"json": b'{"captions": []}'}, "list of captions is empty"),
        ({"json": b'{"captions": [1]}'}, "not a list of strings"),
        ({"json": b'{"captions": "one"}'}, "not a list of strings"),
        ({"json": b'{"captions": '}, "json cannot be read"),
        ({"json": b"[1]"}, "not an object but a list"),
        ({"txt": b"caf\xe9"}, "not UTF-8"),
        ({"json": b'{"caption": "caf\xe9"}'}, "not UTF-8"),
        ({"pkl": b"", "pth": b""}, "it has pkl, pth"),
    ],
)
def test_missing_empty_and_unreadable_captions_are_bad_samples(members: dict[str, bytes], reason: str):
    with pytest.raises(BadSample, match=reason):
        captions_of(members)


def test_image_is_found_by_its_exact_extension():
    assert image_bytes({"seg.png": b"mask", "webp": b"picture"}) == b"picture"
    with pytest.raises(BadSample, match=r"no image.*it has seg\.png"):
        image_bytes({"seg.png": b"mask"})


def test_equal_images_have_equal_ids():
    assert image_id_of({"jpg": b"x"}) == image_id_of({"png": b"x", "txt": b"a"}) != image_id_of({"jpg": b"y"})
    named = [image_id_of({"jpg": picture, "json": b'{"image_id": 7}'}) for picture in (b"x", b"y")]
    assert named[0] == named[1] == image_id_of({"jpg": b"z", "json": b'{"image_id": "7"}'})
    assert -(2**63) <= named[0] < 2**63


@pytest.mark.parametrize("extension", ["pkl", "pth", "pickle", "features.pt"])
def test_samples_with_executable_members_are_bad(extension: str):
    with pytest.raises(BadSample, match=r"executes code when it is loaded"):
        check_members({"jpg": b"", extension: b""}, is_duplicate=False)
    check_members({"jpg": b"", "json": b"", "npz": b""}, is_duplicate=False)


def test_duplicate_keys_are_rejected():
    with pytest.raises(BadSample, match=r"occurs twice"):
        check_members({"jpg": b""}, is_duplicate=True)
