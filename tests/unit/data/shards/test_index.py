"""The index of a shard equals its tar, and damaged tars and sidecars are rejected."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.config.errors import DataError
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import image_id_of
from pipeline.data.shards.index import ShardIndex, sidecar_facts
from pipeline.data.shards.tar import split_key
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import index_bytes


def packed(names: list[str], format: int = tarfile.GNU_FORMAT, size: int = 700) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = size
            tar.addfile(header, io.BytesIO(name.encode().ljust(size)[:size]))
    return buffer.getvalue()


def contents(index: ShardIndex, data: bytes) -> dict[str, dict[str, bytes]]:
    return {
        key: {name: data[at : at + size] for name, at, size in index.members(number)}
        for number, key in enumerate(index.keys)
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_equals_tarfile(format: int):
    long = "d" * 90 + "/" + "é" * 40 if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "e" * 60
    data = packed(["a/1.jpg", "a/1.json", f"{long}.jpg", f"{long}.txt", "b.seg.PNG"], format)
    index = index_bytes(data, "shard.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, extension = split_key(member.name)
            expected.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert contents(index, data) == expected
    assert index.keys == ("a/1", long, "b")
    assert index.extensions == ("jpg", "json", "seg.png", "txt")
    assert index.bytes == len(data)


def test_sidecar_round_trip(make_tar, make_pair):
    described = [
        b'{"caption": "one", "score": 0.5, "safe": true, "tongue": "en"}',
        b'{"caption": "two", "score": null}',
        b"no json",
    ]
    samples = {str(n): make_pair(n) | {"json": data} for n, data in enumerate(described)}
    index = index_bytes(make_tar(samples | {"text": {"txt": b"only words"}}), "shard.tar", etag="tag")
    again = ShardIndex.from_bytes(index.to_bytes())
    arrays = [name for name, value in vars(index).items() if isinstance(value, np.ndarray)]
    assert len(arrays) == 11
    for name in arrays:
        assert np.array_equal(getattr(again, name), getattr(index, name)), name
        assert getattr(again, name).dtype == getattr(index, name).dtype, name
    for name in ("keys", "extensions", "other_fields", "bytes", "digest", "etag"):
        assert getattr(again, name) == getattr(index, name)
    assert list(again.columns) == ["safe", "score", "tongue"]
    assert again.columns["tongue"].tolist() == ["en", "", "", ""]
    assert np.array_equal(again.columns["score"], [0.5, np.nan, np.nan, np.nan], equal_nan=True)
    assert sidecar_facts(index.to_bytes()) == index.facts


@pytest.mark.parametrize("keep", [0, 2, 40, 0.5, -1])
def test_damaged_sidecar_is_a_value_error(keep: float):
    data = index_bytes(packed(["1.jpg", "1.txt"]), "x.tar").to_bytes()
    cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    for read in (ShardIndex.from_bytes, sidecar_facts):
        with pytest.raises(ValueError, match="not an index"):
            read(cut)


def test_sidecar_of_version_1_is_recognized():
    buffer = io.BytesIO()
    np.savez(buffer, version=1, first=np.zeros(1))
    with pytest.raises(ValueError, match="an index of an earlier version"):
        ShardIndex.from_bytes(buffer.getvalue())


def test_folders_links_and_unnamed_files_are_not_samples():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/1.txt", tarfile.REGTYPE), ("link.txt", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("README", "d/.hidden.txt", "._1.txt", "__meta__", "__meta__/info.json", "./2.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert index_bytes(buffer.getvalue(), "shard.tar").keys == ("d/1", "2")


def test_empty_tar_has_no_samples():
    index = index_bytes(packed([]), "shard.tar")
    assert len(index) == 0
    assert index.first.tolist() == [0]


def cuts(data: bytes) -> dict[str, bytes]:
    """Truncate a tar of three 700-byte members (512 + 1024 bytes each) at five kinds of places."""
    end = 3 * 1536
    return {
        "inside a header": data[: 1536 + 200],
        "inside a member's data": data[: 1536 + 512 + 300],
        "before the two zero blocks": data[:1536],
        "between the two zero blocks": data[: end + 512],
        "with its last member's padding missing": data[: end - 10],
    }


@pytest.mark.parametrize("cut", list(cuts(b"")))
def test_truncated_tar_is_rejected_by_name(cut: str):
    data = cuts(packed(["1.jpg", "1.txt", "2.jpg"]))[cut]
    with pytest.raises(DataError, match=r"s3://b/00007\.tar: the shard is truncated"):
        index_bytes(data, "s3://b/00007.tar")


def test_damaged_and_compressed_files_name_a_remedy():
    good = packed(["1.jpg", "1.txt", "2.jpg"])
    with pytest.raises(DataError, match=r"compressed.*Unpack x.tgz"):
        index_bytes(gzip.compress(good), "x.tgz")
    with pytest.raises(DataError, match=r"x\.tar: no tar header at byte 0"):
        index_bytes(b"hello world " * 100, "x.tar")
    with pytest.raises(DataError, match=r"x\.tar: no tar header at byte 1536"):
        index_bytes(good[:1536] + b"\x01" + good[1537:], "x.tar")
    with pytest.raises(DataError, match=r"concatenated tars"):
        index_bytes(good + good, "x.tar")


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def test_repeated_key_begins_a_flagged_sample():
    names = ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "a.txt", "c.jpg", "b.txt"]
    index = index_bytes(tar_of([(name, name.encode()) for name in names]), "x.tar")
    assert index.keys == ("a", "a", "b", "a", "c", "b")
    assert index.duplicate.tolist() == [False, True, False, True, False, True]
    assert [[name for name, _, _ in index.members(n)] for n in range(6)] == [
        ["jpg", "txt"],
        ["jpg", "txt"],
        ["jpg"],
        ["txt"],
        ["jpg"],
        ["txt"],
    ]


def encoded(format: str, size: tuple[int, int], orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "white").save(buffer, format, exif=exif if orientation > 1 else b"")
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_indexed_image_size_is_the_decoded_size(format: str, orientation: int):
    data = encoded(format, (40, 30), orientation)
    index = index_bytes(tar_of([(f"a.{format.lower()}", data)]), "x.tar")
    assert (int(index.height[0]), int(index.width[0])) == decode(data, 10_000).shape[:2]
    assert (int(index.width[0]) == 30) == (orientation == 6)


def test_unknown_properties_are_zero():
    members = [
        ("a.jpg", b"\xff\xd8 no picture"),
        ("a.json", b"{"),
        ("b.txt", b"words only"),
        ("c.json", b"[1]"),
        ("d.cls", b"1"),
    ]
    index = index_bytes(tar_of(members), "x.tar")
    assert index.width.tolist() == index.height.tolist() == [0, 0, 0, 0]
    assert index.caption_length.tolist() == [0, 10, 0, 0]
    assert index.url_id.tolist() == [0, 0, 0, 0]
    assert index.image_id.tolist() == [image_id_of({"jpg": b"\xff\xd8 no picture"}), 0, 0, 0]
    assert index.columns == {}


def test_image_ids_equal_those_of_the_members(make_tar, make_pair):
    samples = {"a": make_pair(1), "b": make_pair(1), "c": make_pair(2) | {"json": b'{"image_id": 7, "caption": "x"}'}}
    index = index_bytes(make_tar(samples), "x.tar")
    assert index.image_id.tolist() == [image_id_of(members) for members in samples.values()]
    assert index.image_id[0] == index.image_id[1] != index.image_id[2]


def test_caption_length_is_the_maximum(make_tar):
    samples = {
        "a": {"json": json.dumps({"captions": ["four", "six ch", "äöü"]}).encode()},
        "b": {"txt": " süß ".encode()},
        "c": {"json": b'{"captions": ["fine", ""]}'},
    }
    assert index_bytes(make_tar(samples), "x.tar").caption_length.tolist() == [6, 3, 0]


def test_json_fields_become_columns_or_other_fields(make_tar):
    rows = [
        {"score": 1, "safe": True, "tongue": "en", "mixed": 1, "list": [1], "long": "x" * 17, "huge": 10**400},
        {"score": 2.5, "safe": False, "mixed": "one", "width": 9, "key": "k", "url": "u", "image_id": 3},
        {"tongue": "de", "status": "ok"},
    ]
    rows += [{"name": f"n{number}"} for number in range(300)]
    index = index_bytes(make_tar({f"{n:03d}": {"json": json.dumps(row).encode()} for n, row in enumerate(rows)}))
    assert sorted(index.columns) == ["safe", "score", "status", "tongue"]
    assert index.other_fields == ("huge", "list", "long", "mixed", "name")
    assert index.columns["score"][:2].tolist() == [1, 2.5]
    assert np.isnan(index.columns["score"][2:]).all()
    assert index.columns["safe"][:2].tolist() == [1, 0]
    assert index.columns["tongue"][:3].tolist() == ["en", "", "de"]
    assert index.width.tolist() == [0] * len(rows)


def test_size_of_a_truncated_image_is_known(make_tar):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    whole = simplejpeg.encode_jpeg(noise, 90, "RGB")
    index = index_bytes(make_tar({"a": {"jpg": whole[: len(whole) // 2]}}), "x.tar")
    assert (index.width[0], index.height[0]) == (40, 30)


def parts_of(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def sidecar_of(parts: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **parts)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["facts", "names", "numbers", "texts", "first", "keys", "crc"])
def test_sidecar_memory_is_bounded_by_the_tar(name: str):
    parts = parts_of(index_bytes(packed(["1.jpg", "1.txt"]), "x.tar").to_bytes())
    kind = parts[name].dtype if name in parts else np.uint8
    bomb = sidecar_of(parts | {name: np.zeros(2**25 // np.dtype(kind).itemsize, dtype=kind)})
    assert len(bomb) < 2**17
    tracemalloc.start()
    if name == "keys":
        ShardIndex.from_bytes(bomb)
    else:
        with pytest.raises(ValueError, match=f"{name} has .* expected at most"):
            ShardIndex.from_bytes(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_impossible_facts_are_a_value_error():
    parts = parts_of(index_bytes(packed(["1.jpg"]), "x.tar").to_bytes())
    facts = json.loads(parts["facts"].tobytes())
    for change in ({"samples": 10**9}, {"samples": -1}, {"bytes": "many"}, {"samples": None}, {"version": [3]}):
        content = np.frombuffer(json.dumps(facts | change).encode(), dtype=np.uint8)
        with pytest.raises(ValueError, match=r"not an index|index version"):
            ShardIndex.from_bytes(sidecar_of(parts | {"facts": content}))


def test_fuzzed_sidecars_raise_value_errors_only(make_tar, make_pair):
    rng = random.Random(7)
    data = make_tar({str(n): make_pair(n) | {"json": b'{"score": 1, "tongue": "en"}'} for n in range(4)})
    whole = index_bytes(data, "x.tar").to_bytes()
    outcomes = Counter[str]()
    for turn in range(fuzz_rounds(100)):
        parts = parts_of(whole)
        name = rng.choice(list(parts))
        content = bytearray(parts[name].tobytes())
        if turn % 2:
            damaged = mutate(whole, rng)
        elif name in ("facts", "names") or rng.random() < 0.5:
            hurt = np.frombuffer(mutate(bytes(content), rng), dtype=np.uint8)
            damaged = sidecar_of(parts | {name: hurt})
        else:
            flat = parts[name].flatten()
            flat[rng.randrange(len(flat))] = rng.choice([0, 1, 127, 200])
            damaged = sidecar_of(parts | {name: flat.reshape(parts[name].shape)})
        try:
            index = ShardIndex.from_bytes(damaged)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for number in range(len(index)):
            index.keys[number].encode()
            assert all(0 <= at <= at + size <= index.bytes for _, at, size in index.members(number))
    assert outcomes.keys() == {"refused", "read"}


def test_only_the_most_frequent_fields_become_columns(make_tar):
    rows = [{"common": 1} | {f"own{sample}_{n}": 1 for n in range(300)} for sample in range(3)]
    samples = {str(n): {"txt": b"x", "json": json.dumps(row).encode()} for n, row in enumerate(rows)}
    index = index_bytes(make_tar(samples), "x.tar")
    assert len(index.columns) == 500
    assert "common" in index.columns
    assert len(index.other_fields) == 401
