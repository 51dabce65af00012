"""Names, sizes and kinds of entries that a tar may have, and what becomes of damaged ones."""

import gzip
import io
import random
import tarfile
from collections import Counter
from dataclasses import replace

import pytest
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from pipeline.config.errors import DataError
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.tar import Tar, clean_name
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import index_bytes, tar_of

END = bytes(1024)
NAMES = [
    *(b"caf\xe9", b"caf\\xe9", b"\xff\xfe", b"\\xff", b"a\\\xe9", b"\xed\xa0\x80", b"plain", b"a\\b"),
    *(b"\\xe9\xff", b"\xe9\xff", b"\\\\\xff", b"\\\xff", b"\xff", "Tür\\x".encode()),
]
FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


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


def written(*entries: tuple[str, bytes, str], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of (name, type, link target or content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, kind, text in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(text) * (kind == FILE), text * (kind != FILE)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_member_names_become_distinct_text() -> None:
    for extended in (False, True):
        names = [name + b".txt" for name in NAMES]
        index = index_bytes(b"".join(pax(path=n) + entry() if extended else entry(name=n) for n in names) + END)
        assert index.keys == tuple(map(clean_name, NAMES))
        assert (index.keys[0], index.keys[-1]) == (r"caf\xe9", "Tür\\x")
        # Only a name and the literal spelling of its escaped form are duplicates.
        assert [NAMES[n] for n in index.duplicate.nonzero()[0]] == [b"caf\\xe9", b"\xff"]
        assert ShardIndex.from_bytes(index.to_bytes()).keys == index.keys
    old = replace(index_bytes(entry() + END), keys=(b"caf\xe9".decode("utf-8", "surrogateescape"),))
    assert ShardIndex.from_bytes(old.to_bytes()).keys == (clean_name(b"caf\xe9"),)  # surrogates of old sidecars


def test_invalid_sizes_and_extended_headers_name_shard_and_offset() -> None:
    sizes = [
        *(b"12x45678901\0", b"-0000000001\0", b"0o000000001\0", b"1_000000000\0", b"\xff" * 12),
        *(b"\x80" + bytes(3) + (2**62).to_bytes(8, "big"), b"00000004000\0", b"77777777777\0"),
    ]
    tars = [entry() + header(size=size, kind=kind) + bytes(512) for size in sizes for kind in (b"0", b"L", b"x", b"Z")]
    values = (b"abc", b"1" + b"0" * 30, b"-3", b"", b"9223372036854775807", "\u0663".encode())
    for data in (*tars, *(pax(size=value) + entry() for value in values)):
        with pytest.raises(DataError, match=r"x\.tar: .*header at byte 1024 states"):
            index_bytes(data + END)
    broken = (b"abc", b"99 path=x\n", b"5 path=x\n", b"9 path=x ", b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"6 a-b\n")
    for records in broken:
        with pytest.raises(DataError, match=r"x\.tar: the extended header at byte 512 is damaged"):
            index_bytes(pax(records) + entry() + END)


def test_padded_headers_and_signed_checksums_are_accepted() -> None:
    assert index_bytes(pax(bytes(7), path=b"b.txt") + entry() + END).keys == ("b",)
    name = "Tür.txt".encode()
    assert header(name, signed=True) != header(name)
    data = entry(name=name, signed=True) + entry(name=name.replace(b"T", b"t")) + END
    assert index_bytes(data).keys == ("Tür", "tür")


def test_truncated_damaged_and_compressed_tars_are_rejected_by_name() -> None:
    good = tar_of((name, bytes(700)) for name in ("1.jpg", "1.txt", "2.jpg"))  # of 512 + 1024 bytes each
    for cut, place in {
        1536 + 200: "inside a header",
        1536 + 512 + 300: "inside a member's data",
        1536: "before the two zero blocks",
        3 * 1536 + 512: "between the two zero blocks",
        3 * 1536 - 10: "inside a member's data",  # only padding is missing
    }.items():
        reason = rf"s3://b/00007\.tar: the shard is truncated.*(byte {cut}, {place}|states)"
        with pytest.raises(DataError, match=reason):
            index_bytes(good[:cut], "s3://b/00007.tar")
    for data, reason in {
        gzip.compress(good): r"compressed.*Unpack x.tar to a plain \.tar",
        b"hello world " * 100: r"x\.tar: no tar header at byte 0",
        good[:1536] + b"\x01" + good[1537:]: r"x\.tar: no tar header at byte 1536",
        good + good: r"concatenated tars",
    }.items():
        with pytest.raises(DataError, match=reason):
            index_bytes(data)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_link_is_read_as_its_target(format: int) -> None:
    long = "d/" * 60 + "b" if format != tarfile.USTAR_FORMAT else "d/b"
    data = written(
        ("a.txt", FILE, "one"), ("a.json", FILE, "{}"), (f"{long}.txt", HARD, "a.txt"),
        (f"{long}.json", HARD, "./a.json"), ("c.txt", HARD, f"{long}.txt"), ("c.json", FILE, "[]"), format=format,
    )  # fmt: skip
    index = index_bytes(data)
    members = [{name: data[at : at + size] for name, at, size in index.members(n)} for n in range(len(index))]
    assert index.keys == ("a", long, "c")
    assert members == [{"txt": b"one", "json": b"{}"}] * 2 + [{"txt": b"one", "json": b"[]"}]
    for number in range(len(index)):
        start, stop = index.byte_range(number)
        assert all(start <= at and at + size <= stop for _, at, size in index.members(number))


def test_skipped_entries_are_counted_by_kind() -> None:
    data = written(
        ("d", tarfile.DIRTYPE, ""), ("./", FILE, ""), ("old/", tarfile.AREGTYPE, ""), ("a.txt", FILE, "one"),
        ("b.txt", LINK, "a.txt"), ("c.txt", LINK, "a.txt"), ("e.txt", HARD, "nowhere.txt"),
        ("f.txt", tarfile.FIFOTYPE, ""), ("g.txt", tarfile.CHRTYPE, ""), ("README", FILE, "x"), ("._a.txt", FILE, "x"),
        ("a/.b", FILE, "x"), ("a.", FILE, "x"), ("__info__/x.txt", FILE, "x"), ("./z.txt", FILE, "x"),
    )  # fmt: skip
    tar = Tar(io.BytesIO(data), "x.tar", len(data), lambda start, stop: data[start:stop])
    assert [(sample.key, *sample.contents) for sample in tar.samples()] == [("a", "txt"), ("z", "txt")]
    assert tar.skipped == {
        "symbolic link": 2, "hard link to a file that does not precede it in the tar": 1, "pipe": 1,
        "character device": 1, "file without an extension": 2, "hidden file": 2, "file of webdataset's metadata": 1,
    }  # fmt: skip
    assert "2 x symbolic link" in tar.skipped_summary()
    assert "the first: b.txt" in tar.skipped_summary()
    with pytest.raises(DataError, match=r"x\.tar: no sample, only 2 x symbolic link.*tar --dereference"):
        index_bytes(written(("a.jpg", LINK, "../x"), ("a.txt", LINK, "../y")))


def test_unusual_keys_follow_webdataset() -> None:
    names = ["__a.jpg", "__a.txt", "_b.jpg", "__.jpg", "__c__.jpg", "d/__e__/f.jpg", "__g__/h.jpg", "__i__", "__/j.jpg"]
    data = tar_of((name, b"x") for name in names)
    theirs = [base_plus_ext(item["fname"])[0] for item in tar_file_iterator(io.BytesIO(data))]
    assert list(dict.fromkeys(key for key in theirs if key)) == list(index_bytes(data).keys)
    index = index_bytes(tar_of([("./a.b", b"x"), ("c.b.c", b"x"), ("a/b.C", b"x")]))
    assert [(key, *(name for name, _, _ in index.members(n))) for n, key in enumerate(index.keys)] == [
        ("a", "b"), ("c", "b.c"), ("a/b", "c"),
    ]  # fmt: skip


def test_fuzzed_tars_raise_data_errors_only() -> None:
    rng = random.Random(14)
    entries = (
        ("a.txt", FILE, "one"),
        ("d/" * 80 + "b.txt", FILE, "two"),
        ("c.txt", HARD, "a.txt"),
        ("d.txt", LINK, "a"),
    )
    whole = [written(*entries, format=format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
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
