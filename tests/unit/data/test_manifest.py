from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.errors import DataError
from pipeline.data.manifest import (
    ShardIndex,
    check_present,
    expand_braces,
    index_shards,
    index_tar,
    load_index,
    load_manifest,
    split_key,
)
from pipeline.data.storage import Storage


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
def test_index_finds_what_tarfile_finds(format: int):
    long = "d" * 90 + "/" + "é" * 40 if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "e" * 60
    data = packed(["a/1.jpg", "a/1.json", f"{long}.jpg", f"{long}.txt", "b.seg.PNG"], format)
    index = index_tar(data, "shard.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, extension = split_key(member.name)
            expected.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert contents(index, data) == expected
    assert index.keys == ("a/1", long, "b")
    assert index.extensions == ("jpg", "json", "seg.png", "txt")
    assert index.bytes == len(data)


def test_index_survives_its_sidecar():
    index = index_tar(packed(["1.jpg", "1.txt", "2.jpg"]), "shard.tar", etag="tag")
    again = ShardIndex.from_bytes(index.to_bytes())
    assert (again.keys, again.extensions, again.digest, again.etag) == (
        index.keys,
        index.extensions,
        index.digest,
        "tag",
    )
    for name in ("first", "extension", "offset", "size", "crc"):
        assert np.array_equal(getattr(again, name), getattr(index, name))


def test_folders_links_and_nameless_files_are_no_samples():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/1.txt", tarfile.REGTYPE), ("link.txt", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("README", "d/.hidden.txt", "._1.txt", "__meta__.json", "./2.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert index_tar(buffer.getvalue(), "shard.tar").keys == ("d/1", "2")


def test_empty_tar_has_no_samples():
    index = index_tar(packed([]), "shard.tar")
    assert len(index) == 0
    assert index.first.tolist() == [0]


def cuts(data: bytes) -> dict[str, bytes]:
    """The five places a tar of three 700-byte members can be cut: each member takes 512 + 1024 bytes."""
    end = 3 * 1536
    return {
        "inside a header": data[: 1536 + 200],
        "inside a member's data": data[: 1536 + 512 + 300],
        "before the two zero blocks": data[:1536],
        "between the two zero blocks": data[: end + 512],
        "with its last member's padding missing": data[: end - 10],
    }


@pytest.mark.parametrize("cut", list(cuts(b"")))
def test_a_tar_cut_anywhere_is_refused_by_name(cut: str):
    data = cuts(packed(["1.jpg", "1.txt", "2.jpg"]))[cut]
    with pytest.raises(DataError, match=r"s3://b/00007\.tar: the shard is truncated"):
        index_tar(data, "s3://b/00007.tar")


def test_damaged_compressed_and_foreign_files_are_refused_with_a_remedy():
    good = packed(["1.jpg", "1.txt", "2.jpg"])
    with pytest.raises(DataError, match=r"compressed.*Unpack x.tgz"):
        index_tar(gzip.compress(good), "x.tgz")
    with pytest.raises(DataError, match=r"x\.tar: no tar header at byte 0"):
        index_tar(b"hello world " * 100, "x.tar")
    with pytest.raises(DataError, match=r"x\.tar: no tar header at byte 1536"):
        index_tar(good[:1536] + b"\x01" + good[1537:], "x.tar")
    with pytest.raises(DataError, match=r"tars put end to end"):
        index_tar(good + good, "x.tar")
    with pytest.raises(DataError, match=r"sample '1' has two members '\.txt'"):
        index_tar(packed(["1.txt", "1.txt"]), "x.tar")


def test_folder_is_indexed_and_its_tars_stay_untouched(make_pairs, tmp_path: Path):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    before = {name: (Path(folder) / name).read_bytes() for name in os.listdir(folder)}
    manifest = index_shards(storage, folder)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("00000.tar", 5), ("00001.tar", 3)]
    assert manifest.num_samples == 8
    assert {name: (Path(folder) / name).read_bytes() for name in before} == before
    assert load_manifest(storage, folder) == manifest
    assert [len(load_index(storage, folder, record)) for record in manifest.shards] == [5, 3]


def test_indexing_continues_where_it_stopped(make_pairs, monkeypatch: pytest.MonkeyPatch):
    storage, folder = Storage(), make_pairs("pairs", [5, 3, 4])
    manifest = index_shards(storage, folder)
    for name in ("manifest.json", "00002.tar.index.npz"):
        os.unlink(f"{folder}/{name}")
    (Path(folder) / "00001.tar.index.npz").write_bytes(b"half an index")
    opened = []
    monkeypatch.setattr(storage, "open", lambda url: opened.append(url) or Storage().open(url))
    assert index_shards(storage, folder) == manifest
    assert opened == [f"{folder}/00001.tar", f"{folder}/00002.tar"]


def test_digest_names_contents_and_not_places(make_pairs, make_tar, make_pair):
    storage = Storage()
    first = index_shards(storage, make_pairs("pairs", [5, 3]))
    shutil.copytree(Path(make_pairs("copied", [])).parent / "pairs", Path(make_pairs("copies", [])) / "in")
    folder = str(Path(make_pairs("more", [])).parent / "copies" / "in")
    assert index_shards(storage, folder).digest == first.digest
    (Path(folder) / "00001.tar").write_bytes(make_tar({str(n): make_pair(n) for n in range(3)}))
    assert index_shards(storage, folder).digest != first.digest


def test_brace_patterns_choose_shards(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [2, 3, 4])
    index_shards(storage, folder)
    manifest = load_manifest(storage, f"{folder}/0000{{1..2}}.tar")
    assert [shard.samples for shard in manifest.shards] == [3, 4]
    assert load_manifest(storage, f"{folder}/00000.tar").num_samples == 2
    with pytest.raises(DataError, match=r"00003\.tar is not in"):
        load_manifest(storage, f"{folder}/{{00000..00003}}.tar")


def test_braces_expand():
    assert expand_braces("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_what_is_missing_is_told_with_the_command_that_mends_it(tmp_path: Path):
    storage = Storage()
    with pytest.raises(DataError, match=r"no such folder of shards.*mome shards build"):
        load_manifest(storage, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no manifest\.json in it.*mome shards index"):
        load_manifest(storage, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no \.tar files there"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.tgz").write_bytes(gzip.compress(packed(["1.txt"])))
    with pytest.raises(DataError, match=r"no \.tar files there\. Unpack x\.tgz"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.tar").write_bytes(packed([]))
    index_shards(storage, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"hold no samples"):
        load_manifest(storage, str(tmp_path / "empty"))


def test_edited_manifest_and_foreign_index_are_refused(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    manifest = index_shards(storage, folder)
    shutil.copy(f"{folder}/00000.tar.index.npz", f"{folder}/00001.tar.index.npz")
    with pytest.raises(DataError, match=r"00001\.tar\.index\.npz: belongs to another version"):
        load_index(storage, folder, manifest.shards[1])
    content = json.loads(Path(folder, "manifest.json").read_text())
    content["shards"][0]["samples"] = 50
    Path(folder, "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"edited or damaged"):
        load_manifest(storage, folder)


def test_missing_and_cut_shards_are_found_by_one_listing(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    manifest = index_shards(storage, folder)
    check_present(storage, folder, manifest)
    os.truncate(f"{folder}/00001.tar", 4096)
    with pytest.raises(DataError, match=r"00001\.tar: the shard was truncated: 4096 bytes"):
        check_present(storage, folder, manifest)
    os.unlink(f"{folder}/00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar: the shard is missing"):
        check_present(storage, folder, manifest)


def test_tars_made_by_others_are_indexed_as_they_are(shared: Path, tmp_path: Path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in (shared / "data" / "webdataset_tars").glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = index_shards(Storage(), str(folder))
    counts = {shard.name: shard.samples for shard in manifest.shards}
    assert counts == {
        "aistore_single-png-cls.tar": 1,
        "aistore_small-mnist-3.tar": 3,
        "clipretrieval_image1.tar": 4,
        "clipretrieval_image2.tar": 3,
        "clipretrieval_image3.tar": 2,
        "clipretrieval_image4.tar": 2,
        "webdataset_compressed.tar": 3,
        "webdataset_mpdata.tar": 100,
        "webdataset_tendata.tar": 100,
        "webdataset_testgz.tar": 1000,
    }
    for record in manifest.shards:
        data = (folder / record.name).read_bytes()
        found = contents(load_index(Storage(), str(folder), record), data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        assert {f"{key}.{name}": data for key, ms in found.items() for name, data in ms.items()} == files
