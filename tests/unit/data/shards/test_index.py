"""The index of a shard equals its tar, whatever entries that has; damaged tars and sidecars are rejected."""

import gzip
import io
import itertools
import json
import random
import re
import tarfile
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from pipeline.config.errors import DataError
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import image_id_of
from pipeline.data.shards.index import ShardIndex, ShardRecord, open_sidecar
from pipeline.data.shards.tar import Tar, clean_name
from tests.support.encoded_images import encoded, picture, rotation
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import extracted, index_bytes, members_in, pair, tar_bytes, tar_of

END = bytes(1024)
NAMES = [
    *(b"caf\xe9", b"caf\\xe9", b"\xff\xfe", b"\\xff", b"a\\\xe9", b"\xed\xa0\x80", b"plain", b"a\\b"),
    *(b"\\xe9\xff", b"\xe9\xff", b"\\\\\xff", b"\\\xff", b"\xff", "Tür\\x".encode()),
]
LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


def header(name: bytes = b"a.txt", size: bytes = b"00000000003\0", kind: bytes = b"0", signed: bool = False) -> bytes:
    """Return a ustar header with a correct checksum, whatever its fields contain."""
    block = bytearray(512)
    for at, field in ((0, name), (100, b"0000644\0" + b"0000000\0" * 2), (124, size), (136, b"00000000000\0")):
        block[at : at + len(field)] = field
    block[156:157], block[257:265], block[148:156] = kind, b"ustar\00000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 * (signed and byte > 127) for byte in block)
    return bytes(block)


def entry(data: bytes = b"abc", **fields: object) -> bytes:
    stated = {"size": b"%011o\0" % len(data)} | fields
    return header(**stated) + data.ljust(-(-len(data) // 512) * 512, b"\0")  # type: ignore[arg-type]


def pax(records: bytes = b"", **values: bytes) -> bytes:
    """Return an extended header with these records."""
    for key, value in values.items():
        size = len(key) + len(value) + 3
        size += len(b"%d" % (size + len(b"%d" % size)))
        records = b"%d %s=%s\n" % (size, key.encode(), value) + records
    return entry(records, name=b"pax", kind=b"x")


def test_member_names_become_distinct_text_with_padded_headers_and_signed_checksums() -> None:
    for extended in (False, True):
        names = [name + b".txt" for name in NAMES]
        index = index_bytes(b"".join(pax(path=n) + entry() if extended else entry(name=n) for n in names) + END)
        assert index.keys == tuple(map(clean_name, NAMES))
        assert (index.keys[0], index.keys[-1]) == (r"caf\xe9", "Tür\\x")
        # Only a name and the literal spelling of its escaped form are duplicates.
        assert [NAMES[n] for n in index.duplicate.nonzero()[0]] == [b"caf\\xe9", b"\xff"]
        assert ShardIndex.from_bytes(index.to_bytes()).keys == index.keys
    unclean = replace(index_bytes(entry() + END), keys=(b"caf\xe9".decode("utf-8", "surrogateescape"),))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ShardIndex.from_bytes(unclean.to_bytes())
    name = "Tür.txt".encode()
    assert header(name, signed=True) != header(name)
    data = entry(name=name, signed=True) + pax(bytes(7), path=b"b.txt") + entry() + entry(name=name.lower()) + END
    assert index_bytes(data).keys == ("Tür", "b", "tür")


def test_truncated_damaged_and_compressed_tars_are_rejected_by_name_and_offset() -> None:
    sizes = [b"12x45678901\0", b"-0000000001\0", b"0o000000001\0", b"1_000000000\0", b"\xff" * 12, b"00000004000\0"]
    sizes += [b"\x80" + bytes(3) + (2**62).to_bytes(8, "big"), b"77777777777\0"]
    tars = [entry() + header(size=size, kind=kind) + bytes(512) for size in sizes for kind in (b"0", b"L", b"x", b"Z")]
    values = (b"abc", b"1" + b"0" * 30, b"-3", b"", b"9223372036854775807", "\u0663".encode())
    broken = (b"abc", b"99 path=x\n", b"5 path=x\n", b"9 path=x ", b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"6 a-b\n")
    tars += [pax(size=value) + entry() for value in values]
    good = tar_of((name, bytes(700)) for name in ("1.jpg", "1.txt", "2.jpg"))  # of 512 + 1024 bytes each
    cuts = {
        1536 + 200: "inside a header", 1536 + 512 + 300: "inside a member's data",
        1536: "before the two zero blocks", 3 * 1536 + 512: "between the two zero blocks",
        3 * 1536 - 10: "inside a member's data",  # only padding is missing
    }  # fmt: skip
    for data, reason in (
        *((data + END, ".*header at byte 1024 states") for data in tars),
        *((pax(records) + entry() + END, "the extended header at byte 512 is damaged") for records in broken),
        *((good[:cut], f"the shard is truncated.*(byte {cut}, {place}|states)") for cut, place in cuts.items()),
        (gzip.compress(good), r".*compressed.*Unpack 7\.tar to a plain \.tar"),
        (b"hello world " * 100, "no tar header at byte 0"),
        (good[:1536] + b"\x01" + good[1537:], "no tar header at byte 1536"),
        (good + good, ".*concatenated tars"),
    ):
        with pytest.raises(DataError, match=rf"s3://b/7\.tar: {reason}"):
            index_bytes(data, "s3://b/7.tar")


def test_skipped_entries_are_counted_by_kind() -> None:
    others = {"b.txt": LINK, "c.txt": LINK, "e.txt": HARD, "f.txt": tarfile.FIFOTYPE, "g.txt": tarfile.CHRTYPE}
    data = tar_of((
        ("d", b"", tarfile.DIRTYPE, ""), ("./", b""), ("old/", b"", tarfile.AREGTYPE, ""), ("a.txt", b"one"),
        *((name, b"", kind, "nowhere.txt") for name, kind in others.items()),
        *((name, b"x") for name in ("README", "._a.txt", "a/.b", "a.", "__info__/x.txt", "./z.txt")),
    ), tarfile.GNU_FORMAT)  # fmt: skip
    tar = Tar(io.BytesIO(data), "x.tar", len(data), lambda start, stop: data[start:stop])
    assert [(sample.key, *sample.contents) for sample in tar.samples()] == [("a", "txt"), ("z", "txt")]
    assert tar.skipped == {
        "symbolic link": 2, "hard link to a file that does not precede it in the tar": 1, "pipe": 1,
        "character device": 1, "file without an extension": 2, "hidden file": 2, "file of webdataset's metadata": 1,
    }  # fmt: skip
    assert re.search(r"2 x symbolic link.*the first: b\.txt", tar.skipped_summary())
    with pytest.raises(DataError, match=r"x\.tar: no sample, only 2 x symbolic link.*tar --dereference"):
        index_bytes(tar_of((name, b"", LINK, "../x") for name in ("a.jpg", "a.txt")))


def test_keys_follow_webdataset_and_a_repeated_one_begins_a_flagged_sample() -> None:
    names = ["__a.jpg", "__a.txt", "_b.jpg", "__.jpg", "__c__.jpg", "d/__e__/f.jpg", "__g__/h.jpg", "__i__", "__/j.jpg"]
    data = tar_of((name, b"x") for name in names)
    theirs = [base_plus_ext(item["fname"])[0] for item in tar_file_iterator(io.BytesIO(data))]
    assert list(dict.fromkeys(key for key in theirs if key)) == list(index_bytes(data).keys)
    index = index_bytes(tar_of([("./a.b", b"x"), ("c.b.c", b"x"), ("a/b.C", b"x")]))
    assert [(key, *(name for name, _, _ in index.members(n))) for n, key in enumerate(index.keys)] == [
        ("a", "b"), ("c", "b.c"), ("a/b", "c"),
    ]  # fmt: skip
    names = ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "a.txt", "c.jpg", "b.txt"]
    index = index_bytes(tar_of((name, b"x") for name in names))
    assert (index.keys, index.duplicate.tolist()) == (tuple("aabacb"), [False, True] * 3)
    members = [[name for name, _, _ in index.members(n)] for n in range(6)]
    assert members == [["jpg", "txt"], ["jpg", "txt"], ["jpg"], ["txt"], ["jpg"], ["txt"]]
    assert index_bytes(tar_of([])).first.tolist() == [0]


def test_fuzzed_tars_raise_data_errors_only() -> None:
    rng, long = random.Random(14), "d/" * 80 + "b.txt"
    entries = ("a.txt", b"one"), (long, b"two"), ("c.txt", b"", HARD, "a.txt"), ("d.txt", b"", LINK, "a")
    whole = [tar_of(entries, format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    whole += [entry(name=b"caf\xe9.txt") + pax(size=b"3", path=b"x.txt") + entry() + END]
    outcomes = Counter[str]()
    for _ in range(fuzz_rounds(600)):
        data = bytearray(mutate(rng.choice(whole), rng))
        for at in range(0, len(data) - 511, 512):  # most damage would end at the checksum: make it right again
            if rng.random() < 0.8 and any(data[at : at + 512]):
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        try:
            for key in index_bytes(bytes(data)).keys:
                key.encode()
            outcomes["read"] += 1
        except DataError as error:
            outcomes["refused" if str(error).startswith("x.tar: ") else "nameless"] += 1
    assert outcomes.keys() == {"read", "refused"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_equals_tarfile_and_hard_links_are_read_as_their_targets(format: int) -> None:
    long = "d" * 90 + "/" + "é" * 40 if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "e" * 60
    names = ["a/1.jpg", "a/1.json", f"{long}.jpg", f"{long}.txt", "b.seg.png"]
    data = tar_of([(name, name.encode() * 9) for name in names], format)
    index = index_bytes(data)
    assert members_in(data, index) == extracted(data)
    facts = (("a/1", long, "b"), ("jpg", "json", "seg.png", "txt"), len(data))
    assert (index.keys, index.extensions, index.bytes) == facts
    long = "d/" * 60 + "b" if format != tarfile.USTAR_FORMAT else "d/b"
    links = ((f"{long}.txt", "a.txt"), (f"{long}.json", "./a.json"), ("c.txt", f"{long}.txt"))
    linked = ((name, b"", HARD, target) for name, target in links)
    data = tar_of((("a.txt", b"one"), ("a.json", b"{}"), *linked, ("c.json", b"[]")), format)
    contents = {"a.txt": b"one", "a.json": b"{}", f"{long}.txt": b"one", f"{long}.json": b"{}"}
    index = index_bytes(data)
    assert members_in(data, index) == contents | {"c.txt": b"one", "c.json": b"[]"}
    assert index.keys == ("a", long, "c")
    for number in range(len(index)):
        start, stop = index.byte_range(number)
        assert all(start <= at and at + size <= stop for _, at, size in index.members(number))


def index_of(*records: object) -> ShardIndex:
    """Return the index of a tar of samples that have only a json."""
    samples = {f"{n:03d}": {"json": json.dumps(record).encode()} for n, record in enumerate(records)}
    return index_bytes(tar_bytes(samples))


def test_properties_equal_those_of_the_members_and_json_fields_become_columns() -> None:
    for kind, (orientation, sides) in itertools.product(("JPEG", "PNG", "WEBP"), ((1, (30, 40)), (6, (40, 30)))):
        data = encoded(picture(30, 40), kind, exif=rotation(orientation))
        index = index_bytes(tar_of([(f"a.{kind.lower()}", data)]))
        assert (int(index.height[0]), int(index.width[0])) == decode(data, 10_000).shape[:2] == sides
    damaged, whole = b"\xff\xd8 no picture", pair(1)
    samples = {
        "a": {"jpg": damaged, "json": b"{"}, "b": {"txt": b"words only"}, "c": {"json": b"[1]"}, "d": {"cls": b"1"},
        "e": {"jpg": whole["jpg"][: len(whole["jpg"]) // 2]},
    }  # fmt: skip
    index = index_bytes(tar_bytes(samples))
    assert index.width.tolist() == index.height.tolist() == [0, 0, 0, 0, 24]  # known of a truncated image
    assert index.caption_length.tolist() == [0, 10, 0, 0, 0]
    assert index.image_id[:4].tolist() == [image_id_of({"jpg": damaged}), 0, 0, 0]
    assert (index.url_id.any(), index.columns) == (False, {})
    samples = {"a": whole, "b": pair(1), "c": pair(2) | {"json": b'{"image_id": 7, "caption": "x"}'}}
    index = index_bytes(tar_bytes(samples | {"d": whole | {"json": b'{"image_id": NaN}'}}))  # which is no name
    named = [image_id_of(members) for members in samples.values()]
    assert index.image_id.tolist() == [*named, image_id_of({"jpg": whole["jpg"]})]
    assert index.image_id[0] == index.image_id[1] != index.image_id[2]
    captions = [["four", "six ch", "äöü"], [" süß "], ["fine", ""]]  # the longest counts
    assert index_of(*({"captions": c} for c in captions)).caption_length.tolist() == [6, 3, 0]
    rows = [
        {"score": 1, "safe": True, "tongue": "en", "mixed": 1, "list": [1], "long": "x" * 17, "huge": 10**400},
        {"score": 2.5, "safe": False, "mixed": "one", "width": 9, "key": "k", "url": "u", "image_id": 3},
        {"tongue": "de", "status": "ok"},
        *({"name": f"n{number}"} for number in range(300)),
    ]
    index = index_of(*rows)
    assert (sorted(index.columns), index.width.any()) == (["safe", "score", "status", "tongue"], False)
    assert index.other_fields == ("huge", "list", "long", "mixed", "name")
    np.testing.assert_array_equal(index.columns["score"], [1, 2.5, *[np.nan] * 301])
    assert index.columns["safe"][:2].tolist() == [1, 0]
    assert index.columns["tongue"][:3].tolist() == ["en", "", "de"]
    index = index_of(*({"common": 1} | {f"own{sample}_{n}": 1 for n in range(300)} for sample in range(3)))
    assert ("common" in index.columns, len(index.columns), len(index.other_fields)) == (True, 500, 401)


@pytest.fixture
def index() -> ShardIndex:
    jsons = [b'{"score": 0.5, "safe": true, "tongue": "en"}', b'{"caption": "two", "score": null}', b"no json"]
    samples = {str(n): pair(n) | {"json": data} for n, data in enumerate(jsons)}
    return index_bytes(tar_bytes(samples | {"text": {"txt": b"only words"}}), etag="tag")


def test_sidecars_are_read_whole_or_are_value_errors(index: ShardIndex) -> None:
    again = ShardIndex.from_bytes(index.to_bytes())
    arrays = {name: value for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    assert len(arrays) == 11
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(again, name), array, strict=True)
    for name in ("keys", "extensions", "other_fields", "bytes", "digest", "etag"):
        assert getattr(again, name) == getattr(index, name)
    assert list(again.columns) == ["safe", "score", "tongue"]
    assert again.columns["tongue"].tolist() == ["en", "", "", ""]
    np.testing.assert_array_equal(again.columns["score"], [0.5, np.nan, np.nan, np.nan])
    with open_sidecar(data := index.to_bytes(), "x.tar") as (_, record):
        assert record == ShardRecord("x.tar", len(index), index.bytes, index.digest, "tag")
    parts = dict(np.load(io.BytesIO(data)))
    damaged = [data[: int(keep * len(data))] for keep in (0.0, 0.01, 0.5, 0.99)]
    damaged += [sidecar_of({"version": np.array(1), "first": np.zeros(1)})]
    for change in ({"samples": 10**9}, {"samples": -1}, {"bytes": "many"}, {"samples": None}, {"version": [3]}):
        facts = json.dumps(json.loads(parts["facts"].tobytes()) | change).encode()
        damaged += [sidecar_of(parts | {"facts": np.frombuffer(facts, dtype=np.uint8)})]
    for content in damaged:
        with pytest.raises(ValueError, match="not a valid index"):
            ShardIndex.from_bytes(content)
        with pytest.raises(ValueError, match="not a valid index"), open_sidecar(content):
            pass


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
        refused = pytest.raises(ValueError, match=f"{name} has .* expected at most")
        tracemalloc.start()
        with nullcontext() if name == "keys" else refused:  # no array of an index is named keys: ignored
            ShardIndex.from_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_fuzzed_sidecars_raise_value_errors_only(index: ShardIndex) -> None:
    rng, whole, outcomes = random.Random(7), index.to_bytes(), Counter[str]()
    parts = dict(np.load(io.BytesIO(whole)))
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
