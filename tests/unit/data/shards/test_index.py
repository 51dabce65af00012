"""The index of a shard equals its tar, and damaged sidecars are rejected."""

import io
import itertools
import json
import random
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.data.contents.images import decode
from pipeline.data.contents.members import image_id_of
from pipeline.data.shards.index import ShardIndex, ShardRecord, open_sidecar
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import index_bytes, pair, tar_bytes, tar_of


def index_of(*records: object) -> ShardIndex:
    """Return the index of a tar of samples that have only a json."""
    samples = {f"{n:03d}": {"json": json.dumps(record).encode()} for n, record in enumerate(records)}
    return index_bytes(tar_bytes(samples))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_equals_tarfile(format: int) -> None:
    long = "d" * 90 + "/" + "é" * 40 if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "e" * 60
    names = ["a/1.jpg", "a/1.json", f"{long}.jpg", f"{long}.txt", "b.seg.png"]
    data = tar_of([(name, name.encode() * 9) for name in names], format)
    index = index_bytes(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}
    members = [(f"{key}.{name}", at, size) for n, key in enumerate(index.keys) for name, at, size in index.members(n)]
    assert {name: data[at : at + size] for name, at, size in members} == expected
    assert index.keys == ("a/1", long, "b")
    assert index.extensions == ("jpg", "json", "seg.png", "txt")
    assert index.bytes == len(data)


def test_repeated_key_begins_a_flagged_sample() -> None:
    names = ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "a.txt", "c.jpg", "b.txt"]
    index = index_bytes(tar_of((name, b"x") for name in names))
    assert index.keys == ("a", "a", "b", "a", "c", "b")
    assert index.duplicate.tolist() == [False, True, False, True, False, True]
    members = [[name for name, _, _ in index.members(n)] for n in range(6)]
    assert members == [["jpg", "txt"], ["jpg", "txt"], ["jpg"], ["txt"], ["jpg"], ["txt"]]
    empty = index_bytes(tar_of([]))
    assert (len(empty), empty.first.tolist()) == (0, [0])


def test_indexed_image_size_is_the_decoded_size() -> None:
    for kind, orientation in itertools.product(("JPEG", "PNG", "WEBP"), (1, 6)):
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 30), "white").save(buffer, kind, exif=exif)
        index = index_bytes(tar_of([(f"a.{kind.lower()}", buffer.getvalue())]))
        assert (int(index.height[0]), int(index.width[0])) == decode(buffer.getvalue(), 10_000).shape[:2]
        assert (int(index.width[0]) == 30) == (orientation == 6)


def test_properties_equal_those_of_the_members_and_unknown_ones_are_zero() -> None:
    damaged, whole = b"\xff\xd8 no picture", pair(1)
    samples = {
        "a": {"jpg": damaged, "json": b"{"}, "b": {"txt": b"words only"}, "c": {"json": b"[1]"}, "d": {"cls": b"1"},
        "e": {"jpg": whole["jpg"][: len(whole["jpg"]) // 2]},
    }  # fmt: skip
    index = index_bytes(tar_bytes(samples))
    assert index.width.tolist() == index.height.tolist() == [0, 0, 0, 0, 24]  # known of a truncated image
    assert index.caption_length.tolist() == [0, 10, 0, 0, 0]
    assert not index.url_id.any()
    assert index.image_id[:4].tolist() == [image_id_of({"jpg": damaged}), 0, 0, 0]
    assert index.columns == {}
    samples = {"a": whole, "b": pair(1), "c": pair(2) | {"json": b'{"image_id": 7, "caption": "x"}'}}
    index = index_bytes(tar_bytes(samples))
    assert index.image_id.tolist() == [image_id_of(members) for members in samples.values()]
    assert index.image_id[0] == index.image_id[1] != index.image_id[2]
    captions = [["four", "six ch", "äöü"], [" süß "], ["fine", ""]]  # the longest counts
    assert index_of(*({"captions": c} for c in captions)).caption_length.tolist() == [6, 3, 0]


def test_json_fields_become_columns_or_other_fields() -> None:
    rows = [
        {"score": 1, "safe": True, "tongue": "en", "mixed": 1, "list": [1], "long": "x" * 17, "huge": 10**400},
        {"score": 2.5, "safe": False, "mixed": "one", "width": 9, "key": "k", "url": "u", "image_id": 3},
        {"tongue": "de", "status": "ok"},
        *({"name": f"n{number}"} for number in range(300)),
    ]
    index = index_of(*rows)
    assert sorted(index.columns) == ["safe", "score", "status", "tongue"]
    assert index.other_fields == ("huge", "list", "long", "mixed", "name")
    assert index.columns["score"][:2].tolist() == [1, 2.5]
    assert np.isnan(index.columns["score"][2:]).all()
    assert index.columns["safe"][:2].tolist() == [1, 0]
    assert index.columns["tongue"][:3].tolist() == ["en", "", "de"]
    assert not index.width.any()
    rows = [{"common": 1} | {f"own{sample}_{n}": 1 for n in range(300)} for sample in range(3)]
    index = index_of(*rows)
    assert len(index.columns) == 500
    assert "common" in index.columns
    assert len(index.other_fields) == 401


@pytest.fixture
def index() -> ShardIndex:
    one = b'{"caption": "one", "score": 0.5, "safe": true, "tongue": "en"}'
    jsons = [one, b'{"caption": "two", "score": null}', b"no json"]
    samples = {str(n): pair(n) | {"json": data} for n, data in enumerate(jsons)}
    return index_bytes(tar_bytes(samples | {"text": {"txt": b"only words"}}), etag="tag")


def test_sidecar_round_trip(index: ShardIndex) -> None:
    again = ShardIndex.from_bytes(index.to_bytes())
    arrays = {name: value for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    assert len(arrays) == 11
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(again, name), array, strict=True)
    for name in ("keys", "extensions", "other_fields", "bytes", "digest", "etag"):
        assert getattr(again, name) == getattr(index, name)
    assert list(again.columns) == ["safe", "score", "tongue"]
    assert again.columns["tongue"].tolist() == ["en", "", "", ""]
    assert np.array_equal(again.columns["score"], [0.5, np.nan, np.nan, np.nan], equal_nan=True)
    with open_sidecar(index.to_bytes(), "x.tar") as (_, record):
        assert record == ShardRecord("x.tar", len(index), index.bytes, index.digest, "tag")


def sidecar_of(parts: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **parts)
    return buffer.getvalue()


def test_sidecar_memory_is_bounded_by_the_tar() -> None:
    parts = dict(np.load(io.BytesIO(index_bytes(tar_bytes({"1": {"jpg": b"x", "txt": b"y"}})).to_bytes())))
    for name in ("facts", "names", "numbers", "texts", "first", "crc", "keys"):
        kind = parts[name].dtype if name in parts else np.dtype(np.uint8)
        bomb = sidecar_of(parts | {name: np.zeros(2**25 // kind.itemsize, dtype=kind)})
        assert len(bomb) < 2**17
        tracemalloc.start()
        if name == "keys":  # no array of an index: ignored
            ShardIndex.from_bytes(bomb)
        else:
            with pytest.raises(ValueError, match=f"{name} has .* expected at most"):
                ShardIndex.from_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_truncated_old_and_impossible_sidecars_are_value_errors(index: ShardIndex) -> None:
    data = index.to_bytes()
    parts = dict(np.load(io.BytesIO(data)))
    damaged = [data[: int(keep * len(data))] for keep in (0.0, 0.01, 0.5, 0.99)]
    for change in ({"samples": 10**9}, {"samples": -1}, {"bytes": "many"}, {"samples": None}, {"version": [3]}):
        facts = json.dumps(json.loads(parts["facts"].tobytes()) | change).encode()
        damaged.append(sidecar_of(parts | {"facts": np.frombuffer(facts, dtype=np.uint8)}))
    for content in damaged:
        with pytest.raises(ValueError, match="not a valid index"):
            ShardIndex.from_bytes(content)
        with pytest.raises(ValueError, match="not a valid index"), open_sidecar(content):
            pass
    with pytest.raises(ValueError, match="not a valid index: of an earlier version"):
        ShardIndex.from_bytes(sidecar_of({"version": np.array(1), "first": np.zeros(1)}))


def test_fuzzed_sidecars_raise_value_errors_only(index: ShardIndex) -> None:
    rng = random.Random(7)
    whole = index.to_bytes()
    parts = dict(np.load(io.BytesIO(whole)))
    outcomes = Counter[str]()
    for turn in range(fuzz_rounds(100)):
        name = rng.choice(list(parts))
        if turn % 2:
            damaged = mutate(whole, rng)
        elif name in ("facts", "names") or rng.random() < 0.5:
            damaged = sidecar_of(parts | {name: np.frombuffer(mutate(parts[name].tobytes(), rng), dtype=np.uint8)})
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
