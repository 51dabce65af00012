"""Names, sizes and kinds of entries that a tar may have, and what becomes of damaged ones."""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.config.errors import DataError
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.tar import Tar, clean_name, split_key
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import index_bytes

NAMES = [
    b"caf\xe9",
    b"caf\\xe9",
    b"\xff\xfe",
    b"\\xff",
    b"a\\\xe9",
    b"\xed\xa0\x80",
    "café".encode(),
    b"plain",
    b"a\\b",
]


def opened(data: bytes) -> Tar:
    return Tar(io.BytesIO(data), "x.tar", len(data), lambda start, stop: data[start:stop])


def header(
    name: bytes = b"a.txt",
    size: bytes = b"00000000003\0",
    kind: bytes = b"0",
    link: bytes = b"",
    signed: bool = False,
) -> bytes:
    """Return a ustar header with a correct checksum, whatever its fields contain."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    total = sum(byte - 256 * (signed and byte > 127) for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def entry(data: bytes = b"abc", **fields: object) -> bytes:
    stated = {"size": b"%011o\0" % len(data)} | fields
    return header(**stated) + data.ljust(-(-len(data) // 512) * 512, b"\0")  # type: ignore[arg-type]


def pax(records: bytes) -> bytes:
    return entry(records, name=b"pax", kind=b"x")


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    size += len(b"%d" % (size + len(b"%d" % size)))
    return b"%d %s=%s\n" % (size, key, value)


END = bytes(1024)


def index(data: bytes) -> ShardIndex:
    return index_bytes(data, "x.tar")


@pytest.mark.parametrize(
    "make", [lambda name: entry(name=name + b".txt"), lambda name: pax(record(b"path", name + b".txt")) + entry()]
)
def test_member_names_become_distinct_text(make: Callable[[bytes], bytes]) -> None:
    shard_index = index(b"".join(make(name) for name in NAMES) + END)
    assert shard_index.keys == tuple(clean_name(name) for name in NAMES)
    for key in shard_index.keys:
        key.encode()
    assert ShardIndex.from_bytes(shard_index.to_bytes()).keys == shard_index.keys
    literal = b"caf\\xe9"  # the escaped form of the first name: a duplicate key
    assert [key for key, twice in zip(shard_index.keys, shard_index.duplicate, strict=True) if twice] == [
        clean_name(literal),
        clean_name(b"\\xff"),
    ][: int(shard_index.duplicate.sum())]


def test_clean_name_keeps_utf8_and_escapes_injectively() -> None:
    assert clean_name("Tür\\x".encode()) == "Tür\\x"
    others = [b"caf\xe9", b"caf\xe8", b"\\xe9\xff", b"\xe9\xff", b"\\\\\xff", b"\\\xff", b"\xff"]
    assert len({clean_name(name) for name in others}) == len(others)


def test_surrogate_keys_of_old_sidecars_are_cleaned() -> None:
    shard_index = replace(
        index(entry(name=b"caf\xe9.txt") + END), keys=(b"caf\xe9".decode("utf-8", "surrogateescape"),)
    )
    assert ShardIndex.from_bytes(shard_index.to_bytes()).keys == (clean_name(b"caf\xe9"),)


@pytest.mark.parametrize(
    "size",
    [
        b"12x45678901\0",
        b"-0000000001\0",
        b"0o000000001\0",
        b"1_000000000\0",
        b"\x80" + bytes(3) + (2**62).to_bytes(8, "big"),
        b"\x80\0" + (2**79).to_bytes(10, "big"),
        b"\xff" * 12,
        b"00000004000\0",
        b"77777777777\0",
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"Z"])
def test_invalid_size_names_shard_and_offset(size: bytes, kind: bytes) -> None:
    data = entry() + header(size=size, kind=kind) + bytes(512) + END
    with pytest.raises(DataError, match=r"x\.tar: .*header at byte 1024 states"):
        index(data)


@pytest.mark.parametrize("value", [b"abc", b"1" + b"0" * 30, b"-3", b"", b"9223372036854775807", "\u0663".encode()])
def test_invalid_pax_size_is_an_error(value: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar: .*header at byte 1024 states"):
        index(pax(record(b"size", value)) + entry() + END)


@pytest.mark.parametrize(
    "records", [b"abc", b"99 path=x\n", b"5 path=x\n", b"9 path=x ", b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"6 a-b\n"]
)
def test_damaged_extended_header_is_an_error(records: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar: the extended header at byte 512 is damaged"):
        index(pax(records) + entry() + END)


def test_extended_header_may_be_padded_with_zeros() -> None:
    assert index(pax(record(b"path", b"b.txt") + bytes(7)) + entry() + END).keys == ("b",)


def test_signed_checksums_are_accepted() -> None:
    name = "Tür.txt".encode()
    assert header(name, signed=True) != header(name)
    assert index(entry(name=name, signed=True) + entry(name=name.replace(b"T", b"t")) + END).keys == ("Tür", "tür")


def written(*entries: tuple[str, bytes, str], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of (name, type, link target or content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, kind, text in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
            else:
                info.linkname = text
                tar.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_link_is_read_as_its_target(format: int) -> None:
    long = "d/" * 60 + "b" if format != tarfile.USTAR_FORMAT else "d/b"
    data = written(
        ("a.txt", tarfile.REGTYPE, "one"),
        ("a.json", tarfile.REGTYPE, "{}"),
        (f"{long}.txt", tarfile.LNKTYPE, "a.txt"),
        (f"{long}.json", tarfile.LNKTYPE, "./a.json"),
        ("c.txt", tarfile.LNKTYPE, f"{long}.txt"),
        ("c.json", tarfile.REGTYPE, "[]"),
        format=format,
    )
    shard_index = index(data)
    members = [
        {name: data[at : at + size] for name, at, size in shard_index.members(n)} for n in range(len(shard_index))
    ]
    assert shard_index.keys == ("a", long, "c")
    assert members == [{"txt": b"one", "json": b"{}"}] * 2 + [{"txt": b"one", "json": b"[]"}]
    for number in range(len(shard_index)):
        start, stop = shard_index.byte_range(number)
        assert all(start <= at and at + size <= stop for _, at, size in shard_index.members(number))


def test_skipped_entries_are_counted_by_kind() -> None:
    tar = opened(
        written(
            ("d", tarfile.DIRTYPE, ""),
            ("./", tarfile.REGTYPE, ""),
            ("old/", tarfile.AREGTYPE, ""),
            ("a.txt", tarfile.REGTYPE, "one"),
            ("b.txt", tarfile.SYMTYPE, "a.txt"),
            ("c.txt", tarfile.SYMTYPE, "a.txt"),
            ("e.txt", tarfile.LNKTYPE, "nowhere.txt"),
            ("f.txt", tarfile.FIFOTYPE, ""),
            ("g.txt", tarfile.CHRTYPE, ""),
            ("README", tarfile.REGTYPE, "x"),
            ("._a.txt", tarfile.REGTYPE, "x"),
            ("__info__/x.txt", tarfile.REGTYPE, "x"),
        )
    )
    assert [sample.key for sample in tar.samples()] == ["a"]
    assert tar.skipped == {
        "symbolic link": 2,
        "hard link to a file that does not precede it in the tar": 1,
        "pipe": 1,
        "character device": 1,
        "file without an extension": 1,
        "hidden file": 1,
        "file of webdataset's metadata": 1,
    }
    assert "2 x symbolic link" in tar.skipped_summary()
    assert "the first: b.txt" in tar.skipped_summary()


def test_tar_of_links_only_is_rejected_by_name() -> None:
    with pytest.raises(DataError, match=r"x\.tar: no sample, only 2 x symbolic link.*tar --dereference"):
        index(written(("a.jpg", tarfile.SYMTYPE, "../x"), ("a.txt", tarfile.SYMTYPE, "../y")))


def test_keys_with_underscores_follow_webdataset() -> None:
    names = ["__a.jpg", "__a.txt", "_b.jpg", "__.jpg", "__c__.jpg", "d/__e__/f.jpg", "__g__/h.jpg", "__i__", "__/j.jpg"]
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    data = written(*((name, tarfile.REGTYPE, name) for name in names))
    theirs = [base_plus_ext(item["fname"])[0] for item in tar_file_iterator(io.BytesIO(data))]
    assert list(dict.fromkeys(key for key in theirs if key)) == list(index(data).keys)


def test_fuzzed_tars_raise_data_errors_only() -> None:
    rng = random.Random(14)
    long = "d/" * 80 + "b.txt"
    whole = [
        written(
            ("a.txt", tarfile.REGTYPE, "one"),
            (long, tarfile.REGTYPE, "two"),
            ("c.txt", tarfile.LNKTYPE, "a.txt"),
            ("d.txt", tarfile.SYMTYPE, "a.txt"),
            format=format,
        )
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ] + [entry(name=b"caf\xe9.txt") + pax(record(b"size", b"3") + record(b"path", b"x.txt")) + entry() + END]
    outcomes = Counter[str]()
    for _ in range(fuzz_rounds(600)):
        data = bytearray(mutate(rng.choice(whole), rng))
        for at in range(0, len(data) - 511, 512):  # most damage would end at the checksum: make it right again
            if rng.random() < 0.8 and any(data[at : at + 512]):
                block = data[at : at + 512]
                block[148:156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
        try:
            for key in index(bytes(data)).keys:
                key.encode()
            outcomes["read"] += 1
        except DataError as error:
            outcomes["refused" if str(error).startswith("x.tar: ") else "nameless"] += 1
    assert outcomes.keys() == {"read", "refused"}


@pytest.mark.parametrize("name", ["", "/", ".", "a", "a/", "a/.b", "./a.b", "a.b.c", "a/b.C"])
def test_split_key_of_unusual_paths(name: str) -> None:
    extension = split_key(name)[1]
    assert (extension == "") == (name not in ("./a.b", "a.b.c", "a/b.C"))
    assert extension == extension.lower()
